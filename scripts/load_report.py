"""From the timed answers of a load run to its figures, table and plot."""

from __future__ import annotations

import collections
import importlib
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from load_client import Answer

PLOT_BINS = 60
LATENCIES = ("ttft", "tpot", "itl", "e2e")


def summarize(answers: Sequence[Answer], num_requests: int) -> dict[str, Any]:
    """The figures of a run; latencies, in ms, are those of whole answers, throughput counts every token that came."""
    whole = [answer for answer in answers if answer.end_s and answer.error is None]
    failed = collections.Counter(answer.error for answer in answers if answer.error is not None)
    last_s = max((max(answer.end_s, *answer.event_s[-1:], answer.start_s) for answer in answers), default=0.0)
    duration_s = last_s - min((answer.start_s for answer in answers), default=0.0)
    num_input, num_output = sum(max(answer.num_input, 0) for answer in answers), sum(answer.num_tokens for answer in answers)
    rate = 1 / duration_s if duration_s else 0.0
    return {
        "num_requests": num_requests,
        "completed": len(whole),
        "errors": dict(failed.most_common()),
        "unfinished": num_requests - len(whole) - failed.total(),
        "duration_s": round(duration_s, 3),
        "requests_per_s": round(len(whole) * rate, 3),
        "input_tokens": num_input,
        "output_tokens": num_output,
        "output_tokens_per_s": round(num_output * rate, 2),
        "total_tokens_per_s": round((num_input + num_output) * rate, 2),
        "tokens_counted_by": "usage" if all(answer.num_output >= 0 for answer in whole) else "events",
        "peak_concurrency": peak_concurrency(answers, last_s),
        **{f"{name}_ms": _spread(values) for name, values in _latencies(whole).items()},
    }


def peak_concurrency(answers: Sequence[Answer], last_s: float) -> int:
    """The most requests that were under way at one time."""
    changes = sorted([(answer.end_s or last_s, -1) for answer in answers] + [(answer.start_s, 1) for answer in answers])
    return max(itertools.accumulate(change for _, change in changes), default=0)


def _latencies(whole: Sequence[Answer]) -> dict[str, list[float]]:
    spoken = [answer for answer in whole if answer.event_s]
    longer = [answer for answer in spoken if answer.num_tokens > 1]
    return {
        "ttft": [answer.event_s[0] - answer.start_s for answer in spoken],
        "tpot": [(answer.event_s[-1] - answer.event_s[0]) / (answer.num_tokens - 1) for answer in longer],
        "itl": [after - before for answer in spoken for before, after in itertools.pairwise(answer.event_s)],
        "e2e": [answer.end_s - answer.start_s for answer in whole],
    }


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    ordered = sorted(1e3 * value for value in seconds)
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {"mean": round(sum(ordered) / len(ordered), 3)} | {name: round(percentile(ordered, share), 3) for name, share in shares.items()}


def format_table(figures: dict[str, Any]) -> str:
    """The figures for a reader at a terminal."""
    errors = "".join(f", {count} {kind}" for kind, count in figures["errors"].items())
    lines = [
        (
            f"requests   {figures['completed']} of {figures['num_requests']} complete{errors}, {figures['unfinished']} unfinished; "
            f"{figures['duration_s']:.1f} s, {figures['requests_per_s']:.2f} /s, at most {figures['peak_concurrency']} at a time"
        ),
        (
            f"tokens     {figures['input_tokens']} in, {figures['output_tokens']} out (counted by {figures['tokens_counted_by']}); "
            f"{figures['output_tokens_per_s']:.1f} out /s, {figures['total_tokens_per_s']:.1f} in all /s"
        ),
        f"{'ms':10}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}",
    ]
    for name in LATENCIES:
        spread = figures[f"{name}_ms"]
        cells = [f"{spread[key]:.2f}" for key in ("mean", "p50", "p90", "p99")] if spread else ["-"] * 4
        lines.append(f"{name:10}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def draw_plot(path: pathlib.Path, answers: Sequence[Answer], title: str) -> None:
    """Latency distributions, and tokens a second and requests under way over time.

    Raises: SystemExit if matplotlib is missing.
    """
    pyplot = import_pyplot()
    whole = [answer for answer in answers if answer.end_s and answer.error is None]
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8))
    for axis, (name, values) in zip(axes.flat, _latencies(whole).items(), strict=False):
        ordered = sorted(1e3 * value for value in values)
        axis.plot(ordered, [(rank + 1) / len(ordered) for rank in range(len(ordered))])
        axis.set(title=f"{name} (ms)", ylabel="share of " + ("gaps" if name == "itl" else "requests"), ylim=(0, 1.02), xlim=(0, None))
    start_s = min((answer.start_s for answer in answers), default=0.0)
    times = [when - start_s for answer in answers for when in answer.event_s]
    width_s = max(max(times, default=0.0) / PLOT_BINS, 1e-6)
    counts = collections.Counter(int(when / width_s) for when in times)
    rates, spans = axes.flat[4], axes.flat[5]
    rates.stairs([counts[index] / width_s for index in range(PLOT_BINS)], [index * width_s for index in range(PLOT_BINS + 1)])
    rates.set(title="events with text a second", xlabel="s", ylim=(0, None))
    for row, answer in enumerate(answers):
        span = [answer.start_s - start_s, (answer.end_s or answer.start_s) - start_s]
        spans.plot(span, [row, row], color="C3" if answer.error else "C0")
        if answer.event_s:
            spans.plot(answer.event_s[0] - start_s, row, "k.", markersize=3)
    spans.set(title="requests (dot: first token, red: failed)", xlabel="s", ylabel="request")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def import_pyplot() -> Any:
    """matplotlib.pyplot, drawing to files.

    Raises: SystemExit if matplotlib is missing.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of an ascending sequence lies, interpolated linearly."""
    rank = share * (len(ordered) - 1)
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)
