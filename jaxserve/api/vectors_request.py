"""The bodies of /v1/embeddings, /pooling, /classify, /score and /rerank as typed requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, Literal

from jaxserve.api.fields import Fields
from jaxserve.api.json_door import is_array, is_object, json_type
from jaxserve.api.parameters import check_parameters
from jaxserve.api.prompts import read_cache_salt, read_prompts, read_request_id, read_truncation
from jaxserve.api.protocol import Rendering, read_rendering, read_template_kwargs
from jaxserve.api.vectors_encoding import Encoding, read_encoding

MAX_INPUTS = 2048
MAX_PROMPT_NAME_CHARS = 128

_COMMON = frozenset(
    {
        "model", "truncate_prompt_tokens", "truncation_side", "priority", "cache_salt", "request_id", "use_activation", "padding",
        "normalize",
    }
)  # fmt: skip
_INPUTS = _COMMON | frozenset(
    {
        "input", "messages", "add_special_tokens", "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "documents",
        "reasoning_effort", "tools", "tool_choice", "prompt_name", "dimensions", "encoding_format", "embed_dtype", "endianness", "task",
    }
)  # fmt: skip
# Probabilities of labels have names beside them: they are JSON in any case.
NOT_OF_CLASSES = frozenset({"encoding_format", "embed_dtype", "endianness", "dimensions"})
_PAIRS = _COMMON | {"max_tokens_per_query", "max_tokens_per_doc", "instruction", "chat_template_kwargs"}
_SIDES = (("queries", "documents"), ("text_1", "text_2"), ("data_1", "data_2"), ("queries", "items"))
_RERANK = _PAIRS | {"query", "documents", "top_n", "return_documents"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VectorOptions:
    """What all of these routes share.

    Args:
      truncate: keep at most so many tokens of an input; -1 as many as fit; None refuses longer ones.
      side: the end that is cut.
      use_activation: normalize embeddings, make probabilities; None is as the model has it.
    """

    model: str | None
    truncate: int | None
    side: Literal["left", "right"]
    priority: int
    cache_salt: str | None
    request_id: str
    use_activation: bool | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InputsRequest:
    """The body of /v1/embeddings, /pooling and /classify.

    Args:
      inputs: texts, token ids, or one conversation.
      task: what /pooling shall give; None is the model's own.
    """

    options: VectorOptions
    inputs: list[str] | list[list[int]] | Rendering
    add_special_tokens: bool
    prompt_name: str | None
    dimensions: int | None
    encoding: Encoding
    task: str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PairsRequest:
    """The body of /score and /rerank.

    Args:
      names: what the body calls queries and documents.
      max_query, max_document: tokens of each text to keep.
      template_kwargs: variables for the template that pairs are printed with.
      top_n: the best so many results alone; 0 is all.
      return_documents: show the documents' texts in the results.
    """

    options: VectorOptions
    queries: list[str]
    documents: list[str]
    names: tuple[str, str]
    max_query: int | None
    max_document: int | None
    template_kwargs: dict[str, Any]
    top_n: int = 0
    return_documents: bool = True


def read_inputs(fields: Fields, *, vocab_size: int, max_len: int, foreign: Collection[str] = ()) -> InputsRequest:
    """Read texts whose vectors are wanted.

    Args:
      foreign: names that the route has no use for.
    Raises: UserError naming the field at fault.
    """
    check_parameters(fields, _INPUTS.difference(foreign), foreign)
    inputs: list[str] | list[list[int]] | Rendering
    if fields.given("messages"):
        if fields.given("input"):
            raise fields.error("messages", "and input cannot both be given")
        begin = fields.flag("add_generation_prompt", False)
        inputs = dataclasses.replace(read_rendering(fields), add_generation_prompt=begin)
    else:
        inputs = read_prompts(fields, "input", max_items=MAX_INPUTS, vocab_size=vocab_size, max_len=max_len)
    return InputsRequest(
        options=_options(fields), inputs=inputs, add_special_tokens=fields.flag("add_special_tokens", not isinstance(inputs, Rendering)),
        prompt_name=fields.text("prompt_name", None, max_chars=MAX_PROMPT_NAME_CHARS),
        dimensions=fields.integer("dimensions", None, low=1, high=2**31 - 1), encoding=read_encoding(fields),
        task=fields.text("task", None, choices=("embed", "classify")),
    )  # fmt: skip


def read_score(fields: Fields) -> PairsRequest:
    """Read pairs of texts, under any of the names that vLLM has for them. Raises: UserError naming the field at fault."""
    names = next((names for names in _SIDES if all(fields.given(name) for name in names)), _SIDES[0])
    check_parameters(fields, _PAIRS | set(names))
    queries, documents = (_texts(fields, name) for name in names)
    return _pairs(fields, queries, documents, names)


def read_rerank(fields: Fields) -> PairsRequest:
    """Read a query and documents to be ordered by it. Raises: UserError naming the field at fault."""
    check_parameters(fields, _RERANK)
    query = fields.text("query", None)
    if query is None:
        raise fields.error("query", "is required")
    pairs = _pairs(fields, [query], _texts(fields, "documents"), ("query", "documents"))
    top_n = fields.integer("top_n", 0, low=0, high=2**31 - 1)
    return dataclasses.replace(pairs, top_n=top_n, return_documents=fields.flag("return_documents", True))


def _options(fields: Fields) -> VectorOptions:
    if fields.given("normalize"):
        raise fields.error("normalize", "is not known, in vLLM neither; use use_activation", code="unsupported_parameter")
    fields.text("padding", "do_not_pad", choices=("do_not_pad",))
    side = fields.text("truncation_side", "right", choices=("left", "right"))
    return VectorOptions(
        model=fields.text("model", None), truncate=read_truncation(fields), side="left" if side == "left" else "right",
        priority=fields.integer("priority", 0, low=-(2**31), high=2**31 - 1), cache_salt=read_cache_salt(fields),
        request_id=read_request_id(fields), use_activation=fields.flag("use_activation", None),
    )  # fmt: skip


def _pairs(fields: Fields, queries: list[str], documents: list[str], names: tuple[str, str]) -> PairsRequest:
    instruction = fields.text("instruction", None)
    kwargs = ({} if instruction is None else {"instruction": instruction}) | read_template_kwargs(fields)
    limits = [fields.integer(name, 0, low=0, high=2**31 - 1) for name in ("max_tokens_per_query", "max_tokens_per_doc")]
    return PairsRequest(
        options=_options(fields),
        queries=queries,
        documents=documents,
        names=names,
        max_query=limits[0] or None,
        max_document=limits[1] or None,
        template_kwargs=kwargs,
    )


def _texts(fields: Fields, name: str) -> list[str]:
    """A text or an array of texts; an object is one if it has a text, as Cohere's and Jina's documents have."""
    value = fields.raw(name)
    if value is None:
        raise fields.error(name, "is required")
    if isinstance(value, str):
        return [value]
    if not is_array(value):
        raise fields.error(name, f"must be a string or an array of strings, not {json_type(value)}")
    items: Sequence[Any] = fields.array(name, [], max_items=MAX_INPUTS)
    if not items:
        raise fields.error(name, "must not be empty")
    texts: list[str] = []
    for position, item in enumerate(items):
        text = item.get("text") if is_object(item) else item
        if not isinstance(text, str):
            raise fields.error(f"{name}[{position}]", f'must be a string or {{"text": ...}}, not {json_type(item)}')
        texts.append(text)
    return texts
