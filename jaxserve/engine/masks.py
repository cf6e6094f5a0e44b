"""What constrained requests may sample next: masks computed in threads, while the device works and other requests go on.

    add, advance --> computed in a thread --> settle: ready --> of(rows): sent along with the step that samples

A request waits for its mask alone: the scheduler passes over it, so that a constraint that is slow to follow delays nobody else.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import math
import os
import time
from collections.abc import Iterable, Sequence

import numpy as np

from jaxserve.request import Matcher, Request, SamplingParams, TokenLogprobs
from jaxserve.scheduler.schedule import Row

log = logging.getLogger(__name__)

PATIENCE_S = 0.004  # a mask takes 0.1 ms; steps wait so long for one, so that constrained requests stay in step with each other
IDLE_S = 0.05  # longest wait when there is nothing else to do
QUICK_S = 0.001  # masks that took less are computed together
SLOW_S = 0.02  # an honest mask never takes so long
MAX_SLOW_S = 2.0  # longest time that an answer's masks may take in all, above SLOW_S each
TIMEOUT_S = 10.0
TOO_SLOW = "the structured output became too complex to follow"


def certain_logprobs(token: int, params: SamplingParams) -> TokenLogprobs:
    """The log-probabilities where a mask leaves one token alone, as a step would show them."""
    if params.logprob_token_ids:
        others = params.logprob_token_ids
    else:
        num_top = params.logprobs or 0
        others = [token, *(other for other in range(num_top) if other != token)][:num_top]
    return TokenLogprobs(
        token_id=token, logprob=0.0, rank=1, top=tuple((other, 0.0 if other == token else -math.inf) for other in others)
    )  # fmt: skip


@dataclasses.dataclass(slots=True, eq=False)
class _Guide:
    """A constrained request, its way through the constraint, and the mask of its next token or why there is none."""

    request: Request
    matcher: Matcher
    mask: np.ndarray | None = None
    problem: str | None = None
    job: concurrent.futures.Future[None] | None = None
    asked_s: float = 0.0
    took_s: float = 0.0
    slow_s: float = 0.0


class Masks:
    """The masks of all constrained requests of an engine.

    Args:
      eos_ids: end-of-sequence tokens, which ignore_eos and min_tokens leave out as long as the answer can go on.
    """

    def __init__(self, eos_ids: frozenset[int], *, threads: int | None = None) -> None:
        self._eos_ids = eos_ids
        self._num_threads = threads or min(4, os.cpu_count() or 1)
        self._pool = concurrent.futures.ThreadPoolExecutor(self._num_threads, thread_name_prefix="masks")
        self._guides: dict[str, _Guide] = {}
        self._computing: list[_Guide] = []

    @property
    def busy(self) -> bool:
        """Whether any request waits for its mask."""
        return bool(self._computing)

    def add(self, request: Request) -> None:
        """Take in a new request; those without a constraint are none of our business."""
        if request.constraint is not None:
            self._guides[request.id] = guide = _Guide(request, request.constraint.begin())
            self._compute([guide])

    def drop(self, request_id: str) -> None:
        """Forget a request that has ended."""
        guide = self._guides.pop(request_id, None)
        if guide is not None and guide.job is not None:
            self._computing.remove(guide)

    def consume(self, request: Request, tokens: Sequence[int]) -> bool:
        """Follow an answer; whether it is complete."""
        guide = self._guides.get(request.id)
        if guide is None:
            return False
        for token in tokens:
            guide.matcher.consume(token)
        return guide.matcher.finished

    def advance(self, requests: Iterable[Request]) -> None:
        """Begin to compute the next masks of requests that have gone on, and have not ended."""
        guides = [guide for request in requests if (guide := self._guides.get(request.id)) is not None]
        if guides:
            self._compute(guides)

    def of(self, rows: Iterable[Row]) -> tuple[list[int], list[np.ndarray]]:
        """Slots and masks of the rows that sample under a constraint."""
        slots: list[int] = []
        masks: list[np.ndarray] = []
        if self._guides:
            for row in rows:
                if row.samples and row.request.constraint is not None:
                    mask = self._guides[row.request.id].mask
                    assert mask is not None, f"request {row.request.id} samples without its mask"
                    slots.append(row.request.slot)
                    masks.append(mask)
        return slots, masks

    def settle(self, *, idle: bool) -> list[tuple[Request, str]]:
        """Let the requests go on whose masks are there; waits a little for those just begun.

        Args:
          idle: nothing else is to be done, so wait for the first of them.
        Returns: the requests that cannot go on, and why.
        """
        if not self._computing:
            return []
        self._wait(idle)
        now, failed, left = time.monotonic(), [], []
        for guide in self._computing:
            problem = guide.problem
            if guide.mask is None and problem is None:
                if now - guide.asked_s < TIMEOUT_S:
                    left.append(guide)
                    continue
                problem = TOO_SLOW
            guide.job = None
            if problem is None:
                guide.request.awaits_mask = False
            else:
                failed.append((guide.request, problem))
        self._computing = left
        return failed

    def _wait(self, idle: bool) -> None:
        now = time.monotonic()
        jobs = {guide.job: guide.asked_s for guide in self._computing if guide.job is not None and not guide.job.done()}
        fresh = [job for job, asked_s in jobs.items() if now - asked_s < PATIENCE_S]
        if fresh:
            concurrent.futures.wait(fresh, max(jobs[job] for job in fresh) + PATIENCE_S - now)
        elif jobs and idle and len(jobs) == len(self._computing):
            concurrent.futures.wait(jobs, IDLE_S, concurrent.futures.FIRST_COMPLETED)

    def _compute(self, guides: list[_Guide]) -> None:
        """Quick ones together, in as many jobs as there are threads; each of the others in a job of its own."""
        now = time.monotonic()
        quick = [guide for guide in guides if guide.took_s < QUICK_S]
        size = -(-len(quick) // self._num_threads)
        groups = [quick[i : i + size] for i in range(0, len(quick), size)] if quick else []
        groups += [[guide] for guide in guides if guide.took_s >= QUICK_S]
        for guide in guides:
            guide.mask, guide.problem, guide.asked_s = None, None, now
            guide.request.awaits_mask = True
        for group in groups:
            job = self._pool.submit(self._fill, group)
            for guide in group:
                guide.job = job
        self._computing += guides

    def _fill(self, guides: list[_Guide]) -> None:
        for guide in guides:
            started_s = time.perf_counter()
            try:
                mask = guide.matcher.fill(self._forbidden(guide.request))
            except ValueError as error:
                guide.problem = str(error)
            except Exception:
                log.exception("a mask could not be computed: request=%s", guide.request.id)
                guide.problem = TOO_SLOW
            else:
                guide.took_s = time.perf_counter() - started_s
                guide.slow_s += max(0.0, guide.took_s - SLOW_S)
                if guide.slow_s > MAX_SLOW_S:
                    guide.problem = TOO_SLOW
                else:
                    guide.mask = mask

    def _forbidden(self, request: Request) -> tuple[int, ...]:
        """Tokens that would end the answer too early."""
        if len(request.output_ids) < request.params.min_tokens:
            return tuple(self._eos_ids | request.stop_ids)
        # A grammar says where an answer may end; where there is none, one that ends is gone on with.
        return tuple(self._eos_ids) if request.params.ignore_eos and request.params.structured_outputs is not None else ()
