"""How text is cut into words before byte-level BPE, by the name that GGUF files give in `tokenizer.ggml.pre`.

GGUF names the rule and leaves the rule itself to the reader. A name that is not known here is refused: a wrong rule gives plausible but
wrong ids. Each rule is the list of regular expressions of the `tokenizer.json` of the models that bear the name; each cuts what the ones
before left.
"""

from __future__ import annotations

import dataclasses

from tokenizers import Regex, pre_tokenizers

from jaxserve.errors import ConfigError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_QWEN35 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED_TAIL}"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}|{_CASED_TAIL}"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CJK = r"[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK_LETTERS = (
    # Letters that have a case. Those that other forms of Unicode write differently stand as escapes.
    "[A-Za-z\u00b5À-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7d"
    "ᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛ"
    "Ꜣ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenization:
    """The rule of one name.

    Args:
      cuts: regular expressions; matches and what lies between them become pieces, then the next one cuts each piece.
      whole_words: a word that is itself in the vocabulary is taken whole, whatever the merges say.
      bos: text begins with the beginning-of-sequence token unless the file says otherwise.
    """

    cuts: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The rule as a pre-tokenizer, ending in the bytes of each word."""
        steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in self.cuts]
        return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_RULES: tuple[tuple[tuple[str, ...], PreTokenization], ...] = (
    (
        ("gpt-2", "mpt", "olmo", "jais", "phi-2", "trillion", "granite-docling", "gigachat", "roberta-bpe", "jina-es", "jina-de",
         "jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code"),
        PreTokenization(cuts=(_GPT2,)),
    ),
    (
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        PreTokenization(cuts=(_DIGIT, _GPT2)),
    ),
    (
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        PreTokenization(cuts=(_LLAMA3,), whole_words=True, bos=True),
    ),
    (("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), PreTokenization(cuts=(_LLAMA3,))),
    (("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), PreTokenization(cuts=(_QWEN2,))),
    (("qwen35",), PreTokenization(cuts=(_QWEN35,))),
    (("tekken",), PreTokenization(cuts=(_TEKKEN,), whole_words=True, bos=True)),
    (("gpt-4o", "llama4"), PreTokenization(cuts=(_GPT4O,))),
    (
        ("deepseek-llm",),
        PreTokenization(cuts=(r"[\r\n]", r"\s?" + _DEEPSEEK_LETTERS, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, r"\p{N}+")),
    ),
    (("deepseek-coder",), PreTokenization(cuts=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, _DIGIT))),
    (("deepseek-v3",), PreTokenization(cuts=(r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3))),
    (("falcon",), PreTokenization(cuts=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"))),
    (("default",), PreTokenization(cuts=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))),
    (("bloom", "gpt3-finnish", "poro-chat"), PreTokenization(cuts=(_BLOOM,))),
    (("viking",), PreTokenization(cuts=(_BLOOM, _DIGIT))),
)  # fmt: skip
_BY_NAME = {name: rule for names, rule in _RULES for name in names}
# Files written before the key existed: these families have one rule each.
_BY_ARCHITECTURE = {
    "gpt2": "gpt-2",
    "gptneox": "gpt-2",
    "mpt": "mpt",
    "olmo": "olmo",
    "falcon": "falcon",
    "starcoder": "starcoder",
    "bloom": "bloom",
}


def find_pretokenization(name: str | None, architecture: str) -> PreTokenization:
    """The rule of a `tokenizer.ggml.pre` name, or of the architecture in a file that has none.

    Raises: ConfigError for a name, or an architecture without a name, that is not known.
    """
    if name is None:
        name = _BY_ARCHITECTURE.get(architecture)
        if name is None:
            raise ConfigError(
                f"the GGUF file has no tokenizer.ggml.pre and its architecture {architecture!r} does not tell how text is cut into words; "
                "convert the model anew, or pass --tokenizer with a directory that holds tokenizer.json"
            )
    if name not in _BY_NAME:
        raise ConfigError(
            f"tokenizer.ggml.pre={name!r} is not known; known: {', '.join(sorted(_BY_NAME))}; "
            "pass --tokenizer with a directory that holds tokenizer.json"
        )
    return _BY_NAME[name]
