"""GGUF checkpoints: every type, the order of rotary rows, metadata into a config, shards, and files that lie."""

from __future__ import annotations

import importlib
import pathlib
import struct
import sys
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.text.tokenizer import load_tokenizer
from jaxserve.weights.checkpoint import open_checkpoint, read_config
from jaxserve.weights.gguf import GgufCheckpoint, open_gguf

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
script: Any = importlib.import_module("convert")

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, WIDTH, MLP_WIDTH, VOCAB = 4, 2, 8, 32, 96, 40
RNG = np.random.default_rng(0)
METADATA = {
    "block_count": 1, "context_length": 512, "embedding_length": WIDTH, "feed_forward_length": MLP_WIDTH,
    "attention.head_count": NUM_HEADS, "attention.head_count_kv": NUM_KV_HEADS, "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 50_000.0,
}  # fmt: skip
SHAPES = {
    "token_embd.weight": (VOCAB, WIDTH),
    "output_norm.weight": (WIDTH,),
    "blk.0.attn_norm.weight": (WIDTH,),
    "blk.0.attn_q.weight": (NUM_HEADS * HEAD_SIZE, WIDTH),
    "blk.0.attn_k.weight": (NUM_KV_HEADS * HEAD_SIZE, WIDTH),
    "blk.0.attn_v.weight": (NUM_KV_HEADS * HEAD_SIZE, WIDTH),
    "blk.0.attn_output.weight": (WIDTH, NUM_HEADS * HEAD_SIZE),
    "blk.0.ffn_norm.weight": (WIDTH,),
    "blk.0.ffn_gate.weight": (MLP_WIDTH, WIDTH),
    "blk.0.ffn_up.weight": (MLP_WIDTH, WIDTH),
    "blk.0.ffn_down.weight": (WIDTH, MLP_WIDTH),
}
TENSORS = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
HEADS = {"blk.0.attn_q.weight": NUM_HEADS, "blk.0.attn_k.weight": NUM_KV_HEADS}


def permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    return rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def stored(name: str) -> np.ndarray:
    return np.ascontiguousarray(permute(TENSORS[name], HEADS[name])) if name in HEADS else TENSORS[name]


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def write_gguf(
    path: pathlib.Path,
    metadata: Mapping[str, Any] = METADATA,
    kind: Kind = Kind.F32,
    extra: Mapping[str, np.ndarray] | None = None,
    other: Mapping[str, Any] | None = None,
    arch: str = "llama",
) -> pathlib.Path:
    """Write a llama of one layer; matrices are of `kind`, `extra` tensors of float32, `other` metadata under their full keys."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in [*((f"{arch}.{key}", value) for key, value in metadata.items()), *(other or {}).items()]:
        add_value(writer, key, value)
    for name, shape in SHAPES.items():
        if len(shape) == 1 or kind == Kind.F32:
            writer.add_tensor(name, stored(name))
        else:
            writer.add_tensor(name, gguf.quants.quantize(stored(name), kind), raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    finish(writer)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    tokens = {"tokenizer.ggml.tokens": ["<s>", "a", "b"], "tokenizer.ggml.scores": [0.0, 1.0, 2.0], "tokenizer.ggml.eos_token_id": 2}
    return write_gguf(tmp_path_factory.mktemp("whole") / "m.gguf", other=tokens).read_bytes()


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_tensors_have_hugging_face_row_order(kind: Kind, tmp_path: pathlib.Path) -> None:
    dtypes = {Kind.F16: "float16", Kind.BF16: "bfloat16"}
    tolerances = {Kind.F32: 0.0, Kind.F16: 1e-3, Kind.BF16: 8e-3, Kind.Q8_0: 8e-3, Kind.Q5_0: 0.07, Kind.Q5_1: 0.07}
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", kind=kind)) as checkpoint:
        assert set(checkpoint.tensors) == set(SHAPES)
        for name, expected in TENSORS.items():
            found = checkpoint.read(name)
            assert checkpoint.tensors[name].shape == found.shape == expected.shape
            assert found.dtype.name == checkpoint.tensors[name].dtype == (dtypes.get(kind, "float32") if expected.ndim == 2 else "float32")
            # Half a step of the type's grid, over the largest value of a block.
            np.testing.assert_allclose(found.astype(np.float32), expected, atol=np.abs(expected).max() * tolerances.get(kind, 0.13))
            for start, stop in ((0, 0), (0, 1), (3, 13), (0, len(expected))):
                np.testing.assert_array_equal(checkpoint.read_rows(name, start, stop), found[start:stop])


@pytest.mark.parametrize("kind", list(gguf.GGML_QUANT_SIZES), ids=lambda kind: kind.name)
def test_every_type_is_dequantized_as_gguf_does_or_refused_by_name(kind: Kind, tmp_path: pathlib.Path) -> None:
    rows, (block_len, block_bytes) = 5, gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 60: as float16 and bfloat16 scales they are finite.
    blocks = np.random.default_rng(1).integers(0, 60, (rows, 3 * block_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x.weight", blocks, raw_dtype=kind)
    finish(writer)
    plain = {Kind.F64: np.float64, Kind.I8: np.int8, Kind.I16: np.int16, Kind.I32: np.int32, Kind.I64: np.int64}
    try:
        expected = blocks.view(plain[kind]) if kind in plain else gguf.quants.dequantize(blocks, kind)
    except NotImplementedError:
        with pytest.raises(ConfigError, match=f"x.weight has type {kind.name}"):
            open_gguf(tmp_path / "m.gguf")
        return
    with open_gguf(tmp_path / "m.gguf") as checkpoint:
        found = checkpoint.read("x.weight")
        assert found.shape == (rows, 3 * block_len)
        np.testing.assert_array_equal(found.astype(expected.dtype), expected)
        np.testing.assert_array_equal(checkpoint.read_rows("x.weight", 1, 4), found[1:4])


def test_large_tensor_is_dequantized_alike_in_pieces(tmp_path: pathlib.Path) -> None:
    matrix = RNG.normal(size=(1500, 224)).astype(np.float32)  # two and a half pieces
    blocks = gguf.quants.quantize(matrix, Kind.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x.weight", blocks, raw_dtype=Kind.Q8_0)
    finish(writer)
    with open_gguf(tmp_path / "m.gguf") as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("x.weight"), gguf.quants.dequantize(blocks, Kind.Q8_0))


def test_metadata_become_the_config_that_the_model_had(tmp_path: pathlib.Path) -> None:
    tokens = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 7}
    config = read_config(write_gguf(tmp_path / "m.gguf", other=tokens))
    assert config.architecture == "LlamaForCausalLM"
    expected = {
        "hidden_size": WIDTH, "intermediate_size": MLP_WIDTH, "num_hidden_layers": 1, "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS, "head_dim": HEAD_SIZE, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
        "vocab_size": VOCAB, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": [2, 7], "attention_bias": False,
    }  # fmt: skip
    assert {key: config.values[key] for key in expected} == expected
    assert dict(config.rope_parameters()) == {"rope_theta": 50_000.0, "rope_type": "default"}
    assert config.generation == {"bos_token_id": 1, "eos_token_id": [2, 7]}


def test_embeddings_are_not_tied_when_there_is_an_output_matrix(tmp_path: pathlib.Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", extra={"output.weight": np.ones((VOCAB, WIDTH), np.float32)})
    assert read_config(path).values["tie_word_embeddings"] is False
    with open_checkpoint(path) as checkpoint:
        assert "output.weight" in checkpoint.tensors


def test_linear_scaling_is_kept(tmp_path: pathlib.Path) -> None:
    scaled = {**METADATA, "rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    expected = {"rope_theta": 50_000.0, "rope_type": "linear", "factor": 2.0}
    assert dict(read_config(write_gguf(tmp_path / "m.gguf", scaled)).rope_parameters()) == expected


def llama3_divisors(factor: float, low: float, high: float, original_len: float, theta: float = 50_000.0) -> np.ndarray:
    """What llama.cpp's converter stores as rope_freqs.weight."""
    divisors = []
    for i in range(0, HEAD_SIZE, 2):
        wavelength = 2 * np.pi * theta ** (i / HEAD_SIZE)
        if wavelength < original_len / high:
            divisors.append(1.0)
        elif wavelength > original_len / low:
            divisors.append(factor)
        else:
            smooth = (original_len / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_llama3_scaling_is_recovered_from_its_effect(tmp_path: pathlib.Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": llama3_divisors(32.0, 1.0, 4.0, 8192)})
    assert dict(read_config(path).rope_parameters()) == {
        "rope_theta": 50_000.0, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


def test_step_of_llama4_is_recovered_from_its_effect(tmp_path: pathlib.Path) -> None:
    theta = 640.0 ** (HEAD_SIZE / (HEAD_SIZE - 4))  # so that a wavelength of 4000 is none of those that Llama 3.1 keeps
    divisors = llama3_divisors(16.0, 1.0, 1.0, 8192, theta)
    path = write_gguf(tmp_path / "m.gguf", {**METADATA, "rope.freq_base": theta}, extra={"rope_freqs.weight": divisors})
    rope = read_config(path).rope_parameters()
    assert (rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]) == (16.0, 1.0, 1.0)


def test_frequencies_of_another_scaling_are_refused(tmp_path: pathlib.Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": llama3_divisors(8.0, 1.0, 4.0, 4000)})
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight does not follow"):
        read_config(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logit_scale": 0.5}, r"not understood: llama\.logit_scale=0\.5"),
        ({"expert_count": 8}, r"no llama\.expert_used_count"),
        ({"block_count": 3}, "block_count=3, but the file holds the tensors of 1 layers"),
        ({"attention.head_count": "many"}, r"attention\.head_count='many' is not a count"),
        ({"attention.head_count": 0}, "is not positive"),
        ({"attention.value_length": 16}, "values of a size other than"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "is not a positive number"),
    ],
)
def test_metadata_that_are_not_understood_are_refused_by_key_and_value(
    change: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", {**METADATA, **change})
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_heads_of_equal_number_in_every_layer_may_be_a_list(tmp_path: pathlib.Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {**METADATA, "attention.head_count_kv": [NUM_KV_HEADS, NUM_KV_HEADS]})
    assert read_config(path).values["num_key_value_heads"] == NUM_KV_HEADS


def test_architecture_is_refused_by_name_when_it_is_not_supported(tmp_path: pathlib.Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", arch="mamba")
    for read in (open_checkpoint, read_config):
        with pytest.raises(ConfigError, match="architecture 'mamba' are not supported; there are llama"):
            read(path)


def test_conversion_to_orbax_keeps_weights_config_and_tokens(tmp_path: pathlib.Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *"▁abcdefghijklmnopqrstuvwxyz", "▁a", "ab", *(f"<{i}>" for i in range(8))]
    tokenizer = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": [-float(i) for i in range(VOCAB)],
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * (VOCAB - 3)], "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 39, "tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    assert len(tokens) == VOCAB
    source, target = write_gguf(tmp_path / "m.gguf", kind=Kind.Q8_0, other=tokenizer), tmp_path / "converted"
    assert script.main([str(source), str(target)]) == 0
    with open_checkpoint(source) as expected, open_checkpoint(target) as found:
        assert dict(found.tensors) == dict(expected.tensors)
        for name in expected.tensors:
            np.testing.assert_array_equal(found.read(name), expected.read(name))
    assert read_config(target).values == read_config(source).values
    assert read_config(target).generation["eos_token_id"] == [2, 39]
    for text in ("ab cab", "</s>a"):
        assert load_tokenizer(target).encode(text, add_special_tokens=True) == load_tokenizer(source).encode(text, add_special_tokens=True)
    assert load_tokenizer(target).encode("ab", add_special_tokens=True)[0] == 1
    assert load_tokenizer(target).chat_template == "{{ messages }}"


def write_shards(directory: pathlib.Path, count: int) -> list[pathlib.Path]:
    paths = [directory / f"m-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    for i, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.count", count)
        for key, value in METADATA.items():
            add_value(writer, f"llama.{key}", value)
        for j, name in enumerate(SHAPES):
            if j % count == i:
                writer.add_tensor(name, stored(name))
        finish(writer)
    return paths


def test_shards_are_read_together_from_the_first(tmp_path: pathlib.Path) -> None:
    paths = write_shards(tmp_path, 3)
    with open_checkpoint(paths[0]) as checkpoint:
        for name, expected in TENSORS.items():
            np.testing.assert_array_equal(checkpoint.read(name), expected)
    assert read_config(paths[0]).values["num_hidden_layers"] == 1
    with pytest.raises(ConfigError, match="name the first"):
        open_checkpoint(paths[1])


def test_every_missing_or_damaged_shard_is_listed(tmp_path: pathlib.Path) -> None:
    paths = write_shards(tmp_path, 4)
    paths[1].unlink()
    paths[2].write_bytes(b"")
    paths[3].write_bytes(paths[3].read_bytes()[:100])
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(paths[0])
    assert f"{paths[1].name}: missing shard" in str(caught.value)
    assert f"{paths[2].name}: " in str(caught.value)
    assert f"{paths[3].name}: it is cut short" in str(caught.value)


def test_all_tensors_past_the_end_are_listed_when_the_data_are_cut(whole: bytes, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(whole[: -8 * 1024 * 3])
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(path)
    assert "blk.0.ffn_down.weight" in str(caught.value)
    assert "blk.0.ffn_up.weight" in str(caught.value)
    assert "token_embd.weight" not in str(caught.value)


def read_everything(path: pathlib.Path) -> None:
    """Read all there is; every failure but a ConfigError passes through."""
    for read in (read_config, read_tensors):
        try:
            read(path)
        except ConfigError as error:
            assert str(error)


def read_tensors(path: pathlib.Path) -> None:
    with open_gguf(path) as checkpoint:
        assert isinstance(checkpoint, GgufCheckpoint)
        assert sum(checkpoint.read(name).nbytes for name in checkpoint.tensors) <= 16 * path.stat().st_size


@given(cut=st.integers(0, 3000))
def test_truncated_header_is_refused(cut: int, whole: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cut") / "m.gguf"
    path.write_bytes(whole[:cut])
    for read in (open_checkpoint, read_config):
        with pytest.raises(ConfigError):
            read(path)


@given(positions=st.lists(st.tuples(st.integers(0, 1700), st.integers(0, 255)), min_size=1, max_size=3))
def test_corrupted_header_is_refused_or_reads_within_the_file(
    positions: list[tuple[int, int]], whole: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(whole)
    for position, value in positions:
        content[position] = value
    path = tmp_path_factory.mktemp("corrupt") / "m.gguf"
    path.write_bytes(content)
    read_everything(path)


@given(offset=st.sampled_from([8, 16, *range(24, 1700, 7)]), value=st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64 - 1]))
def test_absurd_counts_and_sizes_are_refused_without_allocating(
    offset: int, value: int, whole: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("absurd") / "m.gguf"
    path.write_bytes(whole[:offset] + struct.pack("<Q", value) + whole[offset + 8 :])
    read_everything(path)
