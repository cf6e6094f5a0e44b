"""The pages of the cache: who holds them, which are free, and in which order cached ones are given up.

             allocate                   free, not indexed
    free ---------------> held  ---------------------------> free
    cached --------------> held  --------------------------> cached
             share, or              free, indexed
             allocate (evicts: oldest first, when no free page is left)

Page 0 is the null page: padding points at it, nobody ever holds it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence


class PagePool:
    """Free list, reference counts, and freed pages whose content may still be of use.

    Args:
      num_pages: pages of the cache, the null page included.
      on_evict: called with each cached page that is about to get another content.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], None]) -> None:
        assert num_pages >= 2, f"{num_pages=}: page 0 is the null page, so at least one more is needed"
        self._num_pages = num_pages
        self._on_evict = on_evict
        self._refs = [0] * num_pages
        self._indexed = bytearray(num_pages)
        self._free = list(range(num_pages - 1, 0, -1))
        # Insertion order is the order of eviction. Not a dict: finding its first key takes time linear in the keys deleted before it.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def capacity(self) -> int:
        """Pages that can be held at all."""
        return self._num_pages - 1

    @property
    def num_free(self) -> int:
        """Pages that allocate could hand out, cached ones included."""
        return len(self._free) + len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages for one holder; at most num_free."""
        assert count <= self.num_free, f"{count=} {self.num_free=}"
        taken: list[int] = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self._refs[page] = 1
            taken.append(page)
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Add a holder to each of these indexed pages."""
        for page in pages:
            if self._refs[page] == 0:
                del self._cached[page]
            self._refs[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """Drop one holder of each page, last page first, so that the tail of a prompt is evicted before its head."""
        for page in reversed(pages):
            refs = self._refs[page] - 1
            assert refs >= 0, f"{page=} is freed but nobody holds it"
            self._refs[page] = refs
            if refs == 0:
                if self._indexed[page]:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def drop_cached(self) -> None:
        """Give up the content of all pages that nobody holds."""
        while self._cached:
            self._free.append(self._evict())

    def mark_indexed(self, page: int) -> None:
        """Keep the content of this held page once it is free, as long as there is room."""
        assert self._refs[page] > 0, f"{page=} is indexed but nobody holds it"
        self._indexed[page] = 1

    def count_idle(self, pages: Iterable[int]) -> int:
        """How many of these pages nobody holds."""
        return sum(self._refs[page] == 0 for page in pages)

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Assert that counts, lists and the holders' page tables agree."""
        counts: Counter[int] = Counter()
        for table in holders:
            assert len(set(table)) == len(table), f"a page occurs twice in {table=}"
            counts.update(table)
        refs = {page: count for page, count in enumerate(self._refs) if count}
        assert refs == counts, f"{refs=} {counts=}"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), f"a page is free twice: {self._free=}"
        assert 0 not in free | cached | counts.keys(), "the null page is in use"
        assert not free & cached, f"{free=} {cached=} overlap"
        assert not (free | cached) & counts.keys(), f"{free=} {cached=} {counts=} overlap"
        assert len(free) + len(cached) + len(counts) == self.capacity, f"{len(free)=} {len(cached)=} {len(counts)=} {self.capacity=}"
        assert all(self._indexed[page] for page in cached), f"{cached=} holds pages that are not indexed"
        assert not any(self._indexed[page] for page in free), f"{free=} holds indexed pages"
        shared = [page for page, count in counts.items() if count > 1 and not self._indexed[page]]
        assert not shared, f"{shared=} have several holders but are not full pages of known tokens"

    def indexed(self) -> set[int]:
        """Pages whose content is kept."""
        return {page for page, flag in enumerate(self._indexed) if flag}

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        self._indexed[page] = 0
        self._on_evict(page)
        return page
