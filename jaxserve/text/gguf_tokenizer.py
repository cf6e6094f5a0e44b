"""The tokenizer inside a GGUF file: byte-level BPE ("gpt2"), SentencePiece ("llama") and WordPiece ("bert") vocabularies."""

from __future__ import annotations

import pathlib
import types
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxserve.errors import ConfigError
from jaxserve.text.gguf_metadata import read_gguf_metadata
from jaxserve.text.pretokenize import find_pretokenization
from jaxserve.text.sentencepiece import CONTROL, NORMAL, USER_DEFINED, SentencePiece, build_sentencepiece
from jaxserve.text.vocabulary import END_OF_TURN, Vocabulary, add_marked_tokens

_ROLES = {
    "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "sep_token": "seperator", "pad_token": "padding", "cls_token": "cls",
    "mask_token": "mask",
}  # fmt: skip

# What llama.cpp takes for them where a file says nothing.
_DEFAULT_IDS: Mapping[str, Mapping[str, int]] = types.MappingProxyType(
    {
        "llama": {"bos_token": 1, "eos_token": 2, "unk_token": 0},
        "bert": {"cls_token": 101, "sep_token": 102, "unk_token": 100, "pad_token": 0, "mask_token": 103},
    }
)
_MAX_WORD = 100  # characters of a word that is not unknown, in every published BERT


def read_gguf_tokenizer(path: pathlib.Path) -> Vocabulary:
    """The tokenizer of a GGUF file.

    Raises: ConfigError if the file holds none, or one of a kind that is not known.
    """
    metadata = read_gguf_metadata(path, lambda key: key.startswith(("tokenizer.", "general.architecture", "general.name")))
    try:
        return _read(metadata)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read(metadata: Mapping[str, Any]) -> Vocabulary:
    kind = metadata.get("tokenizer.ggml.model")
    texts = _texts(metadata)
    kinds = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(texts)
    if len(kinds) != len(texts):
        raise ConfigError(f"{len(texts)} tokens but {len(kinds)} token types")
    if kind == "gpt2":
        backend, adds_bos = _byte_level_bpe(metadata, texts)
    elif kind == "llama":
        # GGUF writes user-defined tokens with plain spaces or with SentencePiece's mark; text has plain spaces.
        texts = [text.replace("▁", " ") if kinds[token] == USER_DEFINED else text for token, text in enumerate(texts)]
        backend, adds_bos = _sentencepiece(metadata, texts, kinds), True
    elif kind == "bert":
        return _wordpiece(metadata, texts, kinds)
    else:
        raise ConfigError(
            f"tokenizer.ggml.model={kind!r} is not known, 'gpt2', 'llama' and 'bert' are; "
            "pass --tokenizer with a directory that holds tokenizer.json"
        )
    ids = _special_ids(metadata, len(texts), _DEFAULT_IDS.get(kind, {}))
    # Phi-3 is trained with the white space after its marks swallowed; GGUF has no field for it.
    rstrip = metadata.get("general.architecture") == "phi3" and kind == "llama"
    marks = _turn_marks(texts, kinds)
    bos, eos = ids.get("bos_token"), ids.get("eos_token")
    add_marked_tokens(backend, texts, kinds, special_ids=marks.union(token for token in (bos, eos) if token is not None), rstrip=rstrip)
    adds_bos, adds_eos = metadata.get("tokenizer.ggml.add_bos_token", adds_bos), metadata.get("tokenizer.ggml.add_eos_token", False)
    return Vocabulary(
        backend=backend,
        special_tokens={role: texts[token] for role, token in ids.items()},
        eos_ids=_eos_ids(metadata, marks, eos, len(texts)),
        bos_id=bos,
        prefix_ids=(bos,) if adds_bos and bos is not None else (),
        suffix_ids=(eos,) if adds_eos and eos is not None else (),
        chat_template=metadata.get("tokenizer.chat_template") or None,
    )


def _texts(metadata: Mapping[str, Any]) -> list[str]:
    """The tokens; empty and repeated ones, which text cannot become, get a name of their own."""
    texts = metadata.get("tokenizer.ggml.tokens")
    if not texts:
        raise ConfigError("the GGUF file holds no tokenizer (tokenizer.ggml.tokens); pass --tokenizer with a directory that holds one")
    seen: set[str] = {""}
    for token, text in enumerate(texts):
        if text in seen:
            texts[token] = text = f"[UNUSED_{token}]"
        seen.add(text)
    return texts


def _byte_level_bpe(metadata: Mapping[str, Any], texts: list[str]) -> tuple[Tokenizer, bool]:
    rule = find_pretokenization(metadata.get("tokenizer.ggml.pre"), metadata.get("general.architecture", ""))
    merges: list[tuple[str, str]] = []
    for merge in metadata.get("tokenizer.ggml.merges") or ():
        cut = merge.find(" ", 1)
        if cut < 0:
            raise ConfigError(f"tokenizer.ggml.merges holds {merge!r:.60}, which is not two tokens with a space between")
        merges.append((merge[:cut], merge[cut + 1 :]))
    try:
        backend = Tokenizer(
            models.BPE(vocab={text: token for token, text in enumerate(texts)}, merges=merges, ignore_merges=rule.whole_words)
        )
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"the merges do not fit the vocabulary: {error}") from None
    backend.pre_tokenizer = rule.build()
    backend.decoder = decoders.ByteLevel()
    return backend, rule.bos


def _sentencepiece(metadata: Mapping[str, Any], texts: list[str], kinds: list[int]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(texts):
        raise ConfigError(f"{len(texts)} tokens but {len(scores or ())} scores")
    prefix = "always" if metadata.get("tokenizer.ggml.add_space_prefix", True) else "never"
    return build_sentencepiece(SentencePiece(pieces=texts, scores=scores, kinds=kinds, prefix=prefix))


def _wordpiece(metadata: Mapping[str, Any], texts: list[str], kinds: list[int]) -> Vocabulary:
    """BERT's words in pieces, in lower case and without accents, as llama.cpp has it of all of them.

    A file marks tokens that begin a word, as SentencePiece does, where vocab.txt marks those that go on.
    """
    ids = _special_ids(metadata, len(texts), _DEFAULT_IDS["bert"])
    begin, end, unknown = (ids.get(role) for role in ("cls_token", "sep_token", "unk_token"))
    if begin is None or end is None or unknown is None:
        raise ConfigError("the WordPiece vocabulary lacks its tokens for the beginning, for the end, or for unknown words")
    marked = {token for token, text in enumerate(texts) if text.startswith("[") and text.endswith("]")} | set(ids.values())
    words = [text if token in marked else text[1:] if text.startswith("▁") else f"##{text}" for token, text in enumerate(texts)]
    backend = Tokenizer(
        models.WordPiece({text: token for token, text in enumerate(words)}, unk_token=words[unknown], max_input_chars_per_word=_MAX_WORD)
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing((words[end], end), (words[begin], begin))
    add_marked_tokens(backend, words, kinds, special_ids=set(ids.values()))
    return Vocabulary(
        backend=backend, special_tokens={role: words[token] for role, token in ids.items()}, eos_ids=frozenset(), bos_id=None,
        prefix_ids=(begin,), suffix_ids=(end,),
    )  # fmt: skip


def _special_ids(metadata: Mapping[str, Any], num_tokens: int, defaults: Mapping[str, int]) -> dict[str, int]:
    ids = dict(defaults)
    for role, name in _ROLES.items():
        given = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if given is not None:
            ids[role] = given
    return {role: token for role, token in ids.items() if 0 <= token < num_tokens}


def _turn_marks(texts: list[str], kinds: list[int]) -> set[int]:
    """Tokens that end a turn; files forget to type some of them, but "</s>" as a plain word is HTML."""
    return {
        token for token, text in enumerate(texts)
        if text in END_OF_TURN and (kinds[token] in (CONTROL, USER_DEFINED) or text.startswith(("<|", "<｜")))
    }  # fmt: skip


def _eos_ids(metadata: Mapping[str, Any], marks: set[int], eos: int | None, num_tokens: int) -> frozenset[int]:
    found = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")} | {eos} | marks
    return frozenset(token for token in found if token is not None and 0 <= token < num_tokens)
