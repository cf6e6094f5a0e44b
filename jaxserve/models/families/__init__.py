"""The families there are, and which of them takes a checkpoint."""

from __future__ import annotations

import functools
import logging

from jaxserve.errors import ConfigError
from jaxserve.models.families.bert import BERTS
from jaxserve.models.families.bloom import BLOOM, FALCON
from jaxserve.models.families.cohere import COHERE, COHERE2, GLM, GLM4, STABLELM
from jaxserve.models.families.convert import Convert, converted, default_convert, generative_names
from jaxserve.models.families.dbrx import DBRX
from jaxserve.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE
from jaxserve.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from jaxserve.models.families.gpt import GPT2, GPT_BIGCODE, GPT_NEOX, GPTJ, STARCODER2
from jaxserve.models.families.gpt_oss import GPT_OSS
from jaxserve.models.families.gte import GTE, NOMIC_BERT
from jaxserve.models.families.llama import LLAMA
from jaxserve.models.families.llama4 import LLAMA4
from jaxserve.models.families.mixtral import GRANITE_MOE, MIXTRAL, OLMOE, PHIMOE
from jaxserve.models.families.mpt import MPT
from jaxserve.models.families.olmo import EXAONE4, OLMO, OLMO2, OLMO3
from jaxserve.models.families.opt import OPT
from jaxserve.models.families.phi import PHI, PHI3
from jaxserve.models.families.qwen import QWEN2, QWEN3
from jaxserve.models.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from jaxserve.models.families.relatives import RELATIVES
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.names import Family

log = logging.getLogger(__name__)

_QUANTIZATIONS = ("fp8", "mxfp4")
ENCODERS = (*BERTS, GTE, NOMIC_BERT)

FAMILIES = (
    LLAMA, MPT, *RELATIVES, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI, PHI3, GPT2, GPT_BIGCODE, GPTJ, GPT_NEOX, STARCODER2, OPT, BLOOM,
    FALCON, OLMO, OLMO2, OLMO3, EXAONE4, COHERE, COHERE2, STABLELM, GLM, GLM4, *ENCODERS,
    MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE, GRANITE_MOE, PHIMOE, DBRX, LLAMA4,
)  # fmt: skip


def find_family(config: HfConfig, convert: Convert | None = None) -> Family:
    """The family of a checkpoint; an unknown decoder that says of itself only what a Llama would is taken for one.

    Args:
      convert: what to make of a decoder; None goes by the architecture's name.
    Raises: ConfigError listing the architectures there are; on a quantization that cannot be read.
    """
    _check_quantization(config)
    for name in generative_names(config.architecture):
        for family in FAMILIES:
            if name in family.architectures:
                # An encoder is made for vectors as it is.
                return family if family in ENCODERS else converted(family, convert or default_convert(config.architecture))
    difference = _difference_from_llama(config)
    if difference is None:
        _warn_of_assumption(config.architecture)
        return converted(LLAMA, convert or default_convert(config.architecture))
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise ConfigError(
        f"architecture {config.architecture!r} is not supported, and is no Llama by another name: {difference}; there are {known}"
    )


def _check_quantization(config: HfConfig) -> None:
    """Quantized matrices are read as numbers, by what the tensors are; the config must not say that they are anything else."""
    given = config.child("quantization_config")
    method = given.get("quant_method")
    if method not in (None, *_QUANTIZATIONS):
        raise ConfigError(
            f"quantization_config: quant_method={method!r:.40} is not supported; there are {', '.join(_QUANTIZATIONS)}; take the "
            "checkpoint before its quantization, or a GGUF file"
        )
    if given.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise ConfigError(f"quantization_config: fmt={given.get('fmt')!r:.40} is not supported; there is e4m3")
    for key in ("weight_block_size", "modules_to_not_convert", "ignored_layers", "activation_scheme", "scale_fmt", "dequantize"):
        given.get(key)  # the tensors tell, or it is about inputs, which are not quantized here


def _difference_from_llama(config: HfConfig) -> str | None:
    """What a config says that a Llama's would not; None if nothing. Its tensors are compared by name when they are loaded."""
    copy = HfConfig(config.values)
    copy.get("quantization_config")
    if "rms_norm_eps" not in config.values:  # the one key of a Llama that other kinds of decoder have not
        return "rms_norm_eps is not given"
    try:
        LLAMA.spec(copy)
    except ConfigError as error:
        return str(error)
    unread = ", ".join(f"{key}={value!r:.80}" for key, value in copy.unread().items())
    return f"a Llama has no {unread}" if unread else None


@functools.cache
def _warn_of_assumption(architecture: str) -> None:
    """Once an architecture, however often its family is asked for."""
    log.warning(
        "architecture %s is not known and taken for a Llama by another name, as its config says nothing else: RMS norms before "
        "attention and MLP, rotary positions on halves of whole heads, a gated MLP; compare an answer with the maker's",
        architecture,
    )
