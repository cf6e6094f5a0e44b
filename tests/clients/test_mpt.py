"""The first users' own example: an MPT, in the files that mpt-7b came in, served to LangChain's ChatOpenAI."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from transformers import MptConfig, MptForCausalLM, PreTrainedTokenizerFast

from tests.models.variants import shuffled
from tests.server.process import ServerProcess, serving
from tests.tiny import VOCAB, save_tokenizer

MESSAGES = [SystemMessage(content="You are a helpful assistant."), HumanMessage(content="What is the capital of France?")]
NAME = "mosaicml/mpt-7b"


@pytest.fixture(scope="module")
def reference() -> Any:
    torch.manual_seed(0)
    return shuffled(MptForCausalLM(MptConfig(d_model=64, n_heads=8, n_layers=2, vocab_size=VOCAB, max_seq_len=256)))


@pytest.fixture(scope="module")
def directory(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Two shards of .bin, llm-foundry's config.json, and GPT-NeoX's kind of tokenizer, without a chat template."""
    path = tmp_path_factory.mktemp("mpt")
    state = {name: tensor for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
    shards = {f"pytorch_model-{i + 1:05}-of-00002.bin": list(state)[i::2] for i in range(2)}
    for shard, names in shards.items():
        torch.save({name: state[name].clone() for name in names}, path / shard)
    places = {name: shard for shard, names in shards.items() for name in names}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (path / "config.json").write_text(json.dumps({
        "architectures": ["MPTForCausalLM"], "model_type": "mpt", "d_model": 64, "n_heads": 8, "n_layers": 2, "vocab_size": VOCAB,
        "max_seq_len": 256, "expansion_ratio": 4, "no_bias": True, "norm_type": "low_precision_layernorm", "learned_pos_emb": True,
        "logit_scale": None, "init_config": {"name": "kaiming_normal_"}, "use_cache": False, "torch_dtype": "bfloat16",
        "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"}, "tokenizer_name": "EleutherAI/gpt-neox-20b",
        "attn_config": {
            "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0, "attn_type": "multihead_attention",
            "attn_uses_sequence_id": False, "clip_qkv": None, "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
        },
    }))  # fmt: skip
    save_tokenizer(path, eos="<|endoftext|>", chat_template=None)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "GPTNeoXTokenizer"}))
    return path


@pytest.fixture(scope="module")
def server(directory: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    options = ("--served-model-name", NAME, "--dtype", "float32")
    with serving(tmp_path_factory.mktemp("server"), *options, model_path=str(directory)) as running:
        yield running


def test_system_and_human_messages_are_answered(server: ServerProcess) -> None:
    options: dict[str, Any] = {"api_key": "EMPTY", "max_retries": 0}
    llm = ChatOpenAI(model=NAME, base_url=f"{server.url}/v1", max_tokens=5, temperature=0, **options)  # type: ignore[call-arg]
    answer = llm.invoke(MESSAGES)
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] <= 5
    assert answer.response_metadata["model_name"] == NAME
    assert answer.content
    assert llm.invoke(MESSAGES).content == answer.content
    assert "".join(str(chunk.content) for chunk in llm.stream(MESSAGES)) == answer.content


def test_completion_is_transformers_own(server: ServerProcess, directory: pathlib.Path, reference: Any) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    prompt = tokenizer.encode("the capital of a country is")
    request = {"model": NAME, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    text = server.post("/v1/completions", request).json()["choices"][0]["text"]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(np.argmax(reference(torch.tensor([ids])).logits[0, -1].numpy())))
    assert text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
