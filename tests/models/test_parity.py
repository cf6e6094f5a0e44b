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


# The last of each family, which is its most unusual.
ONE_OF_EACH = {name.split(",")[0]: name for name in ALL}


@pytest.mark.parametrize("name", ALL)
def test_logits_equal_transformers_however_the_prompt_is_cut(name: str) -> None:
    variant = ALL[name]
    prompt = np.random.default_rng(1).integers(0, VOCAB, PROMPT_LEN)
    with torch.no_grad():
        expected = variant.reference(torch.tensor(prompt)[None]).logits[0].numpy()
    model = PagedModel(variant.path, scan=True, max_len=variant.max_len)
    # Of variants of one family the last is decoded with steps of decode's own, the others with those of prefill: programs cost the most.
    decodes = name in ONE_OF_EACH.values()
    for cuts in ([PROMPT_LEN], [20, 1, 16], [24, *[1] * 13] if decodes else [*[1] * 13, 24]):
        found = model.logits(prompt, cuts, decodes=decodes)
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max(), f"{cuts=}"


@pytest.mark.parametrize("name", ["llama, gqa", "mpt"])
def test_logits_equal_transformers_when_layers_are_not_scanned(name: str) -> None:
    prompt = np.random.default_rng(1).integers(0, VOCAB, PROMPT_LEN)
    with torch.no_grad():
        expected = ALL[name].reference(torch.tensor(prompt)[None]).logits[0].numpy()
    found = PagedModel(ALL[name].path, scan=False).logits(prompt, [20, 1, 16])
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
