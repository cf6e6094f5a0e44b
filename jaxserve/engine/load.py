"""From a configuration to an engine that is ready: find the model, read it, compile it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import pathlib
import time
from collections.abc import Callable

from tqdm import tqdm

from jaxserve.config import EngineConfig
from jaxserve.engine.engine import Engine
from jaxserve.errors import ConfigError
from jaxserve.metrics import Metrics
from jaxserve.models.families import find_family
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.spec import ModelSpec, limit_length
from jaxserve.runner.compile import count_compiles, use_compile_cache
from jaxserve.runner.programs import Limits
from jaxserve.runner.runner import Runner
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.grammar import Grammars
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer
from jaxserve.weights.checkpoint import open_checkpoint, read_config
from jaxserve.weights.source import resolve_model

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What front ends need to know of the model behind an engine.

    Args:
      max_len: tokens of prompt and answer together.
      vocab_size: width of the logits; every token id of a request lies below it.
      eos_ids: tokens that end an answer.
      grammars: compiles structured outputs.
    """

    tokenizer: Tokenizer
    chat: ChatTemplate
    max_len: int
    vocab_size: int
    eos_ids: frozenset[int]
    grammars: Grammars


def load_engine(config: EngineConfig, metrics: Metrics, on_state: Callable[[str], None]) -> tuple[Engine, ServedModel]:
    """Load and compile; blocks until the first step could run.

    Args:
      on_state: called with a short word on what is going on, such as "compiling 7/12".
    Raises: ConfigError saying what does not fit.
    """
    started_s = time.monotonic()
    on_state("resolving the model")
    path = resolve_model(config.model.model, revision=config.model.revision, cache_dir=config.cache_path)
    hf_config = read_config(path)
    family = find_family(hf_config)
    spec = _limited(family.spec(hf_config), config)
    _check_config(hf_config, ignore=config.model.ignore_config_keys)
    use_compile_cache(config.cache_path / "programs")
    count_compiles(metrics)
    tokenizer = _load_tokenizer(config, path)
    eos_ids = _eos_ids(hf_config, tokenizer, spec.vocab_size)
    runner = Runner(spec, family, config, eos_ids=eos_ids)
    on_state("loading")
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
        weights_future = pool.submit(_load_weights, runner, path)
        _compile(runner, metrics, on_state)
        weights_future.result()
    log.info("ready in seconds=%.1f\n%s", time.monotonic() - started_s, runner.memory.table())
    scheduler = _make_scheduler(config, runner.limits, runner.memory.num_pages)
    engine = Engine(runner, scheduler, tokenizer, metrics, eos_ids=eos_ids, overlap=config.schedule.overlap)
    template = config.model.chat_template
    source = _read_template(template) if template else tokenizer.chat_template
    max_len = min(runner.limits.max_len, (runner.memory.num_pages - 1) * runner.limits.page_size)
    if max_len < runner.limits.max_len:
        log.warning(
            "the cache holds max_len=%d tokens, the model could take %d; give it more with --memory-utilization",
            max_len,
            runner.limits.max_len,
        )
    served = ServedModel(
        tokenizer=tokenizer, chat=ChatTemplate(source, tokenizer), max_len=max_len, vocab_size=spec.vocab_size, eos_ids=eos_ids,
        grammars=Grammars(tokenizer, vocab_size=spec.vocab_size, eos_ids=eos_ids),
    )  # fmt: skip
    return engine, served


def _limited(spec: ModelSpec, config: EngineConfig) -> ModelSpec:
    """The model for texts of --max-len tokens at most, on which some rotary positions depend."""
    max_len = config.model.max_len
    if max_len is not None and max_len > spec.max_len:
        raise ConfigError(f"--max-len={max_len} exceeds the {spec.max_len} tokens that {config.model.model} was trained for")
    return spec if max_len is None else limit_length(spec, max_len)


def _check_config(config: HfConfig, *, ignore: bool) -> None:
    """Refuse keys that no one has read: what is not understood may change the answers."""
    unread = config.unread()
    if not unread:
        return
    listed = ", ".join(f"{key}={value!r:.60}" for key, value in unread.items())
    if not ignore:
        raise ConfigError(f"the model's config has keys that jaxserve does not know: {listed}; --ignore-config-keys goes on without them")
    log.warning("ignoring keys of the model's config; check its answers: %s", listed)


def _load_tokenizer(config: EngineConfig, path: pathlib.Path) -> Tokenizer:
    if config.model.tokenizer is not None:
        path = resolve_model(config.model.tokenizer, revision=None, cache_dir=config.cache_path, need="tokenizer")
    return load_tokenizer(path)


def _read_template(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template {path}: {error}") from None


def _eos_ids(config: HfConfig, tokenizer: Tokenizer, vocab_size: int) -> frozenset[int]:
    """End-of-sequence ids of generation_config.json, else of config.json, and of the tokenizer."""
    found = config.generation.get("eos_token_id")
    if found is None:
        found = config.get("eos_token_id", None)
    ids = set(tokenizer.eos_ids) | set(found if isinstance(found, list) else [] if found is None else [found])
    return frozenset(token for token in ids if 0 <= token < vocab_size)


def _load_weights(runner: Runner, path: pathlib.Path) -> None:
    started_s = time.monotonic()
    with open_checkpoint(path) as checkpoint, tqdm(desc="loading", unit="B", unit_scale=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        runner.load(checkpoint, progress)
    runner.allocate()
    log.info("loaded path=%s seconds=%.1f", path, time.monotonic() - started_s)


def _compile(runner: Runner, metrics: Metrics, on_state: Callable[[str], None]) -> None:
    started_s = time.monotonic()
    with tqdm(desc="compiling", unit="shape", disable=None) as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.set_postfix_str(name)
            bar.update(done - bar.n)
            on_state(f"compiling {done}/{total}")

        runner.compile(progress)
    seconds = time.monotonic() - started_s
    metrics.compile_seconds.set(seconds)
    log.info("compiled shapes=%d seconds=%.1f", len(runner.shapes), seconds)


def _make_scheduler(config: EngineConfig, limits: Limits, num_pages: int) -> Scheduler:
    return Scheduler(
        num_pages=num_pages, page_size=limits.page_size, max_rows=limits.max_rows, max_step_tokens=limits.max_step_tokens,
        max_mixed_tokens=limits.max_mixed_tokens, max_len=limits.max_len, prefix_cache=config.cache.prefix_cache,
        max_queue=config.schedule.max_queue, max_queue_tokens=config.schedule.max_queue_tokens,
    )  # fmt: skip
