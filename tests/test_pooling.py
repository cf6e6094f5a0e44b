"""What vectors become: embeddings of a length, probabilities, labels."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.errors import UserError
from jaxserve.pooling import Pooling, PoolingParams, ScoreActivation, cosine, read_matryoshka

VECTOR = np.array([3.0, -4.0, 12.0], np.float32)


def test_embedding_is_cut_and_then_normalized() -> None:
    pooling = Pooling(task="embed", width=3)
    assert pooling.finish(VECTOR, dimensions=2).tolist() == pytest.approx([0.6, -0.8])
    assert pooling.finish(VECTOR, use_activation=False).tolist() == VECTOR.tolist()
    assert pooling.finish(np.zeros(3, np.float32)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("activation", "wanted"),
    [
        ("softmax", np.exp(VECTOR) / np.exp(VECTOR).sum()), ("sigmoid", 1 / (1 + np.exp(-VECTOR))), ("tanh", np.tanh(VECTOR)),
        ("relu", [3, 0, 12]), ("identity", VECTOR),
    ],
)  # fmt: skip
def test_classifier_uses_its_activation(activation: ScoreActivation, wanted: np.ndarray) -> None:
    pooling = Pooling(task="classify", width=3, activation=activation, labels=("a", "b"))
    np.testing.assert_allclose(pooling.finish(VECTOR), wanted, atol=1e-6)
    assert pooling.finish(VECTOR, use_activation=False).tolist() == VECTOR.tolist()
    assert (pooling.label(1), pooling.label(2)) == ("b", None)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_large_numbers_overflow_nothing(activation: ScoreActivation) -> None:
    with np.errstate(all="raise", under="ignore"):
        found = Pooling(task="classify", width=2, activation=activation).finish(np.array([-3e4, 3e4], np.float32))
    assert found.tolist() == pytest.approx([0, 1])


def test_dimensions_are_those_the_model_was_trained_for() -> None:
    for matryoshka, allowed in ((None, {4}), ((), {1, 2, 3, 4}), ((2,), {2, 4})):
        pooling, taken = Pooling(task="embed", width=4, matryoshka=matryoshka), set()
        for dimensions in range(1, 7):
            try:
                pooling.check_dimensions(dimensions)
            except UserError as error:
                assert error.field == "dimensions"
            else:
                taken.add(dimensions)
        assert taken == allowed
    with pytest.raises(UserError, match="classifier"):
        Pooling(task="classify", width=4).check_dimensions(2)


def test_matryoshka_is_read_as_vllm_reads_it() -> None:
    assert read_matryoshka({}, forced=False) is None
    assert read_matryoshka({}, forced=True) == ()
    assert read_matryoshka({"is_matryoshka": True}, forced=False) == ()
    assert read_matryoshka({"matryoshka_dimensions": [8, 16]}, forced=False) == (8, 16)


def test_cosine_of_nothing_is_nothing() -> None:
    assert cosine(VECTOR, VECTOR) == pytest.approx(1)
    assert cosine(VECTOR, np.zeros(3, np.float32)) == 0


@pytest.mark.parametrize("params", [{"dimensions": 0}, {"truncate_prompt_tokens": 0}, {"truncate_prompt_tokens": -2}])
def test_params_out_of_range_are_refused(params: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(params))):
        PoolingParams(**params)  # type: ignore[arg-type]
