"""Metrics as Prometheus reads them."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from jaxserve.metrics import Figure, HistogramFigure, Metrics


def test_counted_histogram_reads_like_any_other() -> None:
    metrics = Metrics("m")
    metrics.inter_token_s.observe(0.02, 3)
    metrics.inter_token_s.observe(100.0, 1)
    families = {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}
    samples = families["vllm:inter_token_latency_seconds"].samples
    counts = {sample.labels["le"]: sample.value for sample in samples if sample.name.endswith("_bucket")}
    assert (counts["0.01"], counts["0.025"], counts["80.0"], counts["+Inf"]) == (0, 3, 3, 4)
    assert [sample.value for sample in samples if sample.name.endswith("_count")] == [4]
    assert all(sample.labels["model_name"] == "m" for sample in samples)


def test_counters_end_in_total_and_carry_the_engine() -> None:
    metrics = Metrics("m")
    metrics.finished("stop")
    text = metrics.render().decode()
    assert 'vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 1.0' in text
    assert 'vllm:request_success_total{engine="0",finished_reason="abort",model_name="m"} 0.0' in text
    assert 'vllm:generation_tokens_total{engine="0",model_name="m"} 0.0' in text


def test_cache_is_shown_as_routers_for_vllm_look_for_it() -> None:
    metrics = Metrics("m")
    metrics.cache_config(page_size=16, num_pages=70, prefix_cache=True, dtype="auto")
    labels = {"block_size": "16", "num_gpu_blocks": "70", "enable_prefix_caching": "True", "cache_dtype": "auto"}
    found = next(figure for figure in metrics.read() if figure.name == "vllm:cache_config_info")
    assert isinstance(found, Figure)
    assert (found.value, found.labels) == (1, {"model_name": "m", "engine": "0", **labels})


def test_figures_are_what_prometheus_reads() -> None:
    metrics = Metrics("m")
    metrics.finished("stop")
    metrics.running.set(3)
    metrics.inter_token_s.observe(0.02, 3)
    metrics.step_seconds("decode 4", 0.03)
    metrics.step_seconds("prefill 32", 9.0)
    figures = metrics.read()
    plain = {(figure.name, figure.labels.get("finished_reason")): figure.value for figure in figures if isinstance(figure, Figure)}
    assert plain[("vllm:request_success_total", "stop")] == 1
    assert plain[("vllm:num_requests_running", None)] == 3
    histograms = {(figure.name, figure.labels.get("shape")): figure for figure in figures if isinstance(figure, HistogramFigure)}
    between = histograms[("vllm:inter_token_latency_seconds", None)]
    assert (between.count, between.buckets["0.01"], between.buckets["0.025"], between.buckets["+Inf"]) == (3, 0, 3, 3)
    assert between.sum == 0.06
    assert [histograms[("jaxserve:step_seconds", shape)].count for shape in ("decode 4", "prefill 32")] == [1, 1]
    shown = {sample.name for family in text_string_to_metric_families(metrics.render().decode()) for sample in family.samples}
    assert {figure.name for figure in figures if isinstance(figure, Figure)} <= shown
