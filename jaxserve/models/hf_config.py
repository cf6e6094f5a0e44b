"""A model's config.json as a mapping that remembers what was read, so that nothing of it is ignored by mistake.

1. A family reads the keys it understands; an ill-typed value is an error that names key and value.
2. Whatever nobody has read and is not known to be harmless is what `unread` returns; the loader refuses the model for it.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, TypeVar, overload

from jaxserve.errors import ConfigError

_T = TypeVar("_T", bool, int, float, str)

# Keys that do not change what the model computes from token ids: bookkeeping, training, and how answers are chosen.
_HARMLESS = frozenset((
    "architectures", "attn_implementation", "auto_map", "chunk_size_feed_forward", "dtype", "finetuning_task", "gradient_checkpointing",
    "id2label", "is_decoder", "is_encoder_decoder", "is_llama_config", "label2id", "model_type", "name_or_path", "output_attentions",
    "output_hidden_states", "problem_type", "return_dict", "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache", "attention_dropout", "attn_pdrop", "classifier_dropout",
    "dropout", "embd_pdrop", "embedding_dropout", "hidden_dropout", "hidden_dropout_prob", "initializer_range", "mlp_dropout",
    "prune_heads", "pruned_heads", "resid_pdrop", "residual_dropout", "task_specific_params", "tie_encoder_decoder", "bos_token_id",
    "cls_token_id", "decoder_start_token_id", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id", "pad_token_id", "sep_token_id",
    "unk_token_id", "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "length_penalty", "max_length", "min_length",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix", "remove_invalid_values",
    "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature", "tf_legacy_loss", "top_k", "top_p", "typical_p",
    "use_bfloat16", "cache_implementation", "activation_dropout", "embed_dropout", "embedding_dropout",
    "attention_softmax_in_fp32", "initializer_factor", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
    "input_jitter_noise", "aux_loss_alpha", "seq_aux",
))  # fmt: skip
# Keys that change nothing while they hold this value.
_NEUTRAL: Mapping[str, Any] = types.MappingProxyType(
    {
        "add_cross_attention": False, "cross_attention_hidden_size": None, "pretraining_tp": 1, "rope_interleaved": False,
        "use_sliding_window": False, "partial_rotary_factor": 1.0, "use_bidirectional_attention": False, "is_causal": True,
        "use_mrope": False, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "rotary": True, "n_inner": None,
        "apply_residual_connection_post_layernorm": False, "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj", "rotary_pct": 1.0, "use_embedding_sharing": True, "use_gated_activation": True,
        "use_parallel_block": True, "use_parallel_embedding": False,
    }
)  # fmt: skip
# For a config.json that has a model_type and no architectures.
MODEL_TYPES: Mapping[str, str] = types.MappingProxyType(
    {
        "llama": "LlamaForCausalLM", "mpt": "MptForCausalLM", "mistral": "MistralForCausalLM", "ministral": "MinistralForCausalLM",
        "arcee": "ArceeForCausalLM", "seed_oss": "SeedOssForCausalLM", "internlm2": "InternLM2ForCausalLM",
        "internlm3": "InternLM3ForCausalLM", "smollm3": "SmolLM3ForCausalLM", "granite": "GraniteForCausalLM",
        "minicpm": "MiniCPMForCausalLM", "nemotron": "NemotronForCausalLM", "exaone": "ExaoneForCausalLM",
        "exaone4": "Exaone4ForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "gemma": "GemmaForCausalLM",
        "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM", "phi": "PhiForCausalLM", "phi3": "Phi3ForCausalLM",
        "gpt2": "GPT2LMHeadModel", "gpt_bigcode": "GPTBigCodeForCausalLM", "gptj": "GPTJForCausalLM", "gpt_neox": "GPTNeoXForCausalLM",
        "starcoder2": "Starcoder2ForCausalLM", "opt": "OPTForCausalLM", "bloom": "BloomForCausalLM", "falcon": "FalconForCausalLM",
        "olmo": "OlmoForCausalLM", "olmo2": "Olmo2ForCausalLM", "olmo3": "Olmo3ForCausalLM", "cohere": "CohereForCausalLM",
        "cohere2": "Cohere2ForCausalLM", "stablelm": "StableLmForCausalLM", "glm": "GlmForCausalLM", "glm4": "Glm4ForCausalLM",
        "bert": "BertModel", "roberta": "RobertaModel", "xlm-roberta": "XLMRobertaModel", "distilbert": "DistilBertModel",
        "mpnet": "MPNetModel", "modernbert": "ModernBertModel", "new": "NewModel", "gte": "GteModel", "nomic_bert": "NomicBertModel",
        "mixtral": "MixtralForCausalLM", "olmoe": "OlmoeForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM",
        "qwen3_moe": "Qwen3MoeForCausalLM", "gpt_oss": "GptOssForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM",
        "deepseek_v3": "DeepseekV3ForCausalLM", "glm4_moe": "Glm4MoeForCausalLM", "granitemoe": "GraniteMoeForCausalLM",
        "granitemoeshared": "GraniteMoeSharedForCausalLM", "phimoe": "PhimoeForCausalLM", "dbrx": "DbrxForCausalLM",
        "llama4_text": "Llama4ForCausalLM",
    }
)  # fmt: skip
_ROPE_NUMBERS = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "attention_factor",
    "beta_fast", "beta_slow", "partial_rotary_factor", "short_mscale", "long_mscale", "mixed_b",
)  # fmt: skip


# JSON's integers have no bound; beyond this one they are no number that a model has.
_HUGE = 1e30


def _is_harmless(key: str) -> bool:
    return key in _HARMLESS or key.startswith("_")  # transformers' own notes, such as _name_or_path


class HfConfig:
    """The keys of a config.json, and which of them have been read.

    Args:
      values: the JSON object.
      generation: the object of generation_config.json; empty if there is none.
      source: the file that messages name.
    """

    def __init__(self, values: Mapping[str, Any], *, generation: Mapping[str, Any] | None = None, source: str = "config.json") -> None:
        self._values = dict(values)
        self._read: set[str] = set()
        self._ropes: dict[str | None, _RopeParameters] = {}
        self._children: dict[str, HfConfig] = {}
        self._source = source
        self.generation: Mapping[str, Any] = types.MappingProxyType(dict(generation or {}))

    @property
    def values(self) -> Mapping[str, Any]:
        """Every key, for those who copy the config; looking here does not count as reading."""
        return types.MappingProxyType(self._values)

    @property
    def architecture(self) -> str:
        """The first of "architectures", else what "model_type" stands for.

        Raises: ConfigError if there is neither.
        """
        named = self._values.get("architectures")
        if isinstance(named, list) and named and isinstance(named[0], str):
            return named[0]
        if named not in (None, []):
            raise ConfigError(f"{self._source}: architectures={named!r:.80} is not a list of names")
        model_type = self._values.get("model_type")
        if not isinstance(model_type, str):
            raise ConfigError(f'{self._source} has neither "architectures" nor "model_type", so it does not say what the model is')
        return MODEL_TYPES.get(model_type, model_type)

    @overload
    def get(self, key: str, default: _T) -> _T: ...

    @overload
    def get(self, key: str, default: None = None) -> Any: ...

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, of the type of `default`; absent and null are `default`.

        Raises: ConfigError naming key and value if its type is another; with default None any type will do.
        """
        self._read.add(key)
        value = self._values.get(key)
        if value is None:
            return default
        return value if default is None else self._typed(key, value, type(default))

    def require(self, key: str, kind: type[_T]) -> _T:
        """The value of a key that must be there; a number must be positive, since what a model cannot do without is a size.

        Raises: ConfigError naming the key, and the value if there is one.
        """
        self._read.add(key)
        value = self._values.get(key)
        if value is None:
            raise ConfigError(f"{self._source} has no {key}")
        typed: _T = self._typed(key, value, kind)
        if isinstance(typed, int | float) and not isinstance(typed, bool) and not typed > 0:
            raise ConfigError(f"{self._source}: {key}={value!r} must be positive")
        return typed

    def child(self, key: str) -> HfConfig:
        """The object under a key as a config of its own; absent and null are an empty one. What nobody reads of it counts as unread.

        Raises: ConfigError if it is no object.
        """
        if key not in self._children:
            value = self.get(key)
            if value is not None and not isinstance(value, dict):
                raise ConfigError(f"{self._source}: {key}={value!r:.80} is not an object")
            self._children[key] = HfConfig(value or {}, source=f"{self._source}: {key}")
        return self._children[key]

    def rope_parameters(self, kind: str | None = None) -> Mapping[str, Any]:
        """Rotary positions as transformers 5 writes them: rope_type (at least), rope_theta, factor and so on.

        Older files have rope_theta at the top and rope_scaling, in which rope_type may be called type. Keys of the result that
        nobody reads are reported by `unread`.

        Args:
          kind: of layer, for configs in which they may differ, such as "full_attention".
        Raises: ConfigError naming key and value that are ill-typed; on parameters that differ by kind of layer if no kind is given.
        """
        if kind not in self._ropes:
            self._ropes[kind] = _RopeParameters(self._normalized_rope(kind), self._source)
        return self._ropes[kind]

    def unread(self, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Keys and values that nobody read, but for null, for the harmless, and for those that equal `defaults`."""
        neutral = {**_NEUTRAL, **(defaults or {})}
        left = {
            key: value
            for key, value in self._values.items()
            if key not in self._read and not _is_harmless(key) and value is not None and not (key in neutral and neutral[key] == value)
        }
        for kind, rope in self._ropes.items():
            prefix = "rope_parameters" if kind is None else f"rope_parameters.{kind}"
            left |= {f"{prefix}.{key}": value for key, value in rope.unread().items()}
        for name, child in self._children.items():
            left |= {f"{name}.{key}": value for key, value in child.unread().items()}
        return left

    def _typed(self, key: str, value: Any, kind: type[Any]) -> Any:
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE:
            return float(value)
        if kind is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if type(value) is kind:
            return value
        raise ConfigError(f"{self._source}: {key}={value!r:.80} is not of type {kind.__name__}")

    def _normalized_rope(self, kind: str | None) -> dict[str, Any]:
        rope: dict[str, Any] = {}
        theta = self.get("rope_theta")
        if theta is not None:
            rope["rope_theta"] = theta
        for key in ("rope_scaling", "rope_parameters"):
            given = self.get(key)
            if given is None:
                continue
            if not isinstance(given, dict):
                raise ConfigError(f"{self._source}: {key}={given!r:.80} is not an object")
            by_layer = [name for name, value in given.items() if isinstance(value, dict)]
            if kind is not None and by_layer:
                given = given.get(kind)
                if not isinstance(given, dict):
                    raise ConfigError(f"{self._source}: {key} says nothing of {kind}, only of {', '.join(by_layer)}")
            elif by_layer:
                raise ConfigError(f"{self._source}: {key} differs by kind of layer ({', '.join(by_layer)}), which is not supported")
            rope |= {name: value for name, value in given.items() if value is not None}
        legacy_type = rope.pop("type", None)
        rope.setdefault("rope_type", "default" if legacy_type is None else legacy_type)
        if not isinstance(rope["rope_type"], str):
            raise ConfigError(f"{self._source}: rope_type={rope['rope_type']!r:.80} is not of type str")
        for name in _ROPE_NUMBERS:
            value = rope.get(name)
            if value is not None and not (isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _HUGE):
                raise ConfigError(f"{self._source}: {name}={value!r:.80} of the rotary positions is not a positive number")
        return rope


class _RopeParameters(Mapping[str, Any]):
    """The normalized parameters; a missing one that is needed is the config's fault, not a KeyError."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self._values = values
        self._read: set[str] = set()
        self._source = source

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        if key not in self._values:
            raise ConfigError(f"{self._source}: rope_type={self._values['rope_type']!r} needs {key}, which is not given")
        return self._values[key]

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return self._values.get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Any:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def unread(self) -> dict[str, Any]:
        """What nobody has asked for, but for what changes nothing."""
        neutral = {"partial_rotary_factor": 1.0}
        return {key: value for key, value in self._values.items() if key not in self._read and neutral.get(key) != value}
