from __future__ import annotations

import json
import pathlib
import shutil

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from jaxserve.errors import ConfigError
from jaxserve.text.tokenizer import load_tokenizer


@pytest.fixture
def directory(bpe_directory: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(bpe_directory, tmp_path / "copy"))


def configure(path: pathlib.Path, **fields: object) -> None:
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_special_tokens_come_from_the_config(bpe_directory: pathlib.Path) -> None:
    tokenizer = load_tokenizer(bpe_directory)
    assert tokenizer.special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, {1})


def test_special_tokens_map_fills_what_the_config_lacks(directory: pathlib.Path) -> None:
    (directory / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<|im_start|>"}, "eos_token": "wrong"}))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.special_tokens == {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|im_start|>"}


def test_post_processor_surrounds_text(
    directory: pathlib.Path, bpe_backend: Backend, template_processing: processors.TemplateProcessing
) -> None:
    backend = Backend.from_str(bpe_backend.to_str())
    backend.post_processor = template_processing
    backend.save(str(directory / "tokenizer.json"))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode("fox", add_special_tokens=True) == [0, *tokenizer.encode("fox", add_special_tokens=False), 1]
    configure(directory, add_bos_token=False, add_eos_token=False, tokenizer_class="LlamaTokenizerFast")
    assert load_tokenizer(directory).encode("fox", add_special_tokens=True) == tokenizer.encode("fox", add_special_tokens=False)


@pytest.mark.parametrize(("kind", "adds"), [("LlamaTokenizerFast", True), ("GPT2TokenizerFast", False)])
def test_add_bos_token_counts_for_classes_that_heed_it(directory: pathlib.Path, kind: str, adds: bool) -> None:
    configure(directory, add_bos_token=True, tokenizer_class=kind)
    assert load_tokenizer(directory).encode("fox", add_special_tokens=True)[0] == 0 if adds else True
    assert (load_tokenizer(directory).prefix_text == "<|bos|>") is adds


def test_truncation_and_padding_of_the_file_are_not_applied(directory: pathlib.Path, bpe_backend: Backend, corpus: str) -> None:
    backend = Backend.from_str(bpe_backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(directory / "tokenizer.json"))
    assert len(load_tokenizer(directory).encode(corpus, add_special_tokens=False)) > 64
    assert len(load_tokenizer(directory).encode("fox", add_special_tokens=False)) < 4


def test_added_tokens_of_the_config_get_their_ids(directory: pathlib.Path) -> None:
    size = load_tokenizer(directory).vocab_size
    configure(
        directory,
        added_tokens_decoder={str(size): {"content": "<|new|>", "special": True}, str(size + 1): {"content": "<word>", "special": False}},
    )
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode("<|new|><word>", add_special_tokens=False) == [size, size + 1]
    assert size in tokenizer.special_ids
    assert size + 1 not in tokenizer.special_ids
    configure(directory, added_tokens_decoder={str(size + 7): {"content": "<|new|>", "special": True}})
    with pytest.raises(ConfigError, match="should have id"):
        load_tokenizer(directory)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", "plain"),
        ([{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}], "yes"),
        ([{"name": "only", "template": "this"}], "this"),
        (None, None),
    ],
)
def test_chat_template_of_the_config_is_found(directory: pathlib.Path, template: object, expected: str | None) -> None:
    configure(directory, chat_template=template)
    assert load_tokenizer(directory).chat_template == expected


def test_chat_template_files_win_over_the_config(directory: pathlib.Path) -> None:
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert load_tokenizer(directory).chat_template == "from json"
    (directory / "chat_template.jinja").write_text("from jinja")
    assert load_tokenizer(directory).chat_template == "from jinja"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_files_are_named(directory: pathlib.Path, name: str) -> None:
    (directory / name).write_text("{")
    with pytest.raises(ConfigError, match=name):
        load_tokenizer(directory)


def test_directory_without_tokenizer_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"none of tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="neither a directory nor"):
        load_tokenizer(tmp_path / "missing")


def test_vocab_and_merges_are_read_through_transformers(
    tmp_path: pathlib.Path, bpe_backend: Backend, bpe_directory: pathlib.Path, corpus: str
) -> None:
    model = json.loads(bpe_backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|eos|>", "bos_token": "<|bos|>"})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(corpus, add_special_tokens=False) == load_tokenizer(bpe_directory).encode(corpus, add_special_tokens=False)
    assert tokenizer.eos_ids == {1}
