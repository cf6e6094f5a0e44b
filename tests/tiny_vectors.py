"""Tiny random models of vectors with tokenizers of their own, as sentence-transformers and transformers write them."""

from __future__ import annotations

import functools
import json
import pathlib
import tempfile
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.models.variants import shuffled
from tests.tiny import TEXT, save_tokenizer

VOCAB, WIDTH, MAX_LEN = 320, 32, 48
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
PROMPTS = {"query": "query: ", "document": "text: "}


@functools.cache
def tiny_encoder(
    *, family: str = "Bert", mode: str = "mean_tokens", dense: int | None = None, normalize: bool = True,
    matryoshka: tuple[int, ...] | None = None,
) -> pathlib.Path:  # fmt: skip
    """A BERT, or another family of transformers, with the modules of sentence-transformers, for texts of MAX_LEN tokens.

    Args:
      mode: of pooling.
      dense: width of a layer with tanh behind it.
      matryoshka: lengths to which embeddings may be cut.
    """
    directory = _directory()
    torch.manual_seed(11)
    config = getattr(transformers, f"{family}Config")(**SIZES)
    model = shuffled(getattr(transformers, f"{family}Model")(config))
    if matryoshka is not None:
        model.config.matryoshka_dimensions = list(matryoshka)
    model.save_pretrained(directory)
    save_pair_tokenizer(directory)
    save_modules(directory, mode=mode, dense=dense, normalize=normalize)
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": MAX_LEN, "do_lower_case": False}))
    (directory / "config_sentence_transformers.json").write_text(json.dumps({"prompts": PROMPTS, "default_prompt_name": None}))
    return directory


@functools.cache
def tiny_classifier(*, num_labels: int = 1) -> pathlib.Path:
    """A BERT with a classifier: a cross-encoder if it has one label."""
    directory = _directory()
    torch.manual_seed(13)
    names: dict[int, str] = {0: "SCORE"} if num_labels == 1 else dict(enumerate(("bad", "good", "odd")[:num_labels]))
    shuffled(BertForSequenceClassification(BertConfig(**SIZES, id2label=names))).save_pretrained(directory)
    save_pair_tokenizer(directory)
    return directory


@functools.cache
def tiny_decoder(*, mode: str | None = "lasttoken") -> pathlib.Path:
    """A Llama, and the modules that make it an embedder, unless mode is None."""
    directory = _directory()
    torch.manual_seed(17)
    sizes: dict[str, Any] = {key: value for key, value in SIZES.items() if key != "pad_token_id"} | {"max_position_embeddings": 256}
    shuffled(LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, eos_token_id=0, bos_token_id=None))).save_pretrained(directory)
    save_tokenizer(directory, eos="<|end|>", chat_template="{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}")
    if mode is not None:
        save_modules(directory, mode=mode, dense=None, normalize=True)
    return directory


def save_modules(directory: pathlib.Path, *, mode: str, dense: int | None, normalize: bool) -> None:
    """Write modules.json and what it lists."""
    listed = [("", "Transformer"), ("1_Pooling", "Pooling")]
    (directory / "1_Pooling").mkdir()
    flags = {f"pooling_mode_{name}": name == mode for name in ("cls_token", "mean_tokens", "max_tokens", "lasttoken", mode)}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH, **flags}))
    if dense is not None:
        listed.append(("2_Dense", "Dense"))
        (directory / "2_Dense").mkdir()
        options = {"in_features": WIDTH, "out_features": dense, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
        (directory / "2_Dense" / "config.json").write_text(json.dumps(options))
        save_file(dense_weights(dense), directory / "2_Dense" / "model.safetensors")
    if normalize:
        listed.append(("3_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(listed)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))


def dense_weights(width: int) -> dict[str, torch.Tensor]:
    """The tensors of the Dense module."""
    generator = torch.Generator().manual_seed(5)
    return {
        "linear.weight": torch.randn(width, WIDTH, generator=generator) * 0.3,
        "linear.bias": torch.randn(width, generator=generator) * 0.3,
    }


def save_pair_tokenizer(directory: pathlib.Path) -> None:
    """Write a byte-level BPE tokenizer that puts [CLS] and [SEP] around texts and between those of a pair, as BERT's does."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = ["[PAD]", "[CLS]", "[SEP]"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXT * 3, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    backend.enable_padding(length=16)  # as files of embedding models do
    backend.enable_truncation(16)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]").save_pretrained(directory)


@functools.cache
def reference(path: pathlib.Path) -> Any:
    """transformers' model of the checkpoint: the one its config names."""
    name = json.loads((path / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(path, dtype=torch.float32).eval()


def _directory() -> pathlib.Path:
    return pathlib.Path(tempfile.mkdtemp(prefix="jaxserve-vectors-"))
