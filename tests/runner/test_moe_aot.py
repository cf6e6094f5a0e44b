"""Whole steps of models with experts and with latent attention, compiled for one chip: in place, and no weights are copied."""

from __future__ import annotations

import re

import jax
import pytest

from jaxserve.runner.memory import num_bytes
from tests.kernels import aot
from tests.models.test_moe_published import PUBLISHED
from tests.runner.published import compile_step, make_programs, one_chip

NUM_PAGES = 1024
SIZES = {"decode_rows": (64,), "prefill_tokens": (512,), "max_rows": 64, "max_step_tokens": 512}


@pytest.mark.aot
@pytest.mark.parametrize("model", ["Mixtral-8x7B", "gpt-oss-20b", "DeepSeek-V2-Lite"])
@pytest.mark.parametrize("chip", ["v6e", "sm_90"])
@pytest.mark.parametrize(("kind", "tokens"), [("decode", 64), pytest.param("prefill", 512, marks=pytest.mark.slow)])
def test_step_is_in_place_and_copies_no_weights(kind: str, tokens: int, chip: str, model: str) -> None:
    """Of four layers, which fold into groups as all do: those of DeepSeek into a dense one and three with experts."""
    programs = make_programs(PUBLISHED[model][2], one_chip(chip), num_layers=4, **SIZES)
    forward, sampler = compile_step(programs, chip, kind, tokens, NUM_PAGES)
    experts = [leaf for path, leaf in programs.param_shapes.items() if re.search(r"experts\.(gate_up|down)$", path)]
    assert experts
    of_a_layer = max(num_bytes([leaf]) // leaf.shape[0] for leaf in experts)
    caches = jax.tree.leaves(programs.cache_shapes(NUM_PAGES))
    aot.check_in_place(forward, caches, temporaries=of_a_layer - 1, fusions=False)
    # Left to itself, XLA lays a table of 2,880 columns out column by column on a TPU, and turns it round in every step to gather its rows.
    weights = [*experts, programs.param_shapes["embed.weight"]]
    assert not any(aot.copies_of(weights, program, fusions=False, any_shape=False) for program in (forward, sampler))
