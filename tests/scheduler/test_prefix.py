"""Tests of the chain hash and its index."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.scheduler.prefix import PrefixIndex
from tests.scheduler.simulation import make_request

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=14)


def digests(index: PrefixIndex, tokens: list[int], *, page_size: int = 3, salt: str | None = None) -> list[bytes]:
    chain = index.chain(make_request("a", tokens, cache_salt=salt))
    return [chain.digest(i) for i in range(len(tokens) // page_size)]


@given(TOKENS, TOKENS)
def test_digests_are_equal_exactly_where_whole_prefixes_are(a: list[int], b: list[int]) -> None:
    index = PrefixIndex(3, b"secret")
    for i, (x, y) in enumerate(zip(digests(index, a), digests(index, b), strict=False)):
        assert (x == y) == (a[: 3 * i + 3] == b[: 3 * i + 3])


@given(TOKENS, st.integers(0, 14))
def test_digest_does_not_depend_on_where_the_output_begins(tokens: list[int], prompt_len: int) -> None:
    index = PrefixIndex(3, b"secret")
    request = make_request("a", tokens[:prompt_len])
    chain = index.chain(request)
    found: list[bytes] = []
    for token in [*tokens[prompt_len:], 0]:
        found += [chain.digest(i) for i in range(len(found), request.num_known // 3)]
        request.output_ids.append(token)
    assert found == digests(index, tokens)


def test_digest_of_a_page_with_unknown_tokens_is_refused() -> None:
    chain = PrefixIndex(3, b"secret").chain(make_request("a", [1, 2, 3, 4, 5]))
    with pytest.raises(AssertionError, match="unknown"):
        chain.digest(1)


@pytest.mark.parametrize("salt", ["", "a", "\x00", "\ud800", "ä" * 128])
def test_digests_differ_when_salts_differ(salt: str) -> None:
    index = PrefixIndex(3, b"secret")
    others = {digests(index, [1, 2, 3], salt=other)[0] for other in (None, "b", "\x01a", salt + "x")}
    assert digests(index, [1, 2, 3], salt=salt)[0] not in others


def test_digests_differ_when_secrets_differ() -> None:
    assert digests(PrefixIndex(3, b"one"), [1, 2, 3]) != digests(PrefixIndex(3, b"two"), [1, 2, 3])


def test_match_finds_the_longest_known_beginning_within_the_limit() -> None:
    index = PrefixIndex(2, b"secret")
    known = digests(index, [1, 2, 3, 4, 5, 6], page_size=2)
    for page, digest in zip([7, 8, 9], known, strict=True):
        assert index.insert(digest, page)
    assert index.match(index.chain(make_request("b", [1, 2, 3, 4, 0, 0, 5, 6])), 4) == [7, 8]
    assert index.match(index.chain(make_request("c", [1, 2, 3, 4, 5, 6])), 2) == [7, 8]
    assert index.match(index.chain(make_request("d", [1, 2, 3, 4], cache_salt="x")), 2) == []


def test_match_stops_at_a_gap_that_eviction_left() -> None:
    index = PrefixIndex(2, b"secret")
    for page, digest in enumerate(digests(index, [1, 2, 3, 4, 5, 6], page_size=2), 7):
        index.insert(digest, page)
    index.remove(8)
    index.check({7, 9})
    assert index.match(index.chain(make_request("b", [1, 2, 3, 4, 5, 6])), 3) == [7]


def test_first_of_two_equal_pages_stays() -> None:
    index = PrefixIndex(2, b"secret")
    digest = digests(index, [1, 2], page_size=2)[0]
    assert index.insert(digest, 5)
    assert not index.insert(digest, 6)
    assert index.match(index.chain(make_request("b", [1, 2])), 1) == [5]
