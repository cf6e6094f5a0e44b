"""Which of several copies of a model gets a request: the one that has most of its prompt in its cache, unless it is too busy.

The copies' schedulers know nothing of each other. The router remembers where it sent the beginnings of past prompts; it never asks.
"""

from __future__ import annotations

import collections
import secrets

from jaxserve.request import Request
from jaxserve.scheduler.prefix import PrefixIndex

ANSWER_TOKENS = 256  # what an unfinished answer counts for, beside its prompt
_MAX_REMEMBERED = 1 << 18  # pages of past prompts


class Router:
    """Chooses a copy for each request.

    Args:
      num_copies: they are numbered from 0.
      page_size: tokens; prompts are compared page by page, as the prefix caches do.
    """

    def __init__(self, *, num_copies: int, page_size: int) -> None:
        self._page_size = page_size
        self._chains = PrefixIndex(page_size, secrets.token_bytes(32))
        self._sent_to: collections.OrderedDict[bytes, int] = collections.OrderedDict()
        self._loads = [0] * num_copies
        self._owners: dict[str, tuple[int, int]] = {}  # request id -> copy, load

    def choose(self, request: Request) -> int:
        """The copy that would have to compute least, what it already has to do included."""
        chain = self._chains.chain(request)
        digests = [chain.digest(i) for i in range(len(request.prompt_ids) // self._page_size)]
        known = [0] * len(self._loads)
        for count, digest in enumerate(digests, 1):
            copy = self._sent_to.get(digest)
            if copy is None:
                break
            known[copy] = count * self._page_size
        work = [len(request.prompt_ids) - tokens + ANSWER_TOKENS for tokens in known]
        chosen = min(range(len(work)), key=lambda i: (self._loads[i] + work[i], i))
        for digest in digests:
            self._sent_to[digest] = chosen
            self._sent_to.move_to_end(digest)
        while len(self._sent_to) > _MAX_REMEMBERED:
            self._sent_to.popitem(last=False)
        self._owners[request.id] = chosen, work[chosen]
        self._loads[chosen] += work[chosen]
        return chosen

    def owner(self, request_id: str) -> int | None:
        """The copy that has an unfinished request."""
        found = self._owners.get(request_id)
        return None if found is None else found[0]

    @property
    def loads(self) -> tuple[int, ...]:
        """Tokens that each copy has before it."""
        return tuple(self._loads)

    def forget(self, request_id: str) -> None:
        """The request has ended, or was not taken."""
        copy, work = self._owners.pop(request_id, (0, 0))
        self._loads[copy] -= work
