"""Structured output: constraints compiled with llguidance, and which tokens they allow next.

1. `Grammars.compile` turns a `StructuredOutputs` into a `Grammar`, in a few threads of its own, and keeps the last ones.
2. `Grammar.begin` gives each answer a `Matcher`: fill a mask, sample, consume the token, and so on.

llguidance works lazily, so that hostile constraints compile fast and are caught by its limits later, each of them in a bounded time.
What is slow to compile is bounded by its size. Nothing here holds the interpreter's lock for long.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import json
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark

from jaxserve.errors import QueueFullError, UserError
from jaxserve.request import StructuredOutputs
from jaxserve.text.structural_tag import is_list, is_mapping, structural_tag_grammar
from jaxserve.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_CHARS = 1 << 17  # of a constraint; schemas that are used are smaller, and the time to compile grows with the square of some
MAX_CHOICES = 10_000
MAX_WAITING = 256  # constraints being compiled
MAX_WAIT_S = 60.0  # for a thread, and for the model's vocabulary to be read before the first constraint
MAX_MESSAGE_CHARS = 400
# Small models like white space so much that they would write nothing else.
_WHITE_SPACE = r"[ \n\r\t]{1,64}"
_RETRY_AFTER_S = 2.0
_MAX_FORCED = 4096  # bytes of text that has to come which are tokenized at a time


# Where llguidance found a mistake, and the lines around it.
_PLACE = re.compile(r"^at \d+\(\d+\): ")
_LISTING = re.compile(r"(?:^ *\d+ \| .*\n?(?: *\^ *\n?)?)+", re.MULTILINE)


class GrammarError(ValueError):
    """A constraint that cannot be compiled, or that became too complex on the way."""


class Matcher:
    """One answer's way through a grammar; not thread-safe. See jaxserve.request.Matcher."""

    __slots__ = ("_grammar", "_matcher", "_tokens")

    def __init__(self, grammar: Grammar, matcher: llguidance.LLMatcher) -> None:
        self._grammar, self._matcher = grammar, matcher
        self._tokens: list[int] = []

    @property
    def finished(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def consume(self, token: int) -> None:
        """Go on to a token that the last mask allowed."""
        self._tokens.append(token)
        self._matcher.consume_token(token)

    def fill(self, forbidden: Sequence[int] = ()) -> np.ndarray:
        """The tokens that may come next, as i32 words; lets other threads run meanwhile.

        Args:
          forbidden: token ids left out unless nothing else remains.
        Raises: GrammarError if the grammar is too complex to go on.
        """
        mask = self._mask()
        if mask is None:
            # What answers have seen of a grammar is shared between them, and full at some point: this one gets its own.
            self._grammar.spoiled = True
            self._matcher = self._grammar.compile()
            self._matcher.consume_tokens(self._tokens)
            mask = self._mask()
        if mask is None:
            raise GrammarError(_message(self._matcher))
        if forbidden:
            rest = mask.copy()
            for token in forbidden:
                rest[token >> 5] &= 0xFFFFFFFF ^ (1 << (token & 31))
            if rest.any():
                mask = rest
        return mask.view(np.int32)

    def _mask(self) -> np.ndarray | None:
        matcher = self._matcher
        if matcher.is_error():
            return None
        mask = np.zeros(self._grammar.num_words, np.uint32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():
            return None
        mask = mask[: self._grammar.num_logit_words]
        mask[-1] &= self._grammar.last_word
        return mask


class Grammar:
    """A compiled constraint; raises GrammarError if it is none.

    Attributes:
      spoiled: its limits have been reached on the way, so that it is of no more use to others.
    """

    def __init__(self, tokenizer: llguidance.LLTokenizer, text: str, *, vocab_size: int) -> None:
        self._tokenizer, self._text = tokenizer, text
        self.num_words, self.num_logit_words = -(-tokenizer.vocab_size // 32), -(-vocab_size // 32)
        # A model without an end of sequence gets one beyond the logits, which no mask shows.
        self.last_word = np.uint32(0xFFFFFFFF >> (-vocab_size % 32))
        self.spoiled = False
        self._first = self.compile()
        if self._first.is_error():
            raise GrammarError(_message(self._first))
        Matcher(self, self._first).fill()  # much of what the first answer would have to wait for

    def begin(self) -> Matcher:
        """A matcher at the beginning of an answer."""
        return Matcher(self, self._first.deep_copy())

    def compile(self) -> llguidance.LLMatcher:
        """A matcher that shares nothing with others."""
        limits = llguidance.LLParserLimits(max_lexer_states=50_000, max_grammar_size=200_000, verbose_errors=False)
        return llguidance.LLMatcher(self._tokenizer, self._text, log_level=0, limits=limits)


class _Build(NamedTuple):
    """A constraint that is being compiled: when its turn has come, and what became of it."""

    begun: concurrent.futures.Future[None]
    done: concurrent.futures.Future[Grammar]


class Grammars:
    """Compiles constraints for one tokenizer; safe to use from several threads.

    Args:
      vocab_size: width of the logits.
      eos_ids: tokens that end an answer: allowed where the constraint is met, and nowhere else.
      threads: constraints compiled at a time.
      max_cached: compiled constraints kept.
      timeout_s: longest time to compile one.
      wait_s: longest wait until that begins.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, vocab_size: int, eos_ids: frozenset[int], threads: int = 2, max_cached: int = 64,
        timeout_s: float = 10.0, wait_s: float = MAX_WAIT_S,
    ) -> None:  # fmt: skip
        self._model_tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, eos_ids
        self._max_cached, self._timeout_s, self._wait_s = max_cached, timeout_s, wait_s
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="grammar")
        self._cache: collections.OrderedDict[tuple[Any, ...], _Build] = collections.OrderedDict()
        self._lock, self._build_lock = threading.Lock(), threading.Lock()
        self._num_waiting = 0
        self._tokenizer: llguidance.LLTokenizer | None = None

    def compile(self, spec: StructuredOutputs) -> Grammar:
        """The compiled constraint; waits for it.

        Raises: UserError saying what is wrong with it; QueueFullError.
        """
        build = self._submit(spec)
        try:
            build.begun.result(self._wait_s)
        except TimeoutError:
            raise QueueFullError(_RETRY_AFTER_S) from None
        try:
            return build.done.result(self._timeout_s)
        except TimeoutError:
            raise self._too_slow(spec) from None
        except GrammarError as error:
            raise _user_error(spec, error) from None

    async def compile_async(self, spec: StructuredOutputs) -> Grammar:
        """`compile` on an event loop."""
        build = self._submit(spec)
        begun, done = asyncio.wrap_future(build.begun), asyncio.wrap_future(build.done)
        done.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to hear of it
        try:
            await asyncio.wait_for(asyncio.shield(begun), self._wait_s)
        except TimeoutError:
            raise QueueFullError(_RETRY_AFTER_S) from None
        try:
            return await asyncio.wait_for(asyncio.shield(done), self._timeout_s)
        except TimeoutError:
            raise self._too_slow(spec) from None
        except GrammarError as error:
            raise _user_error(spec, error) from None

    def _submit(self, spec: StructuredOutputs) -> _Build:
        key = _key(spec)
        with self._lock:
            build = self._cache.get(key)
            if build is not None and not _is_spoiled(build.done):
                self._cache.move_to_end(key)
                return build
            if self._num_waiting >= MAX_WAITING:
                raise QueueFullError(_RETRY_AFTER_S)
            self._num_waiting += 1
            begun: concurrent.futures.Future[None] = concurrent.futures.Future()
            build = self._cache[key] = _Build(begun, self._pool.submit(self._build, spec, begun))
            while len(self._cache) > self._max_cached:
                self._cache.popitem(last=False)
        build.done.add_done_callback(self._count_done)
        return build

    def _count_done(self, _: object) -> None:
        with self._lock:
            self._num_waiting -= 1

    def _build(self, spec: StructuredOutputs, begun: concurrent.futures.Future[None]) -> Grammar:
        try:
            try:
                with self._build_lock:
                    if self._tokenizer is None:
                        self._tokenizer = _read_tokenizer(self._model_tokenizer, self._vocab_size, self._eos_ids)
            finally:
                begun.set_result(None)
            special = {self._model_tokenizer.token_text(token): token for token in self._model_tokenizer.special_ids}
            return Grammar(self._tokenizer, _grammar_text(spec, special), vocab_size=self._vocab_size)
        except GrammarError:
            raise
        except RecursionError:
            raise GrammarError("it is nested too deeply") from None
        except ValueError as error:
            raise GrammarError(str(error)[:MAX_MESSAGE_CHARS]) from None
        except BaseException as error:  # a panic inside the library is no Exception, and must not reach the event loop
            log.exception("a constraint could not be compiled: source=%s", spec.source)
            raise GrammarError("the server failed on it") from error

    def _too_slow(self, spec: StructuredOutputs) -> UserError:
        return UserError(spec.source, f"{spec.source}: not compiled within {self._timeout_s:g} s; it is too complex")


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self.eos_token_id, self.bos_token_id = eos_ids[0], tokenizer.bos_id
        self.special_token_ids = sorted({*tokenizer.special_ids, *eos_ids} & set(range(max(vocab_size, eos_ids[0] + 1))))
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.tokens += [b"<|end|>"] * (eos_ids[0] + 1 - vocab_size)
        self._tokenizer = tokenizer

        self._special = frozenset(self.special_token_ids)
        ordinary = [(data, token) for token, data in enumerate(self.tokens) if data and token not in self._special]
        self._token_of = dict(reversed(ordinary))  # of several, the first
        self._longest = max((len(data) for data in self._token_of), default=1)

    def __call__(self, data: bytes) -> list[int]:
        """The tokens in which the model would write something that has to come: exactly these bytes, and none of them special."""
        data = data[:_MAX_FORCED]
        try:
            # Behind a line break no space is put before the text.
            ids = self._tokenizer.encode("\n" + data.decode("utf-8"), add_special_tokens=False)
        except UnicodeDecodeError:
            return self._cut(data)
        found: list[int] = []
        end = len(data)
        while ids and end:
            token = ids.pop()
            if token in self._special or not self.tokens[token] or not data.endswith(self.tokens[token], 0, end):
                return self._cut(data)
            found.append(token)
            end -= len(self.tokens[token])
        return found[::-1]

    def _cut(self, data: bytes) -> list[int]:
        """The longest token first, up to a byte that none begins with."""
        ids: list[int] = []
        start = 0
        while start < len(data):
            ends = range(min(start + self._longest, len(data)), start, -1)
            end = next((end for end in ends if data[start:end] in self._token_of), start)
            if end == start:
                break
            ids.append(self._token_of[data[start:end]])
            start = end
        return ids


def _read_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_ids: frozenset[int]) -> llguidance.LLTokenizer:
    if tokenizer.byte_table(skip_special_tokens=False) is None:
        raise GrammarError("this model's tokenizer writes a token differently after different neighbours, which grammars cannot follow")
    ends = sorted(eos_ids) or [vocab_size]  # a token beyond the logits ends answers of a model that has none for it
    wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, ends))
    return llguidance.LLTokenizer(wrapper, eos_token=ends)


def _key(spec: StructuredOutputs) -> tuple[Any, ...]:
    """Equal for specs that mean the same. Raises: UserError for one that is too large."""
    try:
        texts = [value if isinstance(value, str) else json.dumps(value) for value in (spec.json, spec.structural_tag)]
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(spec.source, f"{spec.source}: not a JSON document: {error}") from None
    choice = tuple(spec.choice or ())
    size = sum(len(text or "") for text in (*texts, spec.regex, spec.grammar, spec.whitespace_pattern, *choice))
    if size > MAX_CHARS or len(choice) > MAX_CHOICES:
        what = f"{len(choice)} choices; at most {MAX_CHOICES}" if len(choice) > MAX_CHOICES else f"{size} characters; at most {MAX_CHARS}"
        raise UserError(spec.source, f"{spec.source} has {what} are allowed")
    options = spec.json_object, spec.disable_any_whitespace, spec.disable_additional_properties, spec.whitespace_pattern
    return *texts, spec.regex, choice, spec.grammar, *options


def _grammar_text(spec: StructuredOutputs, special: Mapping[str, int]) -> str:
    """The constraint in llguidance's terms."""
    options: dict[str, Any] = {"whitespace_pattern": spec.whitespace_pattern or _WHITE_SPACE}
    if spec.disable_any_whitespace:
        options = {"whitespace_flexible": False}
    if spec.regex is not None:
        # Digits are those of ASCII, as nearly everyone means them.
        return f"start: /{llguidance.regex_to_lark(spec.regex, 'd')}/"
    if spec.choice is not None:
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in dict.fromkeys(spec.choice))
        return f"start: CHOICE\nCHOICE: {choices}"
    if spec.grammar is not None:
        return _to_lark(spec.grammar)
    if spec.structural_tag is not None:
        tag = _parse(spec.structural_tag)
        if not is_mapping(tag):
            raise GrammarError("a structural tag must be an object")
        grammars = structural_tag_grammar(tag, special=special, json_options=options)
        parts = [grammars[0], *({**part, "lark_grammar": _to_lark(part["lark_grammar"])} for part in grammars[1:])]
        return json.dumps({"grammars": parts})
    schema: Any = {"type": "object"} if spec.json_object else _parse(spec.json)
    if spec.disable_additional_properties:
        schema = _close_objects(schema)
    if not (is_mapping(schema) or isinstance(schema, bool)):
        raise GrammarError("a JSON schema must be an object or a boolean")
    defaults: Any = options  # a TypedDict in the library's stubs
    return llguidance.LLMatcher.grammar_from_json_schema(
        json.dumps(schema if isinstance(schema, bool) else dict(schema)), defaults=defaults
    )


def _to_lark(grammar: str) -> str:
    try:
        return any_to_lark(grammar)
    except RecursionError:
        raise
    except Exception as error:  # the converter raises whatever it stumbles over
        raise GrammarError(f"the grammar is neither Lark nor GBNF: {error}") from None


def _parse(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise GrammarError(f"not a JSON document: {error}") from None


def _close_objects(schema: Any) -> Any:
    """The schema with additionalProperties false in each object that lists properties and does not say."""
    if is_list(schema):
        return [_close_objects(item) for item in schema]
    if not is_mapping(schema):
        return schema
    closed = {name: _close_objects(value) for name, value in schema.items()}
    if is_mapping(schema.get("properties")):
        closed.setdefault("additionalProperties", False)
    return closed


def _is_spoiled(future: concurrent.futures.Future[Grammar]) -> bool:
    return future.done() and future.exception() is None and future.result().spoiled


def _message(matcher: llguidance.LLMatcher) -> str:
    """llguidance's own words without the state of its parser."""
    text = re.split(r"\n?<(?:state|non-verbose|backtrace)", matcher.get_error(), maxsplit=1)[0].strip()
    if text == "NoExtensionBias":
        return "no text can satisfy it"
    return text[:MAX_MESSAGE_CHARS] or "too complex"


def _user_error(spec: StructuredOutputs, error: GrammarError) -> UserError:
    text = str(error)
    if spec.grammar is None:
        text = _LISTING.sub("", _PLACE.sub("", text)).strip()  # of a grammar that the client has never seen
    return UserError(spec.source, f"{spec.source}: {text}")
