"""From a configuration to an engine that is ready: find the model, read it, compile it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import logging
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from jaxserve.config import EngineConfig
from jaxserve.engine.bounds import ThinkingMarks, thinking_marks
from jaxserve.engine.defaults import read_generation, sampling_defaults, template_defaults
from jaxserve.engine.engine import Engine
from jaxserve.engine.multihost import Follower, Leader, is_follower, meet
from jaxserve.engine.replicas import Replicas
from jaxserve.engine.task import choose_family
from jaxserve.errors import ConfigError
from jaxserve.metrics import Metrics
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.names import Family
from jaxserve.models.spec import ModelSpec, limit_length
from jaxserve.pooling import Pooling
from jaxserve.runner.compile import count_compiles, use_compile_cache
from jaxserve.runner.mesh import plan_mesh
from jaxserve.runner.runner import Runner
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.text.chat import ChatTemplate
from jaxserve.text.grammar import Grammars
from jaxserve.text.reasoning import choose_reasoning_format
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer
from jaxserve.version import VERSION
from jaxserve.weights.checkpoint import Checkpoint, open_checkpoint, read_config
from jaxserve.weights.sentence_transformers import WithModules
from jaxserve.weights.source import resolve_model

log = logging.getLogger(__name__)

_SAMPLED_TENSORS = 32  # whose first rows are compared


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What front ends need to know of the model behind an engine.

    Args:
      max_len: tokens of prompt and answer together.
      vocab_size: width of the logits; every token id of a request lies below it.
      eos_ids: tokens that end an answer.
      grammars: compiles structured outputs.
      pooling: what texts become, for models that turn them into vectors.
      group: the other processes that serve it, if there are any.
      defaults: sampling parameters that the model's makers want where a request leaves them open.
      thinking: marks around the model's reasoning, if an end to it can be forced.
    """

    tokenizer: Tokenizer
    chat: ChatTemplate
    max_len: int
    vocab_size: int
    eos_ids: frozenset[int]
    grammars: Grammars
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    thinking: ThinkingMarks | None = None
    pooling: Pooling | None = None
    group: Leader | None = None

    @property
    def refused(self) -> Mapping[str, str]:
        """Parameters that this model cannot serve, and why."""
        reason = "needs a model whose reasoning ends with a marker; none is known for this one (--reasoning-parser)"
        return {"thinking_token_budget": reason} if self.thinking is None else {}


def load_engine(config: EngineConfig, metrics: Metrics, on_state: Callable[[str], None]) -> tuple[Engine | Replicas, ServedModel]:
    """Load and compile; blocks until the first step could run.

    Args:
      on_state: called with a short word on what is going on, such as "compiling 7/12".
    Raises: ConfigError saying what does not fit.
    """
    if is_follower(config.parallel):
        raise ConfigError(
            "only process 0 of those that serve together has an engine; run python -m jaxserve.serve or jaxserve.batch in the others, "
            "with the same options"
        )
    group, model, runners = _load_runners(config, metrics, on_state)
    spec, tokenizer, eos_ids = model.spec, model.tokenizer, model.eos_ids
    assert not isinstance(group, Follower), f"{config.parallel=}"
    if group is not None:
        for i, runner in enumerate(runners):
            runner.lead(functools.partial(group.tell, i))
    runner = runners[0]  # they are alike
    engines = [
        Engine(each, _make_scheduler(config, each, spec), tokenizer, metrics, eos_ids=eos_ids, overlap=config.schedule.overlap)
        for each in runners
    ]
    engine = engines[0] if len(engines) == 1 else Replicas(engines, metrics, page_size=runner.limits.page_size)
    metrics.cache_config(
        page_size=runner.limits.page_size, num_pages=runner.memory.num_pages * len(engines), prefix_cache=config.cache.prefix_cache,
        dtype=config.cache.cache_dtype,
    )  # fmt: skip
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
        tokenizer=tokenizer, chat=ChatTemplate(source, tokenizer, defaults=template_defaults(config.model)),
        max_len=max_len, vocab_size=spec.vocab_size, eos_ids=eos_ids,
        grammars=Grammars(tokenizer, vocab_size=spec.vocab_size, eos_ids=eos_ids),
        pooling=model.pooling, defaults=model.defaults, group=group,
        thinking=thinking_marks(choose_reasoning_format(config.server.reasoning_parser, source), tokenizer),
    )  # fmt: skip
    return engine, served


def follow_leader(config: EngineConfig, metrics: Metrics) -> None:
    """Load and compile as the leader does, and run what it says until it lets go.

    Raises: ConfigError saying what does not fit; ConnectionError if the leader is gone.
    """
    group, _, runners = _load_runners(config, metrics, log.debug)
    assert isinstance(group, Follower), "process 0 leads"
    while (message := group.receive()) is not None:
        copy, program, arrays = message
        runners[copy].replay(program, arrays)
    group.close()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """What a configuration names, before it is loaded.

    Args:
      weights: where they are; None if they are to be random numbers.
    """

    weights: pathlib.Path | None
    hf_config: HfConfig
    family: Family
    pooling: Pooling | None
    spec: ModelSpec
    defaults: Mapping[str, Any]
    tokenizer: Tokenizer
    eos_ids: frozenset[int]


def _find_model(config: EngineConfig, metrics: Metrics, on_state: Callable[[str], None]) -> _Model:
    on_state("resolving the model")
    is_dummy = config.model.load_format == "dummy"
    need = "tokenizer" if is_dummy else "model"
    path = resolve_model(config.model.model, revision=config.model.revision, cache_dir=config.cache_path, need=need)
    hf_config = read_config(path)
    family, pooling = choose_family(config, hf_config, path)
    spec = _limited(family.spec(hf_config), config, pooling)
    generation = read_generation(config.model, hf_config.generation)
    defaults = sampling_defaults(config.model, generation)
    _check_config(hf_config, ignore=config.model.ignore_config_keys)
    use_compile_cache(config.cache_path / "programs")
    count_compiles(metrics)
    tokenizer = _load_tokenizer(config, path)
    eos_ids = _eos_ids(hf_config, generation, tokenizer, spec.vocab_size)
    return _Model(
        weights=None if is_dummy else path,
        hf_config=hf_config,
        family=family,
        pooling=pooling,
        spec=spec,
        defaults=defaults,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
    )


def _load_runners(
    config: EngineConfig, metrics: Metrics, on_state: Callable[[str], None]
) -> tuple[Leader | Follower | None, _Model, list[Runner]]:
    """Every copy of the model, ready, and the other processes that have it too."""
    group = meet(config.parallel, _identity(config))
    model = _find_model(config, metrics, on_state)
    if group is not None:
        group.agree({"model": fingerprint(model.spec, model.weights)})
    started_s = time.monotonic()
    plan = plan_mesh(config, model.spec)
    log.info(plan.table())
    runners = [Runner(model.spec, model.family, config, target, eos_ids=model.eos_ids) for target in plan.targets]
    on_state("loading")
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
        weights_future = pool.submit(_load_weights, runners, model.weights, model.pooling)
        _compile(runners, metrics, on_state)
        weights_future.result()
    log.info("ready in seconds=%.1f\n%s\n%s", time.monotonic() - started_s, plan.table(), runners[0].memory.table())
    return group, model, runners


def _identity(config: EngineConfig) -> dict[str, Any]:
    """What processes that serve together must have in common: versions, and every option that shapes a program."""
    sections = (config.model, config.cache, config.schedule, config.compile)
    options = {f"--{name.replace('_', '-')}": value for section in sections for name, value in dataclasses.asdict(section).items()}
    for own in ("--cache-dir", "--compile-threads"):
        del options[own]
    return {"version": VERSION, "jax": jax.__version__, "--mesh": config.parallel.axes, **options}


def fingerprint(spec: ModelSpec, path: pathlib.Path | None) -> str:
    """What tells a model from others, also from those that differ only in what they have learnt: some of its weights are part of it.

    Args:
      path: of the weights; None if they are random numbers.
    """
    digest = hashlib.sha256(repr(spec).encode())
    if path is None:
        return digest.hexdigest()
    with open_checkpoint(path) as checkpoint:
        names = sorted(checkpoint.tensors)
        digest.update(repr([(name, checkpoint.tensors[name].shape) for name in names]).encode())
        for name in names[:: -(-len(names) // _SAMPLED_TENSORS)]:
            if checkpoint.tensors[name].shape:
                digest.update(checkpoint.read_rows(name, 0, 1).tobytes())
    return digest.hexdigest()


def _limited(spec: ModelSpec, config: EngineConfig, pooling: Pooling | None) -> ModelSpec:
    """The model for texts of --max-len tokens at most, on which some rotary positions depend."""
    max_len = config.model.max_len
    if max_len is None and pooling is not None and pooling.max_len is not None:
        max_len = min(pooling.max_len, spec.max_len)
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
    if "{{" in path or "{%" in path:  # the template itself
        return path
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template {path}: {error}") from None


def _eos_ids(config: HfConfig, generation: Mapping[str, Any], tokenizer: Tokenizer, vocab_size: int) -> frozenset[int]:
    """End-of-sequence ids of generation_config.json, else of config.json, and of the tokenizer."""
    found = generation.get("eos_token_id")
    if found is None:
        found = config.get("eos_token_id", None)
    ids = set(tokenizer.eos_ids) | set(found if isinstance(found, list) else [] if found is None else [found])
    return frozenset(token for token in ids if 0 <= token < vocab_size)


def _load_weights(runners: Sequence[Runner], path: pathlib.Path | None, pooling: Pooling | None) -> None:
    started_s = time.monotonic()
    with _open_weights(path, pooling) as checkpoint, tqdm(desc="loading", unit="B", unit_scale=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        for runner in runners:
            bar.reset()
            runner.load(checkpoint, progress)
            runner.allocate()
    log.info("loaded path=%s seconds=%.1f", path, time.monotonic() - started_s)


def _open_weights(path: pathlib.Path | None, pooling: Pooling | None) -> contextlib.AbstractContextManager[Checkpoint | None]:
    if path is None:
        log.warning("the weights are random numbers, and so are the answers: --load-format dummy")
        return contextlib.nullcontext()
    return WithModules(path, pooling.modules) if pooling is not None and pooling.modules else open_checkpoint(path)


def _compile(runners: Sequence[Runner], metrics: Metrics, on_state: Callable[[str], None]) -> None:
    started_s = time.monotonic()
    with tqdm(desc="compiling", unit="program", disable=None) as bar:

        def progress(done: int, total: int, name: str) -> None:
            bar.total = total
            bar.set_postfix_str(name)
            bar.update(done - bar.n)
            on_state(f"compiling {done}/{total}")

        for runner in runners:
            bar.reset()
            runner.compile(progress)
    seconds = time.monotonic() - started_s
    metrics.compile_seconds.set(seconds)
    log.info("compiled programs=%d seconds=%.1f", sum(runner.num_programs for runner in runners), seconds)


def _make_scheduler(config: EngineConfig, runner: Runner, spec: ModelSpec) -> Scheduler:
    limits = runner.limits
    # A vector counts as one more token, which is never computed; what goes into it cannot be found in the cache, but for the last token.
    reuses = spec.pool is None or (spec.is_causal and not spec.pool.needs_all_tokens)
    return Scheduler(
        num_pages=runner.memory.num_pages, page_size=limits.page_size, max_rows=limits.max_rows, max_step_tokens=limits.max_step_tokens,
        max_mixed_tokens=limits.max_mixed_tokens, max_len=limits.max_len + (spec.pool is not None),
        prefix_cache=config.cache.prefix_cache and reuses, whole_prompts=not spec.is_causal,
        max_queue=config.schedule.max_queue, max_queue_tokens=config.schedule.max_queue_tokens,
    )  # fmt: skip
