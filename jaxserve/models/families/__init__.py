"""The families there are, and which of them takes a checkpoint."""

from __future__ import annotations

from jaxserve.errors import ConfigError
from jaxserve.models.families.llama import LLAMA
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.names import Family

FAMILIES = (LLAMA,)


def find_family(config: HfConfig) -> Family:
    """The family of a checkpoint.

    Raises: ConfigError listing the architectures there are.
    """
    for family in FAMILIES:
        if config.architecture in family.architectures:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise ConfigError(f"architecture {config.architecture!r} is not supported; there are {known}")
