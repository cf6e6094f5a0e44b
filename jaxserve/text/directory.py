"""The tokenizer of a directory in Hugging Face's layout, read without transformers where the files allow it."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, cast

from tokenizers import AddedToken, Tokenizer

from jaxserve.errors import ConfigError
from jaxserve.text.sentencepiece import CONTROL, UNKNOWN, SentencePiece, build_sentencepiece, read_sentencepiece
from jaxserve.text.vocabulary import Vocabulary, add_marked_tokens

# Classes whose add_bos_token and add_eos_token override the post-processor of tokenizer.json.
_LLAMA_LIKE = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer", "GPTNeoXTokenizer")


def read_directory(path: pathlib.Path, *, load_slow: Callable[[pathlib.Path], tuple[Tokenizer, dict[str, str]]]) -> Vocabulary:
    """The tokenizer of a directory.

    Args:
      load_slow: converts vocab.json and merges.txt, whose word rules stand in Python classes only; it also gives the special tokens.
    Raises: ConfigError naming the file that is missing or cannot be read.
    """
    config = {**_read_json(path / "special_tokens_map.json"), **_read_json(path / "tokenizer_config.json")}
    defaults: dict[str, str] = {}
    adds_bos = False
    if (path / "tokenizer.json").is_file():
        backend = _read_backend(path / "tokenizer.json")
    elif (path / "tokenizer.model").is_file():
        model = _sentencepiece_of(path / "tokenizer.model", config)
        backend = build_sentencepiece(model)
        add_marked_tokens(backend, model.pieces, model.kinds, special_ids=())
        adds_bos = model.algorithm == "bpe"
        defaults = _default_tokens(model)
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        backend, defaults = load_slow(path)
    else:
        raise ConfigError(f"{path} holds no tokenizer: none of tokenizer.json, tokenizer.model, vocab.json with merges.txt")
    special_tokens = {**defaults, **_special_tokens(config)}
    _add_tokens(backend, path, config, special_tokens)
    return _finish(backend, path, config, special_tokens, adds_bos=adds_bos)


def _finish(
    backend: Tokenizer, path: pathlib.Path, config: Mapping[str, Any], special_tokens: dict[str, str], *, adds_bos: bool
) -> Vocabulary:
    bos, eos = (backend.token_to_id(special_tokens[role]) if role in special_tokens else None for role in ("bos_token", "eos_token"))
    prefix, suffix = _post_processing(backend)
    if adds_bos and bos is not None:
        prefix = (bos,)
    sentencepiece = not (path / "tokenizer.json").is_file() and (path / "tokenizer.model").is_file()
    if sentencepiece or str(config.get("tokenizer_class", "")).removesuffix("Fast") in _LLAMA_LIKE:
        prefix = _with_token(prefix, bos, config.get("add_bos_token"), front=True)
        suffix = _with_token(suffix, eos, config.get("add_eos_token"), front=False)
    return Vocabulary(
        backend=backend, special_tokens=special_tokens, eos_ids=frozenset(() if eos is None else (eos,)), bos_id=bos, prefix_ids=prefix,
        suffix_ids=suffix, chat_template=_chat_template(path, config),
    )  # fmt: skip


def _read_backend(path: pathlib.Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"cannot read {path}: {error}") from None


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return cast("dict[str, Any]", found)


def _sentencepiece_of(path: pathlib.Path, config: Mapping[str, Any]) -> SentencePiece:
    model = read_sentencepiece(path)
    prefix = model.prefix
    if config.get("add_prefix_space") is False:
        prefix = "never"
    elif prefix == "always" and config.get("legacy") is False:
        prefix = "first"
    return SentencePiece(
        pieces=model.pieces, scores=model.scores, kinds=model.kinds, algorithm=model.algorithm, prefix=prefix,
        collapse_spaces=model.collapse_spaces, charsmap=model.charsmap,
    )  # fmt: skip


def _default_tokens(model: SentencePiece) -> dict[str, str]:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    marks = {piece for piece, kind in zip(model.pieces, model.kinds, strict=True) if kind in (CONTROL, UNKNOWN)}
    return {role: text for role, text in names.items() if text in marks}


def _text_of(value: Any) -> str | None:
    if isinstance(value, Mapping):
        value = cast("Mapping[str, Any]", value).get("content")
    return value if isinstance(value, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Every "..._token" that the files give a text, the model's own kinds such as "image_token" included."""
    extra: Any = config.get("extra_special_tokens")
    values: dict[str, Any] = {**(cast("Mapping[str, Any]", extra) if isinstance(extra, Mapping) else {}), **config}
    return {name: text for name, value in values.items() if name.endswith("_token") and (text := _text_of(value)) is not None}


def _add_tokens(backend: Tokenizer, path: pathlib.Path, config: Mapping[str, Any], special_tokens: Mapping[str, str]) -> None:
    """Tokens that stand beside the vocabulary file, at the ids that the files give them."""
    adder: Any = backend  # its type stubs leave the lists untyped
    known = backend.get_added_tokens_decoder()
    wanted: dict[int, AddedToken] = {}
    for text, token in _read_json(path / "added_tokens.json").items():
        wanted[token] = AddedToken(text, special=False, normalized=False)
    decoder: dict[str, dict[str, Any]] = config.get("added_tokens_decoder") or {}
    for token, fields in decoder.items():
        options = {name: bool(fields.get(name, False)) for name in ("special", "normalized", "lstrip", "rstrip", "single_word")}
        wanted[int(token)] = AddedToken(fields["content"], **options)
    for token in sorted(wanted):
        mark = wanted[token]
        if token in known and known[token].content == mark.content and known[token].special == mark.special:
            continue
        if mark.special:
            adder.add_special_tokens([mark])
        else:
            adder.add_tokens([mark])
        if backend.token_to_id(mark.content) != token:
            raise ConfigError(
                f"{path}: added token {mark.content!r:.60} should have id {token} but gets {backend.token_to_id(mark.content)}"
            )
    special = {mark.content for mark in backend.get_added_tokens_decoder().values() if mark.special}
    roles = [text for text in dict.fromkeys(special_tokens.values()) if text not in special and backend.token_to_id(text) is not None]
    adder.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in roles])


def _post_processing(backend: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the post-processor of tokenizer.json puts around a text."""
    if backend.post_processor is None:
        return (), ()
    backend.no_padding()  # files of embedding models pad every text to one length
    backend.no_truncation()
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    raise ConfigError("the post-processor of tokenizer.json changes the text's own tokens, which is not known to make sense")


def _with_token(ids: tuple[int, ...], token: int | None, wanted: object, *, front: bool) -> tuple[int, ...]:
    if token is None or not isinstance(wanted, bool) or wanted == (token in ids):
        return ids
    if not wanted:
        return tuple(each for each in ids if each != token)
    return (token, *ids) if front else (*ids, token)


def _chat_template(path: pathlib.Path, config: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {file}: {error}") from None
    found: Any = _read_json(path / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in cast("list[dict[str, Any]]", found)}
        found = named.get("default", next(iter(named.values()), None))
    return found if isinstance(found, str) else None
