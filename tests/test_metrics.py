"""Metrics as Prometheus reads them."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from jaxserve.metrics import Metrics


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
    assert 'vllm:generation_tokens_total{engine="0",model_name="m"} 0.0' in text
