"""The families there are, and which of them takes a checkpoint."""

from __future__ import annotations

from jaxserve.errors import ConfigError
from jaxserve.models.families.bloom import BLOOM, FALCON
from jaxserve.models.families.cohere import COHERE, COHERE2, GLM, GLM4, STABLELM
from jaxserve.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from jaxserve.models.families.gpt import GPT2, GPT_BIGCODE, GPT_NEOX, GPTJ, STARCODER2
from jaxserve.models.families.llama import LLAMA
from jaxserve.models.families.mpt import MPT
from jaxserve.models.families.olmo import EXAONE4, OLMO, OLMO2, OLMO3
from jaxserve.models.families.opt import OPT
from jaxserve.models.families.phi import PHI, PHI3
from jaxserve.models.families.qwen import QWEN2, QWEN3
from jaxserve.models.families.relatives import RELATIVES
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.names import Family

FAMILIES = (
    LLAMA, MPT, *RELATIVES, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI, PHI3, GPT2, GPT_BIGCODE, GPTJ, GPT_NEOX, STARCODER2, OPT, BLOOM,
    FALCON, OLMO, OLMO2, OLMO3, EXAONE4, COHERE, COHERE2, STABLELM, GLM, GLM4,
)  # fmt: skip


def find_family(config: HfConfig) -> Family:
    """The family of a checkpoint.

    Raises: ConfigError listing the architectures there are.
    """
    for family in FAMILIES:
        if config.architecture in family.architectures:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise ConfigError(f"architecture {config.architecture!r} is not supported; there are {known}")
