"""The configuration of an engine and its server: one frozen tree, from a TOML file and the command line.

1. Every field has a type, a default, its unit in its name and one line of help; flags and TOML keys come from it.
2. Precedence: command line, then the TOML file of --config, then the default. Nobody writes to a config.
3. The environment is read here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from jaxserve.errors import ConfigError
from jaxserve.vllm_options import FOREIGN, RENAMED

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model to serve, and at which precision."""

    model: str = _option(DEFAULT_MODEL, "hub id, directory of safetensors, .gguf file or Orbax directory")
    revision: str | None = _option(None, "branch, tag or commit of the model on the hub")
    load_format: Literal["auto", "hf", "safetensors", "pt", "gguf", "dummy"] = _option(
        "auto", "dummy: random weights, without reading any, for measuring; with all others, what the model's files are"
    )
    tokenizer: str | None = _option(None, "hub id or directory of the tokenizer; default: the model's own")
    chat_template: str | None = _option(None, "Jinja chat template, or a file with one; default: the model's own, else a plain one")
    default_chat_template_kwargs: str | None = _option(
        None, 'JSON object of variables for the chat template; requests outrank them, e.g. {"enable_thinking": false}'
    )
    ignore_config_keys: bool = _option(False, "load a model whose config.json has keys that jaxserve does not know")
    generation_config: str = _option(
        "auto", "defaults of sampling parameters; auto: the model's generation_config.json; vllm: none; else a directory with such a file"
    )
    override_generation_config: str | None = _option(None, 'JSON object of defaults that outrank those, e.g. {"temperature": 0.6}')
    dtype: Literal["auto", "float32", "bfloat16"] = _option(
        "auto", "weights and activations; auto: float32 on CPU, bfloat16 on TPU and GPU"
    )
    max_len: int | None = _option(None, "most tokens of prompt and answer together; default: what the model was trained for")
    seed: int = _option(0, "seed of requests that bring none is drawn from this")
    runner: Literal["auto", "generate", "pooling"] = _option(
        "auto", "write text, or turn texts into vectors; auto: as the model's files say"
    )
    convert: Literal["auto", "none", "embed", "classify"] = _option(
        "auto", "what to make of a text model for --runner pooling: embeddings of its last token, or the labels of its classifier"
    )
    matryoshka: bool = _option(False, "let requests cut embeddings to any `dimensions`, though the config does not say that it may be done")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The paged cache of keys and values."""

    page_size: int | None = _option(None, "tokens a page, the unit in which prompts are reused; default: 128 on CPU, 16 elsewhere")
    num_pages: int | None = _option(None, "pages in the cache; default: as many as memory allows")
    cache_bytes: int | None = _option(None, "bytes for the cache; default: from memory_utilization")
    memory_utilization: float = _option(0.9, "share of the device's memory to use in all (CPU: of what is free, at most 4 GiB of cache)")
    cache_dtype: Literal["auto", "float32", "bfloat16"] = _option("auto", "type of cached keys and values; auto: dtype")
    prefix_cache: bool = _option(True, "keep full pages of past prompts and reuse them for prompts that begin alike")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """How requests share the steps."""

    max_rows: int | None = _option(None, "most requests in one step; default: 64 on CPU, 256 elsewhere")
    max_step_tokens: int | None = _option(None, "most tokens in one step; longer prompts are cut; default: 512 on CPU, 2048 elsewhere")
    performance_mode: Literal["balanced", "throughput"] = _option(
        "balanced", "balanced: prompts are cut so that running answers go on; throughput: whatever ends all of the work soonest"
    )
    max_mixed_tokens: int | None = _option(
        None,
        "most tokens in a step while answers are being written, bounds the time between tokens; 0: prompts first, in steps of their own; "
        "default: a quarter of max_step_tokens; for throughput 0 on CPU, unlimited elsewhere",
    )
    max_queue: int = _option(4096, "most requests waiting; beyond it clients get 429")
    max_queue_tokens: int = _option(8_000_000, "most prompt tokens waiting; beyond it clients get 429")
    overlap: bool = _option(True, "prepare the next step while the device works on this one")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CompileConfig:
    """Which shapes are compiled, and how."""

    decode_rows: tuple[int, ...] | None = _option(None, "row counts to compile decode steps for, e.g. 1,4,16; default: powers of two")
    prefill_tokens: tuple[int, ...] | None = _option(None, "token counts to compile mixed steps for; default: spaced up to max_step_tokens")
    layer_loop: Literal["auto", "scan", "unroll"] = _option(
        "auto", "layers as a loop or written out; auto: scan on TPU, unroll on GPU and CPU"
    )
    compile_threads: int | None = _option(None, "shapes compiled at a time; default: one per core, at most 8")
    cache_dir: str | None = _option(None, "downloads and compiled programs; default: $JAXSERVE_CACHE or ~/.cache/jaxserve")


def compiler_environment() -> dict[str, str]:
    """The variables that jax and its compilers read."""
    return {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_", "LIBTPU_"))}


MESH_AXES = ("data", "expert", "tensor")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over devices; docs/parallelism.md."""

    mesh: str | None = _option(
        None, "devices along each axis, e.g. data=2,tensor=4; default: all on tensor up to the number of KV heads, the rest on data"
    )
    tensor_parallel_size: int | None = _option(None, "short for --mesh tensor=N, as vLLM has it")
    data_parallel_size: int | None = _option(None, "short for --mesh data=N; with --tensor-parallel-size, for both")
    coordinator: str | None = _option(
        None, "HOST:PORT of process 0 when several serve together; auto: jax finds them; default: auto in Slurm and on GKE's TPU slices"
    )
    num_processes: int | None = _option(None, "processes that serve together, with --coordinator HOST:PORT")
    process_id: int | None = _option(None, "number of this process, with --coordinator HOST:PORT; process 0 leads and has the HTTP server")

    @property
    def is_multihost(self) -> bool:
        """Whether other processes take part."""
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        workers = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES", ""))  # on GKE, as jax reads them
        return self.coordinator is not None or (tasks.isdecimal() and int(tasks) > 1) or "," in workers

    @property
    def axes(self) -> dict[str, int]:
        """Devices along each axis that is given. Raises: ConfigError."""
        sizes = {"data": self.data_parallel_size, "tensor": self.tensor_parallel_size}
        axes = {name: size for name, size in sizes.items() if size is not None}
        if self.mesh is not None and axes:
            raise ConfigError("--mesh says it all: leave out --tensor-parallel-size and --data-parallel-size")
        for part in (self.mesh or "").split(",") if self.mesh is not None else ():
            name, _, size = part.partition("=")
            if name not in MESH_AXES or not size.isdecimal() or name in axes:
                raise ConfigError(
                    f"--mesh={self.mesh}: {part!r} is not one of {', '.join(MESH_AXES)} with a size, each once, as in tensor=4"
                )
            axes[name] = int(size)
        if any(size < 1 for size in axes.values()):
            raise ConfigError(f"a mesh has at least one device along each axis, not {axes}")
        return axes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The HTTP front end."""

    host: str = _option("0.0.0.0", "address to listen on")
    port: int = _option(8000, "port to listen on; 0 takes a free one")
    api_key: tuple[str, ...] = _option(
        (), "keys that clients must send, comma-separated; default: $JAXSERVE_API_KEY or $VLLM_API_KEY, else none"
    )
    served_model_name: tuple[str, ...] = _option((), "names that clients may use, the first is shown; default: --model")
    # jaxserve/text/tools.py and reasoning.py hold the formats.
    tool_call_parser: Literal[
        "auto", "none", "deepseek_v3", "functiongemma", "gemma4", "glm45", "granite", "hermes", "internlm", "kimi_k2", "llama3_json",
        "llama4_pythonic", "mistral", "openai", "phi4_mini_json", "pythonic", "qwen3_coder", "qwen3_xml", "xlam",
    ] = _option("auto", "format of the model's tool calls; auto: as its chat template tells")  # fmt: skip
    reasoning_parser: Literal[
        "auto", "none", "deepseek_r1", "gemma", "glm45", "gpt-oss", "granite", "mistral", "openai_gptoss", "qwen3"
    ] = _option("auto", "format of the model's reasoning; auto: as its chat template tells")  # fmt: skip
    enable_auto_tool_choice: bool = _option(True, "let the model decide whether to call a tool; off: such requests get 400")
    enable_force_include_usage: bool = _option(False, "streams of chats and completions tell usage in every chunk, asked for or not")
    cors_origins: tuple[str, ...] = _option((), "origins allowed by CORS, comma-separated; default: CORS is off")
    root_path: str | None = _option(None, "prefix that a proxy leaves on paths, such as /llm; taken off them")
    ssl_keyfile: str | None = _option(None, "PEM file of the private key; with --ssl-certfile the server speaks HTTPS")
    ssl_certfile: str | None = _option(None, "PEM file of the server's certificate and those that it rests on")
    ssl_ca_certs: str | None = _option(None, "PEM file of authorities; clients must then show a certificate that one of them signed")
    max_body_bytes: int = _option(8 << 20, "largest request body; beyond it clients get 413")
    read_timeout_s: float = _option(30.0, "longest wait for a client to send its whole request")
    write_timeout_s: float = _option(120.0, "longest wait for a client to take a piece of a streamed answer; then the stream is given up")
    drain_timeout_s: float = _option(30.0, "longest wait for running answers after SIGTERM")
    stall_timeout_s: float = _option(120.0, "a step that takes longer makes /health answer 503")
    metrics_auth: bool = _option(False, "ask for the API key on /metrics too")
    enable_tokenizer_info_endpoint: bool = _option(False, "answer /tokenizer_info: special tokens and chat template")
    enable_admin_endpoints: bool = _option(False, "answer /pause, /resume, /abort_requests, /reset_prefix_cache, /start_profile and others")
    admin_api_key: tuple[str, ...] = _option((), "keys for them, comma-separated; default: $JAXSERVE_ADMIN_API_KEY")
    profile_dir: str | None = _option(None, "where /start_profile writes traces; default: profiles, beside the compiled programs")
    log_level: Literal["debug", "info", "warning", "error"] = _option("info", "least severe messages to log")
    access_log: bool = _option(False, "log a line per HTTP request")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything that decides how an engine behaves; the sections are the tables of the TOML file."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    compile: CompileConfig = dataclasses.field(default_factory=CompileConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)

    def __post_init__(self) -> None:
        problems = [*_problems_of_model(self), *_problems_of_server(self), *_problems_of_mesh(self.parallel)]
        if problems:
            raise ConfigError("\n".join(problems))

    @property
    def cache_path(self) -> pathlib.Path:
        """Directory for downloads and compiled programs."""
        chosen = self.compile.cache_dir or os.environ.get("JAXSERVE_CACHE") or "~/.cache/jaxserve"
        return pathlib.Path(chosen).expanduser()

    @property
    def api_keys(self) -> tuple[str, ...]:
        """Keys that clients may present; empty when none is needed."""
        key = os.environ.get("JAXSERVE_API_KEY") or os.environ.get("VLLM_API_KEY")
        return self.server.api_key or ((key,) if key else ())

    @property
    def admin_keys(self) -> tuple[str, ...]:
        """Keys for the admin endpoints; empty when none is needed."""
        key = os.environ.get("JAXSERVE_ADMIN_API_KEY")
        return self.server.admin_api_key or ((key,) if key else ())

    @property
    def profile_path(self) -> pathlib.Path:
        """Directory for traces."""
        chosen = self.server.profile_dir
        return self.cache_path / "profiles" if chosen is None else pathlib.Path(chosen).expanduser()

    @property
    def served_names(self) -> tuple[str, ...]:
        """Model names that clients may use, the first is the one shown."""
        return self.server.served_model_name or (self.model.model,)


def _problems_of_model(config: EngineConfig) -> list[str]:
    checks = [
        (config.model.max_len is None or config.model.max_len >= 1, f"--max-len={config.model.max_len} must be at least 1"),
        (
            config.cache.page_size is None or 1 <= config.cache.page_size <= 1024,
            f"--page-size={config.cache.page_size} must be in [1, 1024]",
        ),
        (config.cache.num_pages is None or config.cache.num_pages >= 2, f"--num-pages={config.cache.num_pages} must be at least 2"),
        (0 < config.cache.memory_utilization <= 1, f"--memory-utilization={config.cache.memory_utilization} must be in (0, 1]"),
        (config.schedule.max_rows is None or 1 <= config.schedule.max_rows <= 4096, "--max-rows must be in [1, 4096]"),
        (config.schedule.max_step_tokens is None or config.schedule.max_step_tokens >= 1, "--max-step-tokens must be at least 1"),
        (config.schedule.max_mixed_tokens is None or config.schedule.max_mixed_tokens >= 0, "--max-mixed-tokens must not be negative"),
        (config.schedule.max_queue >= 1, "--max-queue must be at least 1"),
        (all(n >= 1 for n in config.compile.decode_rows or ()), "--decode-rows must be positive"),
        (all(n >= 1 for n in config.compile.prefill_tokens or ()), "--prefill-tokens must be positive"),
        (config.compile.compile_threads is None or config.compile.compile_threads >= 1, "--compile-threads must be at least 1"),
    ]
    return [problem for holds, problem in checks if not holds]


def _problems_of_mesh(parallel: ParallelConfig) -> list[str]:
    explicit = parallel.coordinator not in (None, "auto")
    count, number = parallel.num_processes, parallel.process_id
    problems: list[str] = []
    if explicit and (count is None or number is None or not 0 <= number < count):
        problems.append("--coordinator HOST:PORT needs --num-processes and a --process-id below it")
    if explicit and not (parallel.coordinator or "").rpartition(":")[2].isdecimal():
        problems.append(f"--coordinator={parallel.coordinator} must be auto, or HOST:PORT of process 0")
    if not explicit and (count, number) != (None, None):
        problems.append("--num-processes and --process-id go with --coordinator HOST:PORT")
    try:
        _ = parallel.axes
    except ConfigError as error:
        problems.append(str(error))
    return problems


def _problems_of_server(config: EngineConfig) -> list[str]:
    server = config.server
    checks = [
        (0 <= server.port <= 65535, f"--port={server.port} must be in [0, 65535]"),
        ((server.ssl_keyfile is None) == (server.ssl_certfile is None), "--ssl-keyfile and --ssl-certfile go together"),
        (server.ssl_ca_certs is None or server.ssl_certfile is not None, "--ssl-ca-certs needs --ssl-keyfile and --ssl-certfile"),
        (server.root_path is None or server.root_path.startswith("/"), f"--root-path={server.root_path} must begin with a slash"),
        (server.max_body_bytes >= 1024, "--max-body-bytes must be at least 1024"),
        (server.read_timeout_s > 0, "--read-timeout-s must be positive"),
        (server.write_timeout_s > 0, "--write-timeout-s must be positive"),
        (server.drain_timeout_s >= 0, "--drain-timeout-s must not be negative"),
        (server.stall_timeout_s > 0, "--stall-timeout-s must be positive"),
        (
            not server.enable_admin_endpoints or not config.api_keys or bool(config.admin_keys),
            "--enable-admin-endpoints beside API keys needs a key of its own: --admin-api-key",
        ),
    ]
    return [problem for holds, problem in checks if not holds]


def make_config(values: Mapping[str, Any]) -> EngineConfig:
    """A config from flat field names, e.g. {"model": "x", "max_len": 512}, None being the default; vLLM's names mean the same.

    Raises: ConfigError for unknown names, and for what vLLM can do and jaxserve cannot.
    """
    owners = {field.name: section for section, kind in sections() for field in dataclasses.fields(kind)}
    given = {name: value for name, value in values.items() if value is not None}
    check_foreign({name: given.pop(name) for name in FOREIGN if name in given})
    unknown = sorted(set(given) - set(owners) - set(RENAMED))
    if unknown:
        raise ConfigError(f"unknown options: {', '.join(unknown)}; known: {', '.join(sorted(owners))}")
    nested: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        own = RENAMED.get(name, name)
        if own != name and own in given:
            raise ConfigError(f"{name} is vLLM's name of {own}: give one of them")
        nested.setdefault(owners[own], {})[own] = json.dumps(value) if isinstance(value, Mapping) else value
    return from_tables(nested, "options")


def check_foreign(given: Mapping[str, Any]) -> None:
    """Refuse options of vLLM that ask for what cannot be had. Raises: ConfigError naming them all."""
    problems = [problem for name, value in given.items() if (problem := FOREIGN[name].problem(name, value)) is not None]
    if problems:
        raise ConfigError("\n".join(problems))


def read_toml(path: str | pathlib.Path) -> dict[str, dict[str, Any]]:
    """The tables of a TOML file; unknown tables or keys and ill-typed values raise ConfigError naming them."""
    try:
        with open(path, "rb") as file:
            tables = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    from_tables(tables, str(path))
    return tables


def sections() -> list[tuple[str, type]]:
    """Name and class of each table of the configuration."""
    hints = typing.get_type_hints(EngineConfig)
    return [(field.name, hints[field.name]) for field in dataclasses.fields(EngineConfig)]


def from_tables(nested: Mapping[str, Any], source: str) -> EngineConfig:
    """A config from tables of values. Raises: ConfigError naming `source` and every value that cannot work."""
    problems: list[str] = []
    made: dict[str, Any] = {}
    kinds = dict(sections())
    for section, values in nested.items():
        if section not in kinds or not isinstance(values, Mapping):
            problems.append(f"{source}: no table [{section}]; there are {', '.join(kinds)}")
            continue
        hints = typing.get_type_hints(kinds[section])
        checked: dict[str, Any] = {}
        for name, value in cast(Mapping[str, Any], values).items():
            if name not in hints:
                problems.append(f"{source}: [{section}] has no option {name}; it has {', '.join(hints)}")
            elif not _fits(value, hints[name]):
                problems.append(f"{source}: {section}.{name}={value!r} is not {_describe(hints[name])}")
            else:
                checked[name] = _coerce(value, hints[name])
        if not problems:
            made[section] = kinds[section](**checked)
    if problems:
        raise ConfigError("\n".join(problems))
    return EngineConfig(**made)


def without_none(hint: Any) -> Any:
    """X of the type X | None, else the type itself."""
    if isinstance(hint, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    return hint


def _fits(value: Any, hint: Any) -> bool:
    if value is None:
        return isinstance(hint, types.UnionType)
    inner = without_none(hint)
    if typing.get_origin(inner) is Literal:
        return value in typing.get_args(inner)
    if typing.get_origin(inner) is tuple:
        item = typing.get_args(inner)[0]
        return isinstance(value, item) or (
            isinstance(value, list | tuple) and all(_fits(part, item) for part in cast(Sequence[Any], value))
        )
    if inner is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is inner


def _coerce(value: Any, hint: Any) -> Any:
    inner = without_none(hint)
    if value is not None and typing.get_origin(inner) is tuple:
        return (value,) if isinstance(value, str | int) else tuple(value)
    return float(value) if inner is float and value is not None else value


def _describe(hint: Any) -> str:
    inner = without_none(hint)
    if typing.get_origin(inner) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(inner)))
    if typing.get_origin(inner) is tuple:
        return f"a list of {typing.get_args(inner)[0].__name__}"
    return f"of type {inner.__name__}"
