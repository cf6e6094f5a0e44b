"""The figures an operator sees on /metrics: vLLM's names where the meaning is the same, and what only a compiled engine has.

One `Metrics` per engine, with a registry of its own, so that two engines in one process do not mix.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

# vLLM's buckets, so that its dashboards read the same.
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_TPOT_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_STEP_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_N = (1, 2, 5, 10, 20)
LABELS = ("model_name", "engine")
_CACHE_LABELS = ("block_size", "num_gpu_blocks", "enable_prefix_caching", "cache_dtype")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A counter or gauge at one moment."""

    name: str
    labels: dict[str, str]
    value: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HistogramFigure:
    """A histogram at one moment; buckets hold how many observations were at most so large, by bound."""

    name: str
    labels: dict[str, str]
    count: int
    sum: float
    buckets: dict[str, int]


class CountedHistogram(Collector):
    """A histogram that takes many equal observations at once, as a step of many rows makes them; one thread observes.

    Args:
      buckets: upper bounds, ascending; one to infinity is added.
    """

    def __init__(self, name: str, text: str, buckets: tuple[float, ...], labels: dict[str, str]) -> None:
        self._name, self._text, self._bounds, self._labels = name, text, buckets, labels
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int) -> None:
        """Record `count` observations of `value`."""
        self._counts[bisect.bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterable[Metric]:
        """What Prometheus reads: cumulated counts."""
        bounds = [str(float(bound)) for bound in self._bounds] + ["+Inf"]
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        cumulated = list(itertools.accumulate(self._counts))
        family.add_metric(list(self._labels.values()), list(zip(bounds, cumulated, strict=True)), self._sum)
        yield family


class Metrics:
    """Every metric of one engine, already bound to its labels.

    Args:
      model_name: the name shown to clients, value of the label `model_name`.
    """

    content_type = CONTENT_TYPE_PLAIN_0_0_4  # which every scraper knows

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._make_gauges()
        self._make_counters()
        self._make_histograms()

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def read(self) -> list[Figure | HistogramFigure]:
        """Every metric at this moment, in the order of /metrics."""
        figures: list[Figure | HistogramFigure] = []
        for family in self.registry.collect():
            if family.type != "histogram":
                found = [sample for sample in family.samples if not sample.name.endswith("_created")]
                figures += [Figure(name=sample.name, labels=dict(sample.labels), value=sample.value) for sample in found]
                continue
            parts: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}
            for sample in family.samples:
                labels = {name: value for name, value in sample.labels.items() if name != "le"}
                part = parts.setdefault(tuple(labels.items()), {})
                part[sample.labels.get("le") or sample.name.removeprefix(family.name)] = sample.value
            for labels, part in parts.items():
                part.pop("_created", None)
                count, total = part.pop("_count", 0), part.pop("_sum", 0.0)
                buckets = {bound: int(value) for bound, value in part.items()}
                figures.append(HistogramFigure(name=family.name, labels=dict(labels), count=int(count), sum=total, buckets=buckets))
        return figures

    def _make_gauges(self) -> None:
        self.running = self._gauge("vllm:num_requests_running", "Requests in the running batch.")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Requests waiting for pages or rows.")
        self.cache_usage = self._gauge("vllm:kv_cache_usage_perc", "Share of cache pages in use, 0 to 1.")
        self.pages_total = self._gauge("jaxserve:cache_pages", "Pages in the cache.")
        self._cache_config = Gauge(
            "vllm:cache_config_info", "How the cache is laid out.", (*LABELS, *_CACHE_LABELS), registry=self.registry
        )
        self.compile_seconds = self._gauge("jaxserve:warmup_compile_seconds", "Seconds that compiling every shape took at start.")

    def _make_counters(self) -> None:
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens processed.")
        self.prompt_tokens_cached = self._counter("vllm:prompt_tokens_cached", "Prompt tokens found in the prefix cache.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens sampled.")
        self.preemptions = self._counter("vllm:num_preemptions", "Requests put back to wait because pages ran out.")
        self.prefix_queries = self._counter("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self.prefix_hits = self._counter("vllm:prefix_cache_hits", "Tokens found in the prefix cache.")
        self.compiles = self._counter("jaxserve:compiles", "Programs compiled by XLA; does not move after warm-up.")
        self.failed_steps = self._counter("jaxserve:failed_steps", "Steps that raised; their requests ended with an error.")
        self.step_tokens_real = self._counter("jaxserve:step_tokens_real", "Tokens computed for requests.")
        self.step_tokens_padded = self._counter("jaxserve:step_tokens_padding", "Tokens computed as padding of a bucket.")
        self._success = Counter("vllm:request_success", "Requests finished.", (*LABELS, "finished_reason"), registry=self.registry)
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(**self._labels, finished_reason=reason)  # rates begin at zero

    def _make_histograms(self) -> None:
        self.ttft_s = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", _TTFT_S)
        self.inter_token_s = CountedHistogram("vllm:inter_token_latency_seconds", "Time between tokens.", _TPOT_S, self._labels)
        self.registry.register(self.inter_token_s)
        self.tpot_s = self._histogram("vllm:request_time_per_output_token_seconds", "Mean time per output token of a request.", _TPOT_S)
        self.e2e_s = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", _REQUEST_S)
        self.queue_s = self._histogram("vllm:request_queue_time_seconds", "Arrival to first step.", _REQUEST_S)
        self.inference_s = self._histogram("vllm:request_inference_time_seconds", "First step to last token.", _REQUEST_S)
        self.prefill_s = self._histogram("vllm:request_prefill_time_seconds", "First step to first token.", _REQUEST_S)
        self.decode_s = self._histogram("vllm:request_decode_time_seconds", "First token to last token.", _REQUEST_S)
        self.request_prompt = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.request_generation = self._histogram("vllm:request_generation_tokens", "Sampled tokens of a request.", _TOKENS)
        self.request_max_tokens = self._histogram("vllm:request_params_max_tokens", "max_tokens of a request.", _TOKENS)
        self.request_n = self._histogram("vllm:request_params_n", "n of a request.", _N)
        self.step_tokens = self._histogram("vllm:iteration_tokens_total", "Tokens of a step.", _STEP_TOKENS)
        self.host_gap_s = self._histogram("jaxserve:host_gap_seconds", "Time the device waited for the host between steps.", _STEP_S)
        self._step_s = Histogram(
            "jaxserve:step_seconds", "Dispatch to result of a step, by shape.", (*LABELS, "shape"), registry=self.registry, buckets=_STEP_S
        )

    def finished(self, reason: str) -> None:
        """Count one finished request by its finish reason."""
        self._success.labels(**self._labels, finished_reason=reason).inc()

    def cache_config(self, *, page_size: int, num_pages: int, prefix_cache: bool, dtype: str) -> None:
        """Show the cache as autoscalers and routers for vLLM look for it: a gauge that is 1, with labels."""
        values = (str(page_size), str(num_pages), str(prefix_cache), dtype)
        self._cache_config.labels(**self._labels, **dict(zip(_CACHE_LABELS, values, strict=True))).set(1)

    def step_seconds(self, shape: str, seconds: float) -> None:
        """Record the duration of one step of the named shape, in seconds."""
        self._step_s.labels(**self._labels, shape=shape).observe(seconds)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, LABELS, registry=self.registry).labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, LABELS, registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, LABELS, registry=self.registry, buckets=buckets).labels(**self._labels)
