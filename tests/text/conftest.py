"""Small tokenizers of each kind, made on the spot."""

from __future__ import annotations

import json
import pathlib

import gguf
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from jaxserve.text.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, SentencePiece
from jaxserve.text.tokenizer import Tokenizer, load_tokenizer
from jaxserve.text.vocabulary import Vocabulary

TEXT = (
    "The quick brown fox jumps over the lazy dog. It's 2024, isn't it? 12345 apples\n\n    def main():\n\treturn 'ok'\n"
    "Führer нещо на Български 日本語のテキスト 你好世界 🦙🦙 👩‍👩‍👧 e\u0301 naïve café\n"
) * 3


@pytest.fixture(scope="session")
def corpus() -> str:
    return TEXT


@pytest.fixture(scope="session")
def bpe_backend() -> Backend:
    """Byte-level BPE with three special tokens and one added word."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|bos|>", "<|eos|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return backend


@pytest.fixture(scope="session")
def bpe_directory(bpe_backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("bpe")
    bpe_backend.save(str(path / "tokenizer.json"))
    config = {"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}, "chat_template": "{{ messages[0].content }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def bpe(bpe_directory: pathlib.Path) -> Tokenizer:
    return load_tokenizer(bpe_directory)


@pytest.fixture(scope="session")
def pieces() -> SentencePiece:
    """A SentencePiece BPE vocabulary with byte fallback: words, runs of spaces, one user-defined symbol."""
    words = [
        "▁t",
        "he",
        "▁the",
        "▁▁",
        "▁▁▁",
        "▁▁▁▁",
        "in",
        "ing",
        "▁th",
        "aa",
        "aaa",
        "日本",
        "é",
        "qu",
        "▁qu",
        "ick",
        "ck",
        "er",
        "▁o",
        "ver",
    ]
    letters = sorted({"▁", "日", "本", "é", *"abcdefghijklmnopqrstuvwxyz.,!'0123456789THEI"})
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<mark up>", *words, *letters]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, USER_DEFINED, *[NORMAL] * (len(words) + len(letters))]
    ordinary = [-float(rank) for rank in range(len(words) + len(letters))]
    unique = {text: place for place, text in reversed(list(enumerate(texts)))}
    keep = sorted(unique.values())
    scores = [0.0] * 260 + ordinary
    return SentencePiece(pieces=[texts[i] for i in keep], scores=[scores[i] for i in keep], kinds=[kinds[i] for i in keep])


@pytest.fixture(scope="session")
def spm_gguf(pieces: SentencePiece, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("spm") / "spm.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(list(pieces.pieces))
    writer.add_token_scores(list(pieces.scores))
    writer.add_token_types(list(pieces.kinds))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    _write(writer)
    return path


@pytest.fixture(scope="session")
def spm(spm_gguf: pathlib.Path) -> Tokenizer:
    return load_tokenizer(spm_gguf)


@pytest.fixture(scope="session")
def wordpiece() -> Tokenizer:
    """A tokenizer whose tokens are written differently after different neighbours."""
    vocab = {text: token for token, text in enumerate(["[UNK]", "un", "##able", "able", "to", "go", ",", "日", "本", "##s"])}
    backend = Backend(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return Tokenizer(Vocabulary(backend=backend, special_tokens={}, eos_ids=frozenset(), bos_id=None))


@pytest.fixture(params=["bpe", "spm", "wordpiece"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def template_processing() -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single="<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)])


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
