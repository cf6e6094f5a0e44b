"""The JSON front door: what the standard allows passes as json.loads reads it, hostile bodies are 400 and quick."""

from __future__ import annotations

import contextlib
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.api.json_door import MAX_DEPTH, parse_object
from jaxserve.errors import UserError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64) + 1, 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), VALUES, max_size=5), st.booleans())
def test_parse_object_gives_what_was_sent(value: dict[str, object], ascii_only: bool) -> None:
    assert parse_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b"[]", b'"x"', b"null", b"1", b"{'a':1}", b'{"a":1,}', b'{"a":1}x', b'{"a":01}', b'{"a":+1}', b'{"a":.5}',
        b'{"a" 1}',
        b'{"a":NaN}', b'{"a":Infinity}', b'{"a":-Infinity}', b'{"a":1e999}', b'{"a":-1e999}',
        b'{"a":18446744073709551616}', b'{"a":-18446744073709551616}', b'{"a":%s}' % (b"1" * 5000), b'{"a":0.%s}' % (b"1" * 500),
        b'{"a":"\\ud800"}', b'{"a":"\\udfff x"}', b'{"\\udc00":1}', b'{"a":["\\ud83d\\ud83d\\ude00"]}', b'{"a":"\xff"}',
        b'{"a":"\xed\xa0\x80"}',
        b'\xef\xbb\xbf{"a":1}', b'{"a":"tab\there"}', b'{"a":"\x00"}', b'{"a":"\\x41"}', b"{\x00}",
    ],
)  # fmt: skip
def test_parse_object_refuses_bad_bodies(body: bytes) -> None:
    with pytest.raises(UserError) as caught:
        parse_object(body)
    assert caught.value.status == 400
    assert caught.value.code == "invalid_json"
    assert len(caught.value.message) < 300


def test_last_of_duplicate_keys_wins() -> None:
    assert parse_object(b'{"a":1,"a":{"b":2},"a":3}') == {"a": 3}


def test_surrogate_pairs_are_characters() -> None:
    assert parse_object(b'{"a":"\\ud83d\\ude00"}') == {"a": "\U0001f600"}


@given(
    st.integers(1, 2 * MAX_DEPTH),
    st.lists(st.booleans(), min_size=2 * MAX_DEPTH, max_size=2 * MAX_DEPTH),
    st.sampled_from(["", '"[[{{\\"["', '"\\\\"']),
)
def test_depth_limit_is_exact_whatever_strings_hold(depth: int, kinds: list[bool], leaf: str) -> None:
    opens = ['{"k\\"{[":' if kind else "[" for kind in kinds[: depth - 1]]
    closes = ["}" if kind else "]" for kind in kinds[: depth - 1]]
    inner = "".join(opens) + (leaf or "0") + "".join(reversed(closes))
    body = ('{"many":[' + ",".join(["[]"] * 100) + '],"a":' + inner + "}").encode()
    if depth <= MAX_DEPTH:
        assert parse_object(body) == json.loads(body)
    else:
        with pytest.raises(UserError, match="nested too deep"):
            parse_object(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":' + b"[" * 4_000_000 + b"]" * 4_000_000 + b"}",
        b'{"a":' + b"[" * 8_000_000,
        b'{"a":' * 1_000_000,
        b'{"a":[' + b"[]," * 2_500_000 + b"[]]}",
        b'{"a":"' + b'[\\"' * 2_500_000 + b'"}',
        b'{"a":[' + b"1," * 4_000_000 + b"1]}",
        b"{" + b",".join(b'"%d":1' % number for number in range(700_000)) + b"}",
        b'{"a":[' + b'"",' * 2_500_000 + b'""' + b"]}",
    ],
    ids=["deep", "open", "objects", "wide", "escapes", "numbers", "keys", "strings"],
)
def test_large_hostile_bodies_are_judged_quickly(body: bytes) -> None:
    started = time.process_time()
    with contextlib.suppress(UserError):
        parse_object(body)
    assert time.process_time() - started < 2.0
