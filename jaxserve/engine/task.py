"""What a checkpoint is served for: text that goes on, or vectors; by --runner and --convert, else by what its files say."""

from __future__ import annotations

import logging
import pathlib

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.models.families import ENCODERS, find_family
from jaxserve.models.families.convert import Convert, default_convert
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.names import Family
from jaxserve.pooling import Pooling
from jaxserve.weights.sentence_transformers import makes_vectors, with_pooling

log = logging.getLogger(__name__)


def choose_family(config: EngineConfig, hf_config: HfConfig, path: pathlib.Path) -> tuple[Family, Pooling | None]:
    """The family of a checkpoint as it is to be run, and for vectors what front ends need to know of them.

    Raises: ConfigError if the checkpoint is not made for what --runner and --convert ask for.
    """
    runner, asked = config.model.runner, config.model.convert
    natural = default_convert(hf_config.architecture)
    is_encoder = find_family(hf_config, "none") in ENCODERS
    if runner == "generate":
        if is_encoder or natural == "classify":
            raise ConfigError(f"--runner=generate: {hf_config.architecture} does not write text; leave --runner out")
        if asked in ("embed", "classify"):
            raise ConfigError(f"--runner=generate and --convert={asked} contradict each other")
    convert = _convert(runner, asked, natural, has_modules=makes_vectors(path))
    if convert == "none" and not is_encoder:
        family = find_family(hf_config, "none")
        if not family.spec(hf_config).is_causal:
            raise ConfigError(f"{hf_config.architecture} with this config sees a text as a whole: it makes vectors; use --runner=pooling")
        return family, None
    if convert == "classify" and natural != "classify":
        raise ConfigError(f"--convert=classify: {hf_config.architecture} has no classifier; there must be one ...ForSequenceClassification")
    family, pooling = with_pooling(path, hf_config, find_family(hf_config, convert), matryoshka=config.model.matryoshka)
    log.info("serving vectors task=%s width=%d", pooling.task, pooling.width)
    return family, pooling


def _convert(runner: str, asked: str, natural: Convert, *, has_modules: bool) -> Convert:
    match asked:
        case "embed" | "classify":
            return asked
        case _ if runner == "generate":
            return "none"
        case _:
            return natural if natural != "none" else "embed" if has_modules or runner == "pooling" else "none"
