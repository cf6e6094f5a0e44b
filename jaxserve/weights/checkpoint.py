"""Opens whatever checkpoint lies at a path: safetensors, GGUF, Orbax or PyTorch's .bin."""

from __future__ import annotations

import pathlib

from jaxserve.errors import ConfigError
from jaxserve.models.hf_config import HfConfig
from jaxserve.weights.fp8 import unpack_fp8
from jaxserve.weights.gguf import is_gguf, open_gguf, read_gguf_config
from jaxserve.weights.json_file import read_json
from jaxserve.weights.mxfp4 import unpack_mxfp4
from jaxserve.weights.orbax import is_orbax, open_orbax
from jaxserve.weights.safetensors import INDEX_NAME, open_safetensors
from jaxserve.weights.tensors import Checkpoint, TensorInfo
from jaxserve.weights.text_part import text_part, text_values
from jaxserve.weights.torch_bin import BIN_INDEX_NAME, open_torch, weight_files

__all__ = ["Checkpoint", "TensorInfo", "open_checkpoint", "read_config"]


def open_checkpoint(path: pathlib.Path) -> Checkpoint:
    """Open the weights of the model at a path: a .gguf, .safetensors or .bin file, or a directory of safetensors, Orbax or .bin files.

    Raises: ConfigError listing everything that is wrong with them, or saying what was looked for if there are none.
    """
    if is_gguf(path):
        return open_gguf(path)
    if path.is_file() and path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.is_file() and path.suffix == ".bin":
        return text_part(open_torch(path))
    if path.is_dir():
        if (path / INDEX_NAME).exists() or any(path.glob("*.safetensors")):
            return _open_safetensors(path)
        if is_orbax(path):
            return open_orbax(path)
        if (path / BIN_INDEX_NAME).exists() or weight_files(path):
            return text_part(open_torch(path))
        pickled = sorted(file.name for pattern in ("*.pth", "*.pt") for file in path.glob(pattern))
        hint = f"; {pickled[0]} is not in Hugging Face's layout: convert it to safetensors" if pickled else ""
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint += f"; name one of its GGUF files instead of the directory, such as {path / ggufs[0]}" if ggufs else ""
        raise ConfigError(
            f"{path} holds no weights: there is neither {INDEX_NAME} nor a .safetensors file nor an Orbax checkpoint nor a .bin file{hint}"
        )
    raise ConfigError(f"{path} is neither a directory nor a .gguf, .safetensors or .bin file")


def _open_safetensors(path: pathlib.Path) -> Checkpoint:
    """The tensors as numbers, and of a model that sees images too those of its language model."""
    return text_part(unpack_fp8(unpack_mxfp4(open_safetensors(path)), _fp8_block(path.parent if path.is_file() else path)))


def _fp8_block(folder: pathlib.Path) -> tuple[int, int]:
    """Rows and columns that share a scale, as config.json says."""
    values = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    given = values.get("quantization_config")
    block = given.get("weight_block_size") if isinstance(given, dict) else None
    if block is None:
        return 128, 128
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(size, int) and 0 < size < 2**31 for size in block):
        raise ConfigError(f"{folder / 'config.json'}: weight_block_size={block!r:.80} is not two positive numbers")
    return block[0], block[1]


def read_config(path: pathlib.Path) -> HfConfig:
    """The configuration of the model at a path: config.json of a directory, or the metadata of a GGUF file.

    Raises: ConfigError if there is none or it is not readable.
    """
    if is_gguf(path):
        return read_gguf_config(path)
    folder = path.parent if path.is_file() else path
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} has no config.json, so it is not known what the model is; give a model's directory or a .gguf file")
    generation = folder / "generation_config.json"
    return HfConfig(
        text_values(read_json(folder / "config.json")),
        generation=read_json(generation) if generation.is_file() else None,
        source=str(folder / "config.json"),
    )
