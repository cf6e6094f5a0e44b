"""Tiny random models against transformers in float32: config reader, names, loader and mathematics together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.models.moe_variants import MOE_VARIANTS
from tests.models.paged import PagedModel
from tests.models.variants import VARIANTS, VOCAB

PROMPT_LEN = 37
ALL = VARIANTS | MOE_VARIANTS


@pytest.mark.parametrize("name", ALL)
def test_logits_equal_transformers_however_the_prompt_is_cut(name: str) -> None:
    variant = ALL[name]
    prompt = np.random.default_rng(1).integers(0, VOCAB, PROMPT_LEN)
    with torch.no_grad():
        expected = variant.reference(torch.tensor(prompt)[None]).logits[0].numpy()
    model = PagedModel(variant.path, scan=True, max_len=variant.max_len)
    for cuts in ([PROMPT_LEN], [20, 1, 16], [1] * PROMPT_LEN):
        found = model.logits(prompt, cuts)
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max(), f"{cuts=}"


@pytest.mark.parametrize("name", ["llama, gqa", "mpt"])
def test_logits_are_the_same_when_layers_are_not_scanned(name: str) -> None:
    prompt = np.random.default_rng(1).integers(0, VOCAB, PROMPT_LEN)
    scanned, unrolled = (PagedModel(VARIANTS[name].path, scan=scan).logits(prompt, [20, 1, 16]) for scan in (True, False))
    np.testing.assert_allclose(unrolled, scanned, atol=1e-5 * np.abs(scanned).max())
