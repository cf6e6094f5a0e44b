"""Text <-> token ids, for tokenizers of Hugging Face directories and of GGUF files.

Decoding works on bytes wherever the tokenizer allows it, so that text streamed token by token equals text decoded at once.
`clean_up_tokenization_spaces` is not applied: it would make the text of a token depend on tokens to come.
"""

from __future__ import annotations

import logging
import pathlib
import time
from collections.abc import Sequence
from typing import Any, Literal

from tokenizers import Tokenizer as Backend

from jaxserve.errors import ConfigError, UserError
from jaxserve.text.directory import read_directory
from jaxserve.text.gguf_tokenizer import read_gguf_tokenizer
from jaxserve.text.vocabulary import Vocabulary, read_token_bytes

log = logging.getLogger(__name__)


class Tokenizer:
    """A tokenizer; immutable once made, and safe to use from several threads.

    Attributes:
      backend: the `tokenizers.Tokenizer` below, for grammars and other readers of the vocabulary.
      vocab_size: one more than the highest token id; the model's logits may be wider.
      bos_id: the beginning-of-sequence token, if there is one.
      eos_ids: tokens that end an answer, as far as the tokenizer's files tell.
      special_ids: tokens that skip_special_tokens leaves out.
      special_tokens: text of "bos_token", "eos_token" and so on, as chat templates name them.
      chat_template: the model's own Jinja template.
      strips_space: a space that begins the whole text was put there by the tokenizer and is not shown.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.backend = vocabulary.backend
        self.bos_id = vocabulary.bos_id
        self.eos_ids = vocabulary.eos_ids
        self.special_tokens = dict(vocabulary.special_tokens)
        self.chat_template = vocabulary.chat_template
        self._prefix_ids = list(vocabulary.prefix_ids)
        self._suffix_ids = list(vocabulary.suffix_ids)
        # Files cut and pad for training; a server must see the whole prompt.
        self.backend.no_truncation()
        self.backend.no_padding()
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, mark in added.items() if mark.special)
        found = read_token_bytes(self.backend)
        self.strips_space = found is not None and found.strips_space
        self._table = None if found is None else found.table
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1 if found is None else len(found.table)
        self._visible_table = None if self._table is None else [
            b"" if token in self.special_ids else data for token, data in enumerate(self._table)
        ]  # fmt: skip
        self._shown_tables: dict[frozenset[int], list[bytes]] = {}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of a text; special tokens written out in it become their ids.

        Args:
          add_special_tokens: put what the model expects around it, such as beginning-of-sequence.
        Raises: UserError if the text is not valid Unicode.
        """
        try:
            # A batch, though of one: unlike encode it lets other threads run meanwhile.
            ids: list[int] = self.backend.encode_batch([text], add_special_tokens=False)[0].ids
        except (TypeError, UnicodeEncodeError):
            raise UserError("prompt", "the text is not valid Unicode: it holds half of a surrogate pair") from None
        return self._prefix_ids + ids + self._suffix_ids if add_special_tokens else ids

    def encode_pair(
        self, first: str, second: str, *, max_first: int | None = None, max_second: int | None = None, max_tokens: int | None = None
    ) -> tuple[list[int], int | None]:
        """The token ids of two texts as one, with what the model expects around and between them.

        Args:
          max_first, max_second: tokens of each text to keep, from its beginning.
          max_tokens: of all; the longer text is cut first.
        Returns: the ids, and where the second text begins if the tokenizer marks it as such.
        Raises: UserError if a text is not valid Unicode.
        """
        try:
            encoding = self.backend.encode_batch([(first, second)], add_special_tokens=True)[0]
        except (TypeError, UnicodeEncodeError):
            raise UserError("prompt", "the text is not valid Unicode: it holds half of a surrogate pair") from None
        owners: list[int | None] = encoding.sequence_ids
        sizes = [owners.count(0), owners.count(1)]
        rest = len(owners) - sum(sizes)
        kept = [size if most is None else min(size, most) for size, most in zip(sizes, (max_first, max_second), strict=True)]
        if max_tokens is not None:
            kept = _cut_longest(kept, max(max_tokens - rest, 0))
        left = list(kept)
        ids: list[int] = []
        types: list[int] = []
        for token, kind, owner in zip(encoding.ids, encoding.type_ids, owners, strict=True):
            if owner is not None:
                left[owner] -= 1
            if owner is None or left[owner] >= 0:
                ids.append(token)
                types.append(kind)
        return ids, types.index(1) if 1 in types else None

    def shorten(self, ids: Sequence[int], max_tokens: int, *, side: Literal["left", "right"]) -> list[int]:
        """Token ids without so many of the text's first ("left") or last ones that max_tokens remain; what stands around it stays."""
        before, after = len(self._prefix_ids), len(self._suffix_ids)
        ids = list(ids)
        if ids[:before] != self._prefix_ids or ids[len(ids) - after :] != self._suffix_ids or max_tokens <= before + after:
            return ids[-max_tokens:] if side == "left" else ids[:max_tokens]
        text, room = ids[before : len(ids) - after], max_tokens - before - after
        return self._prefix_ids + (text[-room:] if side == "left" else text[:room]) + self._suffix_ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD, ids that no token has become nothing."""
        table = self.byte_table(skip_special_tokens=skip_special_tokens)
        if table is None:
            return self.backend.decode([token for token in ids if token < self.vocab_size], skip_special_tokens=skip_special_tokens)
        size = len(table)
        text = b"".join([table[token] for token in ids if token < size]).decode("utf-8", "replace")
        return text[1:] if self.strips_space and text.startswith(" ") else text

    def byte_table(self, *, skip_special_tokens: bool, shown: frozenset[int] = frozenset()) -> list[bytes] | None:
        """The bytes of each token by id; None if the text of a token depends on its neighbours. Not to be written to.

        Args:
          shown: special tokens that are not left out; of few different sets.
        """
        if self._table is None or not skip_special_tokens:
            return self._table
        if not shown:
            return self._visible_table
        table = self._shown_tables.get(shown)
        if table is None:
            hidden = self.special_ids - shown
            table = self._shown_tables[shown] = [b"" if token in hidden else data for token, data in enumerate(self._table)]
        return table

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes that a token stands for, special tokens included; they need not be whole characters."""
        if not 0 <= token < self.vocab_size:
            return b""
        if self._table is None:
            return self.backend.decode([token], skip_special_tokens=False).encode("utf-8")
        return self._table[token]

    def token_text(self, token: int) -> str:
        """The text of one token, as logprobs show it; parts of characters become U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def token_name(self, token: int) -> str:
        """What the vocabulary calls a token, such as "\u0120the"; nothing if there is none."""
        return self.backend.id_to_token(token) or ""

    def to_transformers(self, chat_template: str | None) -> Any:
        """A tokenizer of transformers that does the same, with its methods and this template."""
        # Imported here: it takes seconds, and few ask.
        import transformers

        tokenizer: Any = transformers.PreTrainedTokenizerFast(tokenizer_object=self.backend, **self.special_tokens)
        tokenizer.chat_template = chat_template
        return tokenizer

    @property
    def prefix_text(self) -> str:
        """What add_special_tokens puts before a text, written out."""
        return "".join(self.token_text(token) for token in self._prefix_ids)


def _cut_longest(sizes: list[int], room: int) -> list[int]:
    """Two sizes that add up to at most `room`: the larger one gives way first, then both alike."""
    excess = max(sum(sizes) - room, 0)
    longer = 0 if sizes[0] > sizes[1] else 1
    alone = min(excess, abs(sizes[0] - sizes[1]))
    kept, excess = list(sizes), excess - alone
    kept[longer] -= alone
    return [max(kept[0] - excess // 2, 0), max(kept[1] - (excess - excess // 2), 0)]


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """The tokenizer of a directory (tokenizer.json, else tokenizer.model, else vocab.json and merges.txt) or of a .gguf file.

    Raises: ConfigError saying what is missing or not understood.
    """
    started_s = time.monotonic()
    path = pathlib.Path(path)
    if path.is_dir():
        vocabulary = read_directory(path, load_slow=_load_with_transformers)
    elif path.is_file():
        vocabulary = read_gguf_tokenizer(path)
    else:
        raise ConfigError(f"no tokenizer at {path}: it is neither a directory nor a .gguf file")
    tokenizer = Tokenizer(vocabulary)
    log.info("loaded tokenizer path=%s tokens=%d seconds=%.2f", path, tokenizer.vocab_size, time.monotonic() - started_s)
    return tokenizer


def _load_with_transformers(path: pathlib.Path) -> tuple[Backend, dict[str, str]]:
    # Imported here: it takes seconds, and only directories of the oldest format need it.
    import transformers

    factory: Any = transformers.AutoTokenizer
    try:
        loaded: object = factory.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ConfigError(f"transformers cannot read the tokenizer in {path}: {error}") from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise ConfigError(f"the tokenizer in {path} has no tokenizer.json, and transformers cannot make one of it")
    named: dict[str, object] = getattr(loaded, "special_tokens_map", {})
    return backend, {role: str(text) for role, text in named.items() if role.endswith("_token")}
