"""The scheduler: gives each step's tokens, rows and pages to requests, and takes in what the steps sampled.

There is no prefill phase and no decode phase: a request lacks num_tokens - num_computed tokens, and a step gives it some of them.

1. schedule: first every request that lacks just its next token, then the running ones that lack more, then those that wait.
2. The step runs; the next one may be scheduled meanwhile.
3. update: sampled tokens are appended, full pages indexed, requests finished.

Pages are handed out again at once, even while a dispatched step still writes to them: the device runs steps in order, so their next owner
writes a position before anybody reads it. What others may find through the index are only full pages of known tokens, computed by
collected steps.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence

from jaxserve.errors import QueueFullError, UserError
from jaxserve.request import FinishReason, Request
from jaxserve.scheduler.pages import PagePool
from jaxserve.scheduler.prefix import PrefixIndex
from jaxserve.scheduler.queue import Entry, Queue, move
from jaxserve.scheduler.schedule import Plan, Row, Schedule

RETRY_AFTER_S = 1.0
_NEVER = sys.maxsize


class Scheduler:
    """Continuous batching over one page pool; not thread-safe.

    Args:
      num_pages, page_size: pages of the cache, the null page included, and tokens of a page.
      max_rows: requests that run at a time, and number of slots.
      max_step_tokens: tokens of a step.
      max_mixed_tokens: tokens of a step in which an answer is continued; bounds the time between an answer's tokens. 0: prompts go first,
        in steps of their own, and answers go on when no prompt can.
      max_len: tokens of prompt and output together.
      prefix_cache: find full pages of earlier requests that begin alike.
      whole_prompts: a prompt is computed in one step; the caller sees to it that none exceeds max_step_tokens.
      max_queue, max_queue_tokens: waiting requests, and their prompt tokens, beyond which add refuses.
      secret: keys the prefix cache; None draws one.
    """

    def __init__(
        self, *, num_pages: int, page_size: int, max_rows: int, max_step_tokens: int, max_mixed_tokens: int, max_len: int,
        prefix_cache: bool, max_queue: int, max_queue_tokens: int, secret: bytes | None = None, whole_prompts: bool = False,
    ) -> None:  # fmt: skip
        assert min(page_size, max_rows, max_step_tokens, max_len) >= 1 and max_mixed_tokens >= 0, "sizes must be positive"
        self._page_size, self._max_len, self._prefix_cache = page_size, max_len, prefix_cache
        self._max_step_tokens, self._max_mixed_tokens = max_step_tokens, max_mixed_tokens
        self._max_queue, self._max_queue_tokens, self._whole_prompts = max_queue, max_queue_tokens, whole_prompts
        self._index = PrefixIndex(page_size, secrets.token_bytes(32) if secret is None else secret)
        self._pool = PagePool(num_pages, self._index.remove)
        # Never more running requests than a step has tokens: each of them gets its next token in every step.
        self._num_slots = min(max_rows, max_step_tokens)
        self._slots = list(range(self._num_slots - 1, -1, -1))
        self._entries: dict[str, Entry] = {}
        self._fresh, self._preempted, self._prefilling, self._decoding = Queue(), Queue(), Queue(), Queue()
        self._num_added = 0
        self.num_pages = num_pages
        self.num_waiting_tokens = 0
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot, preempted ones included."""
        return len(self._fresh) + len(self._preempted)

    @property
    def num_free_pages(self) -> int:
        """Pages that nobody holds; those kept for the prefix cache count as free."""
        return self._pool.num_free

    @property
    def usage(self) -> float:
        """Share of the pages that are held, 0 to 1."""
        return 1 - self._pool.num_free / self._pool.capacity

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._entries)

    def add(self, request: Request) -> None:
        """Take in a request.

        Raises: UserError if its prompt can never be served; QueueFullError if too many wait.
        """
        prompt_len, max_tokens = len(request.prompt_ids), request.params.max_tokens
        assert request.status == "waiting", f"{request.status=}: request {request.id} has been added before"
        assert request.id not in self._entries, f"two requests have the id {request.id}"
        assert max_tokens is not None, f"request {request.id}: max_tokens is not settled"
        assert min(max_tokens, prompt_len) >= 1, f"{max_tokens=} {prompt_len=}"
        self._check_prompt(prompt_len)
        # A queue that holds nothing takes any prompt, or one above the limit would be told to come again for ever.
        too_long = self.num_waiting > 0 and self.num_waiting_tokens + prompt_len > self._max_queue_tokens
        if self.num_waiting >= self._max_queue or too_long:
            raise QueueFullError(RETRY_AFTER_S)
        # The last token sampled is never computed, so a full pool still gives one more. An answer that meets this ceiling ends with
        # "length", like one that meets max_len, which update can tell without trying.
        limit = min(prompt_len + max_tokens, self._max_len, self._pool.capacity * self._page_size + 1)
        self._num_added += 1
        entry = Entry(
            request=request, rank=(request.priority, request.arrival_s, self._num_added), max_output=limit - prompt_len,
            chain=self._index.chain(request), queue=self._fresh,
        )  # fmt: skip
        self._entries[request.id] = entry
        self._fresh.insert(entry)
        self.num_waiting_tokens += prompt_len

    def schedule(self) -> Schedule:
        """The next step; without rows if no request can be advanced before a step in flight is collected.

        The rows' tokens count as computed and in flight from here on, so each schedule that has rows must reach update() or fail().
        """
        plan = Plan()
        if self._max_mixed_tokens:
            self._plan_decodes(plan)
        budget = self._max_step_tokens
        if plan.rows:  # answers go on, be they more than the mixed budget; nothing comes on top of them then
            budget = min(budget, self._max_mixed_tokens)
        self._plan_chunks(plan, budget)
        if not plan.preempted:
            self._plan_admissions(plan, budget)
        if not (plan.rows or self._max_mixed_tokens):
            self._plan_decodes(plan)
        return Schedule(rows=tuple(plan.rows), preempted=tuple(plan.preempted), num_tokens=plan.num_tokens)

    def update(self, schedule: Schedule, tokens: Sequence[Sequence[int]]) -> list[tuple[Row, tuple[int, ...]]]:
        """Take in what a step sampled; see the finish_reason of each request that gained tokens.

        Args:
          tokens: one sequence per row of the schedule, empty for a row that did not sample.
        Returns: the rows that gained tokens and which; rows of requests that have finished meanwhile gain nothing.
        """
        entries = self._entries
        gained: list[tuple[Row, tuple[int, ...]]] = []
        for row, ids in zip(schedule.rows, tokens, strict=True):
            request = row.request
            entry = entries.get(request.id)
            if entry is None:
                continue
            if row.start + row.count >= entry.index_at:
                self._index_pages(entry, row.start + row.count)
            if not row.samples:
                entry.chunks_in_flight -= 1
                continue
            assert ids, f"the row of request {request.id} samples but has no token"
            request.num_in_flight -= 1
            output_ids = request.output_ids
            for i, token in enumerate(ids, 1):
                output_ids.append(token)
                if (token in request.stop_ids or len(output_ids) >= entry.max_output) and self._finish_at(entry, token):
                    ids = ids[:i]
                    break
            gained.append((row, tuple(ids)))
        return gained

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End a request wherever it is and free its pages and slot; nothing happens if it has ended.

        One exception: a stop string that the last token allowed completes is found after "length" was set, and outranks it.
        """
        entry = self._entries.pop(request.id, None)
        if entry is None:
            if request.finish_reason == "length" and reason == "stop":
                request.finish_reason, request.stop_reason = reason, stop_reason
            return
        if request.status != "running":
            self.num_waiting_tokens -= len(request.prompt_ids)
        entry.queue.remove(entry)
        self._release(request)
        request.num_in_flight = 0
        request.status, request.finish_reason, request.stop_reason = "finished", reason, stop_reason

    def complete(self, request: Request, token: int) -> bool:
        """End a request with the token that must come next, as if it had been sampled; False if its last token has been used already."""
        if request.finish_reason is not None:
            return False
        request.output_ids.append(token)
        self.finish(request, "stop")
        return True

    def fail(self, schedule: Schedule) -> list[Request]:
        """End the unfinished requests of a step that raised with "error"; returns them."""
        failed = [row.request for row in schedule.rows if row.request.id in self._entries]
        for request in failed:
            self.finish(request, "error")
        return failed

    def reset_prefix_cache(self, *, preempt: bool) -> bool:
        """Forget all cached prefixes; False while requests run, unless they may be preempted, after which they begin again."""
        while preempt and self.num_running:
            self._preempt(self._worst_running(), Plan())
        if not self.num_running:
            self._pool.drop_cached()
        return not self.num_running

    def _check_prompt(self, prompt_len: int) -> None:
        capacity = self._pool.capacity * self._page_size
        if prompt_len >= self._max_len:
            message = f"the prompt has {prompt_len} tokens; with one for the answer it may have at most {self._max_len - 1}; shorten it"
            raise UserError("prompt", message, code="context_length_exceeded")
        if prompt_len > capacity:
            message = f"the prompt has {prompt_len} tokens, but the cache holds {capacity}; shorten it or raise --num-pages"
            raise UserError("prompt", message, code="context_length_exceeded")

    def _plan_decodes(self, plan: Plan) -> None:
        rows = plan.rows
        for entry in self._decoding:  # preemption removes entries from the end, at or behind this one
            request = entry.request
            start = request.num_computed
            if start >= entry.room and (_is_held(request) or self._is_sampled_out(entry) or not self._extend(entry, start + 1, plan)):
                continue
            rows.append(Row(request, start, 1, True))
            request.num_computed = start + 1
            request.num_in_flight += 1
        plan.num_tokens = len(rows)

    def _is_sampled_out(self, entry: Entry) -> bool:
        """Whether the tokens in flight are the last it may have."""
        request = entry.request
        return len(request.output_ids) + request.num_in_flight >= entry.max_output

    def _plan_chunks(self, plan: Plan, budget: int) -> None:
        for entry in tuple(self._prefilling):
            if plan.num_tokens >= budget:
                return
            if entry.queue is self._prefilling:  # else an earlier one took its pages
                self._plan_chunk(entry, plan, budget)

    def _plan_chunk(self, entry: Entry, plan: Plan, budget: int) -> None:
        request = entry.request
        start, end = request.num_computed, request.num_known
        count = min(end - start, budget - plan.num_tokens)
        count -= request.awaits_mask and start + count == end  # all but the token whose logits the mask is for
        if not count or not self._extend(entry, start + count, plan):
            return
        samples = start + count == end
        plan.rows.append(Row(request, start, count, samples))
        plan.num_tokens += count
        request.num_computed = start + count
        if samples:
            request.num_in_flight += 1
            move(entry, self._decoding)
        else:
            entry.chunks_in_flight += 1

    def _plan_admissions(self, plan: Plan, budget: int) -> None:
        while plan.num_tokens < budget and self._slots:
            entry = self._next_waiting()
            # A preempted request with a row in flight: what it will gain is not known yet, and nobody may overtake it.
            if entry is None or entry.request.num_in_flight or entry.chunks_in_flight:
                return
            matched = self._match(entry)
            if not self._has_room(entry, matched) or (self._whole_prompts and entry.request.num_known > budget - plan.num_tokens):
                return
            self._admit(entry, matched)
            self._plan_chunk(entry, plan, budget)

    def _next_waiting(self) -> Entry | None:
        """The best of those that wait; at equal priority a preempted one, which was there first."""
        fresh, preempted = self._fresh.first, self._preempted.first
        if fresh is None or preempted is None:
            return fresh or preempted
        return preempted if preempted.rank[0] <= fresh.rank[0] else fresh

    def _match(self, entry: Entry) -> list[int]:
        """Cached pages to begin with; at least the last token is left to compute, for its logits."""
        request = entry.request
        if not self._reads_cache(request):
            return []
        return self._index.match(entry.chain, (request.num_known - 1) // self._page_size)

    def _reads_cache(self, request: Request) -> bool:
        # Log-probabilities of the prompt need the logits of every position, and so every position computed.
        return self._prefix_cache and request.params.prompt_logprobs is None

    def _has_room(self, entry: Entry, matched: list[int]) -> bool:
        """Whether a request can be admitted without soon losing its pages again: all that it lacks must be free.

        Beside what the prompts begun before it still lack; and a page for each running request to grow into, which is 1 % to 10 % of the
        pool, as answers may be short, and never more than they can still come to need."""
        pool = self._pool
        needed = self._count_pages(entry.request) - len(matched)
        reserve = 0
        if running := self.num_running:
            growth = sum(self._most_pages(other) - len(other.request.pages) for other in (*self._prefilling, *self._decoding))
            reserve = min(max(pool.capacity // 100, min(running, pool.capacity // 10)), growth)
            reserve += sum(self._count_pages(other.request) - len(other.request.pages) for other in self._prefilling)
        return needed + reserve <= pool.num_free - pool.count_idle(matched)

    def _most_pages(self, entry: Entry) -> int:
        return -(-(len(entry.request.prompt_ids) + entry.max_output - 1) // self._page_size)  # the last token is never computed

    def _count_pages(self, request: Request) -> int:
        return -(-request.num_known // self._page_size)

    def _admit(self, entry: Entry, matched: list[int]) -> None:
        request = entry.request
        self._pool.share(matched)
        request.pages = matched
        request.num_computed = len(matched) * self._page_size
        if request.num_cached < 0:
            request.num_cached = request.num_computed
            self.prefix_hits += request.num_computed
            self.prefix_queries += request.num_known if self._reads_cache(request) else 0
        entry.num_indexed = len(matched)
        entry.index_at = (len(matched) + 1) * self._page_size if self._prefix_cache else _NEVER
        request.slot = self._slots.pop()
        request.status = "running"
        self.num_waiting_tokens -= len(request.prompt_ids)
        move(entry, self._prefilling)

    def _extend(self, entry: Entry, end: int, plan: Plan) -> bool:
        """Get pages for the positions below `end`, from the worst requests if need be; False if this one was the worst."""
        request, pool = entry.request, self._pool
        missing = -(-end // self._page_size) - len(request.pages)
        while pool.num_free < missing:
            victim = self._worst_running()
            self._preempt(victim, plan)
            if victim is entry:
                return False
        request.pages += pool.allocate(missing)
        entry.room = min(len(request.pages) * self._page_size, len(request.prompt_ids) + entry.max_output - 1)
        if request.constraint is not None:  # each of its steps is looked at: it may have to wait
            entry.room = 0
        return True

    def _worst_running(self) -> Entry:
        candidates = [entry for entry in (self._prefilling.last, self._decoding.last) if entry is not None]
        return max(candidates, key=lambda entry: entry.rank)

    def _preempt(self, entry: Entry, plan: Plan) -> None:
        request = entry.request
        row = plan.take_back(request)
        if row is not None:
            assert row.samples, "only rows of answers are taken back: the chunks planned so far are those of better requests"
            request.num_in_flight -= 1
        move(entry, self._preempted)
        self._release(request)
        request.status = "preempted"
        request.num_computed = 0
        request.num_preemptions += 1
        entry.index_at = _NEVER  # rows in flight are of pages that it no longer holds
        self.num_waiting_tokens += len(request.prompt_ids)
        self.num_preemptions += 1
        plan.preempted.append(request)

    def _release(self, request: Request) -> None:
        """Give up pages and slot."""
        self._pool.free(request.pages)
        request.pages = []
        if request.slot >= 0:
            self._slots.append(request.slot)
            request.slot = -1

    def _index_pages(self, entry: Entry, num_collected: int) -> None:
        """Let others find the pages that are full of known tokens; `num_collected` tokens are in the cache."""
        request = entry.request
        full = min(num_collected, request.num_known) // self._page_size
        for i in range(entry.num_indexed, full):
            page = request.pages[i]
            if self._index.insert(entry.chain.digest(i), page):
                self._pool.mark_indexed(page)
        entry.num_indexed = full
        entry.index_at = (full + 1) * self._page_size

    def _finish_at(self, entry: Entry, token: int) -> bool:
        """Finish at the token just appended, if it is a stop or the last allowed one."""
        request = entry.request
        num_output = len(request.output_ids)
        if token in request.stop_ids and num_output >= request.params.min_tokens:
            self.finish(request, "stop", token if token in request.params.stop_token_ids else None)
        elif num_output >= entry.max_output:
            self.finish(request, "length")
        return request.finish_reason is not None


def _is_held(request: Request) -> bool:
    """Whether what the next token may be is not known yet: that depends on the last one."""
    return request.constraint is not None and (request.num_in_flight > 0 or request.awaits_mask)
