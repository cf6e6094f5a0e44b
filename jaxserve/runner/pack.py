"""A schedule as one array of 32-bit words: one transfer a step, taken apart again by static offsets inside the step.

Per-slot rows (page table, sampling parameters) are kept on the host and gathered, so that a step costs little per request.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.batch import Batch
from jaxserve.request import Request
from jaxserve.runner.sampling import BAD_WORDS, BIAS, CHOSEN, GRAMMAR, LOGPROBS, MASK, MIN_TOKENS, PENALTIES, SamplingRows
from jaxserve.runner.shapes import StepShape
from jaxserve.scheduler.schedule import Row, Schedule

INTS = ("slot", "seed", "position", "wants", "top_k")
FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
ROW_WORDS = len(INTS) + len(FLOATS)  # of a row, for sampling


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Where each field lies in the packed words of a shape.

    Args:
      shape: T and S.
      num_pages: P, entries of a row of the page table.
      max_rows: M; what sampling wants to know lies the same way in the words of all shapes, at their end.
    """

    shape: StepShape
    num_pages: int
    max_rows: int

    def fields(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Field -> (offset in words, shape)."""
        return _fields(self.shape, self.num_pages, self.max_rows)

    @property
    def num_words(self) -> int:
        """Length of the packed array."""
        offset, shape = self.fields()["rows"]
        return offset + shape[0] * shape[1]


@functools.cache
def _fields(shape: StepShape, num_pages: int, max_rows: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    T, S = shape.tokens, shape.rows
    shapes: dict[str, tuple[int, ...]] = {
        "tokens": (T,), "positions": (T,), "targets": (T if shape.kind == "score" else 0,),
        "token_types": (T if shape.kind == "pool" else 0,), "query_start": (S + 1,), "kv_len": (S,), "page_table": (S, num_pages),
        "rows": (ROW_WORDS, max_rows),
    }  # fmt: skip
    fields, offset = {}, 0
    for name, dims in shapes.items():
        fields[name] = (offset, dims)
        offset += int(np.prod(dims))
    return fields


def unpack(packed: jax.Array, layout: Layout, last_token: jax.Array) -> tuple[Batch, jax.Array, jax.Array]:
    """The batch, the words for sampling (see unpack_rows) and the prompt's target tokens of i32[num_words]; traced inside the step.

    Args:
      last_token: i32[max_rows] on the device; a token of -1 - slot stands for the one sampled last in that slot.
    """

    def take(name: str) -> jax.Array:
        offset, dims = layout.fields()[name]
        return packed[offset : offset + int(np.prod(dims))].reshape(dims)

    tokens = take("tokens")
    tokens = jnp.where(tokens < 0, last_token[jnp.clip(-1 - tokens, 0, last_token.shape[0] - 1)], tokens)
    batch = Batch(
        tokens=tokens, positions=take("positions"), page_table=take("page_table"), query_start=take("query_start"), kv_len=take("kv_len"),
        token_types=take("token_types"), one_token_rows=layout.shape.kind == "decode",
    )  # fmt: skip
    return batch, take("rows"), take("targets")


def unpack_rows(words: jax.Array) -> SamplingRows:
    """The sampling rows of i32[ROW_WORDS, S]."""
    ints = dict(zip(INTS, words, strict=False))
    floats = jax.lax.bitcast_convert_type(words[len(INTS) :], jnp.float32)
    return SamplingRows(**{**ints, "seed": ints["seed"].astype(jnp.uint32)}, **dict(zip(FLOATS, floats, strict=True)))


class Packer:
    """Writes schedules into words.

    Args:
      max_rows: number of slots.
      num_pages: P.
    """

    def __init__(self, *, max_rows: int, num_pages: int) -> None:
        self._max_rows, self._num_pages = max_rows, num_pages
        self._owner: list[tuple[Request, int] | None] = [None] * max_rows
        self._pages_written = [0] * max_rows
        self._page_table = np.zeros((max_rows, num_pages), np.int32)
        self._ints = np.zeros((max_rows, 3), np.int32)  # seed, wants, top_k
        self._floats = np.zeros((max_rows, len(FLOATS)), np.float32)

    def assign(self, request: Request) -> bool:
        """Make the request's slot its own; False if it was already."""
        owner, slot = (request, request.num_preemptions), request.slot
        if self._owner[slot] == owner:
            return False
        self._owner[slot] = owner
        self._pages_written[slot] = 0
        params = request.params
        wants = PENALTIES * params.has_penalties + BIAS * bool(params.logit_bias) + LOGPROBS * (params.num_logprobs is not None)
        constrained = request.constraint is not None
        wants += MASK * (constrained or params.allowed_token_ids is not None) + GRAMMAR * constrained
        wants += BAD_WORDS * bool(request.bad_words) + CHOSEN * bool(params.logprob_token_ids)
        self._ints[slot] = np.array([request.seed & 0xFFFFFFFF, wants, params.top_k], np.uint32).view(np.int32)
        self._floats[slot] = [getattr(params, name) for name in FLOATS]
        return True

    def pack(self, schedule: Schedule, layout: Layout) -> np.ndarray:
        """i32[layout.num_words] for the rows of the schedule, all of them assigned."""
        words = np.zeros(layout.num_words, np.int32)
        view = {name: words[offset : offset + int(np.prod(dims))].reshape(dims) for name, (offset, dims) in layout.fields().items()}
        rows = schedule.rows
        slots = [row.request.slot for row in rows]
        counts = [row.count for row in rows]
        S = len(rows)
        view["query_start"][1 : S + 1] = np.cumsum(counts)
        view["query_start"][S + 1 :] = schedule.num_tokens
        view["kv_len"][:S] = [row.start + row.count for row in rows]
        if layout.shape.kind == "decode":
            view["tokens"][:S] = [_token_at(row.request, row.start) for row in rows]
            view["positions"][:S] = [row.start for row in rows]
        else:
            self._pack_tokens(rows, view)
        for row in rows:
            self._extend_pages(row.request)
        view["page_table"][:S] = self._page_table[slots]
        pools = layout.shape.kind == "pool"  # whose slots keep what a text adds up to from step to step
        sampled = np.fromiter((row.samples or pools for row in rows), bool, S)
        ints = dict(zip(INTS, view["rows"], strict=False))
        ints["slot"][:] = -1
        ints["slot"][:S] = np.where(sampled, slots, -1)
        ints["position"][:S] = view["kv_len"][:S]
        ints["seed"][:S], ints["wants"][:S], ints["top_k"][:S] = self._ints[slots].T
        view["rows"][len(INTS) :, :S] = self._floats[slots].view(np.int32).T
        for i, row in enumerate(rows):
            request = row.request
            # Masks know of min_tokens, and that a complete answer outranks it.
            if (
                request.params.min_tokens
                and request.constraint is None
                and row.start + row.count - len(request.prompt_ids) < request.params.min_tokens
            ):
                ints["wants"][i] |= MIN_TOKENS
        return words

    def num_sampled(self, words: np.ndarray) -> int:
        """Rows of a packed schedule up to the last one that samples; 0 if none does."""
        slots = words[-ROW_WORDS * self._max_rows :][: self._max_rows]
        return int(np.max(np.flatnonzero(slots >= 0), initial=-1)) + 1

    def _pack_tokens(self, rows: tuple[Row, ...], view: dict[str, np.ndarray]) -> None:
        at = 0
        for row in rows:
            request, end = row.request, row.start + row.count
            prompt_len = len(request.prompt_ids)
            if row.count == 1:
                view["tokens"][at] = _token_at(request, row.start)
            else:
                assert end <= request.num_known, f"{end=} {request.num_known=}: a token in flight is always a row of its own"
                ids = request.prompt_ids[row.start : end]
                if end > prompt_len:
                    ids = ids + request.output_ids[max(row.start - prompt_len, 0) : end - prompt_len]
                view["tokens"][at : at + row.count] = ids
            view["positions"][at : at + row.count] = np.arange(row.start, end)
            if len(view["targets"]) and request.params.prompt_logprobs is not None:
                following = request.prompt_ids[row.start + 1 : end + 1]
                view["targets"][at : at + len(following)] = following
            if len(view["token_types"]) and request.second_at is not None:
                view["token_types"][at : at + row.count] = np.arange(row.start, end) >= request.second_at
            at += row.count

    def _extend_pages(self, request: Request) -> None:
        slot, written = request.slot, self._pages_written[request.slot]
        if len(request.pages) > written:
            self._page_table[slot, written : len(request.pages)] = request.pages[written:]
            self._pages_written[slot] = len(request.pages)


def _token_at(request: Request, position: int) -> int:
    """The token id at a position, or -1 - slot if it is still on the device."""
    prompt_len = len(request.prompt_ids)
    if position < prompt_len:
        return request.prompt_ids[position]
    if position < request.num_known:
        return request.output_ids[position - prompt_len]
    return -1 - request.slot
