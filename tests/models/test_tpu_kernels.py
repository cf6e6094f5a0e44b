"""A model of every family on the TPU's kernels, interpreted on a CPU: the arguments that each gives them are ones that they take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jax.experimental.pallas import tpu as pltpu

from tests.models.moe_variants import MOE_VARIANTS
from tests.models.paged import PagedModel
from tests.models.variants import VARIANTS, VOCAB

ALL = VARIANTS | MOE_VARIANTS
PROMPT_LEN = 20
# The last of each family, which is its most unusual.
ONE_OF_EACH = {name.split(",")[0]: name for name in ALL}


@pytest.mark.slow
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_logits_of_tpu_kernels_equal_transformers(family: str) -> None:
    variant = ALL[ONE_OF_EACH[family]]
    prompt = np.random.default_rng(1).integers(0, VOCAB, PROMPT_LEN)
    with torch.no_grad():
        expected = variant.reference(torch.tensor(prompt)[None]).logits[0].numpy()
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        found = PagedModel(variant.path, scan=True, max_len=variant.max_len, platform="tpu").logits(prompt, [PROMPT_LEN - 1, 1])
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
