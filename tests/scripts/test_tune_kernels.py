"""The search for block sizes, with a clock of its own."""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
from typing import Any

import pytest

from pallas_kernels import tuning

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
tune_kernels: Any = importlib.import_module("tune_kernels")
CASES = tune_kernels.CASES
KINDS = {"decode": ({"context": (128, 256, 512)},)}


def timed(case: object, repeats: int) -> float:
    """Seconds of a kernel that likes contexts of 256 and cannot take 512."""
    sizes = tuning.tuned("chip", tune_kernels.OP, "decode f32") or {}
    tuning.tuned("chip", tune_kernels.OP, "other f32")
    if sizes.get("context") == 512:
        raise NotImplementedError("512 keys do not fit")
    return {None: 1.0, 128: 0.99, 256: 0.5}[sizes.get("context")]


def test_the_fastest_sizes_win_and_what_is_refused_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_kernels, "measure", timed)
    assert tune_kernels.tune(CASES[0], KINDS, 1) == {("chip", "decode f32"): {"context": 256}}


def test_a_second_kernel_wins_if_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed_with_two(case: object, repeats: int) -> float:
        return 0.4 if (tuning.tuned("chip", tune_kernels.OP, "decode f32") or {}).get("mosaic") else timed(case, repeats)

    monkeypatch.setattr(tune_kernels, "measure", timed_with_two)
    kinds = {"decode": (*KINDS["decode"], {"mosaic": (1,), "stages": (2,)})}
    assert tune_kernels.tune(CASES[0], kinds, 1) == {("chip", "decode f32"): {"mosaic": 1, "stages": 2}}


def test_gains_within_the_noise_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_kernels, "measure", timed)
    assert tune_kernels.tune(CASES[0], {"decode": ({"context": (128,)},)}, 1) == {}


def test_results_merge_into_the_devices_file(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    tune_kernels.write({("chip", "decode f32"): {"context": 256}})
    tune_kernels.write({("chip", "mixed f32"): {"context": 512}})
    table = json.loads((tmp_path / "chip.json").read_text())
    assert table == {tune_kernels.OP: {"decode f32": {"context": 256}, "mixed f32": {"context": 512}}}
