"""Named shapes of the grouped matrix product, each with its reason."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One product: rows of each expert, rows of padding, width of the rows, width of the result."""

    name: str
    group_sizes: tuple[int, ...]
    num_in: int = 24
    num_out: int = 40
    padding: int = 0

    @property
    def num_rows(self) -> int:
        """T: rows of all experts and of padding."""
        return sum(self.group_sizes) + self.padding


CASES = (
    Case(name="one row", group_sizes=(0, 0, 1)),
    Case(name="one row of padding", group_sizes=(0, 0, 0), padding=1),
    Case(name="one expert", group_sizes=(9,)),
    Case(name="every expert one row", group_sizes=(1, 1, 1, 1, 1)),
    Case(name="empty experts at both ends and between", group_sizes=(0, 3, 0, 0, 7, 1, 0), padding=2),
    Case(name="all rows in the last of many experts", group_sizes=(*[0] * 15, 37), padding=3),
    Case(name="an expert over several blocks, its neighbours within one", group_sizes=(2, 75, 5), padding=6),
    Case(name="nothing but padding", group_sizes=(0, 0), padding=5),
    Case(name="odd widths", group_sizes=(4, 0, 6), num_in=7, num_out=13),
)


def make_inputs(case: Case, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x with NaN in its padding, weights and group sizes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((case.num_rows, case.num_in)).astype(np.float32)
    x[sum(case.group_sizes) :] = np.nan
    weights = rng.standard_normal((len(case.group_sizes), case.num_in, case.num_out)).astype(np.float32)
    return x, weights, np.array(case.group_sizes, np.int32)
