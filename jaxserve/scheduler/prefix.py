"""The prefix cache's index: a chain hash of full pages -> the page that holds them.

The digest of page i covers every token from the first to the end of page i, so that equal digests mean equal keys and values. The root of
the chain is keyed with a secret and salted per tenant: nobody can guess, choose or time another tenant's digests.
"""

from __future__ import annotations

import hashlib
from array import array

from jaxserve.request import Request


class PrefixChain:
    """The digests of one request's full pages, computed once each and on demand.

    Args:
      root: digest that stands before the first page.
    """

    __slots__ = ("_digests", "_page_size", "_request", "_root")

    def __init__(self, request: Request, page_size: int, root: bytes) -> None:
        self._request, self._page_size, self._root = request, page_size, root
        self._digests: list[bytes] = []

    def digest(self, i: int) -> bytes:
        """Digest of page i, all of whose tokens are known."""
        digests, size = self._digests, self._page_size
        while len(digests) <= i:
            start = len(digests) * size
            parent = digests[-1] if digests else self._root
            digests.append(hashlib.sha256(parent + array("i", self._tokens(start, start + size)).tobytes()).digest())
        return digests[i]

    def _tokens(self, start: int, end: int) -> list[int]:
        request = self._request
        assert end <= request.num_known, f"{end=} {request.num_known=}: a page with unknown tokens has no digest"
        prompt_len = len(request.prompt_ids)
        if end <= prompt_len:
            return request.prompt_ids[start:end]
        return request.prompt_ids[start:] + request.output_ids[max(start - prompt_len, 0) : end - prompt_len]


class PrefixIndex:
    """Digest -> page and back.

    Args:
      secret: keys the digests; different for every process.
    """

    def __init__(self, page_size: int, secret: bytes) -> None:
        self._page_size = page_size
        self._key = hashlib.sha256(secret).digest()
        self._pages: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    def chain(self, request: Request) -> PrefixChain:
        """The digests of a request; those of requests with different salts never meet."""
        salt = request.cache_salt
        tag = b"\x00" if salt is None else b"\x01" + salt.encode("utf-8", "surrogatepass")
        return PrefixChain(request, self._page_size, hashlib.sha256(self._key + tag).digest())

    def match(self, chain: PrefixChain, max_pages: int) -> list[int]:
        """The pages that hold the longest known beginning of at most `max_pages` pages."""
        found: list[int] = []
        while len(found) < max_pages:
            page = self._pages.get(chain.digest(len(found)))
            if page is None:
                break
            found.append(page)
        return found

    def insert(self, digest: bytes, page: int) -> bool:
        """Remember a page; False if an identical one is known, which then stays the one that is found."""
        if digest in self._pages:
            return False
        self._pages[digest] = page
        self._digests[page] = digest
        return True

    def remove(self, page: int) -> None:
        """Forget a page."""
        del self._pages[self._digests.pop(page)]

    def check(self, indexed: set[int]) -> None:
        """Assert that both directions agree with each other and with the pages that the pool keeps."""
        assert {page: digest for digest, page in self._pages.items()} == self._digests, "the index and its inverse differ"
        assert self._digests.keys() == indexed, f"{self._digests.keys()=} {indexed=}"
