"""A model of every family on the TPU's kernels, interpreted on a CPU: the arguments that each gives them are ones that they take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jax.experimental.pallas import tpu as pltpu

from tests.models import test_encoders as encoders
from tests.models.paged import PagedModel
from tests.models.test_parity import ALL, ONE_OF_EACH
from tests.models.variants import VOCAB

PROMPT_LEN = 20


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


# All encoders have this kind of attention, but for ModernBERT's windows, which the kernels' own tests have, and MPNet's plain XLA.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert"])
def test_hidden_states_of_encoders_on_tpu_kernels_equal_transformers(name: str) -> None:
    encoder, texts = encoders.ENCODERS[name], encoders.texts_of()
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        found = encoders.run(encoder.path, texts, pooled=False, platform="tpu")
    for text, states in zip(texts, found, strict=True):
        wanted = encoders.expected(encoder.reference, text)
        assert np.abs(states - wanted).max() < 1e-4 * np.abs(wanted).max(), f"{len(text)=}"
