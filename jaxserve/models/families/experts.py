"""What the configs and checkpoints of models with experts have in common: readers, and names of tensors."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.errors import ConfigError
from jaxserve.models.families import parts
from jaxserve.models.hf_config import HfConfig
from jaxserve.models.mlp_spec import MlpSpec, MoeSpec, RouterSpec
from jaxserve.models.names import Names, stored


def read_moe(
    config: HfConfig, router: RouterSpec, *, count: str = "num_local_experts", width: str = "intermediate_size",
    shared_width: int = 0, shared_gate: bool = False,
) -> MoeSpec:  # fmt: skip
    """Experts as most configs have them.

    Args:
      count, width: the keys for how many there are, and of each one's hidden width.
      shared_width: of the expert that every token goes through; 0 is none.
    Raises: ConfigError if fewer experts can be chosen than each token needs.
    """
    activation = parts.read_activation(config)
    num_experts, top_k = config.require(count, int), config.require("num_experts_per_tok", int)
    if num_experts % router.num_groups or not 0 < router.top_groups <= router.num_groups:
        raise ConfigError(f"{num_experts} experts cannot form {router.num_groups} groups, of which {router.top_groups} are chosen")
    available = num_experts // router.num_groups * router.top_groups
    if not 0 < top_k <= available:
        raise ConfigError(f"num_experts_per_tok={top_k}: there are {available} experts to choose from")
    return MoeSpec(
        num_experts=num_experts, top_k=top_k, expert=MlpSpec(width=config.require(width, int), activation=activation), router=router,
        shared=MlpSpec(width=shared_width, activation=activation) if shared_width else None, shared_gate=shared_gate,
    )  # fmt: skip


def read_sparse_layers(config: HfConfig) -> list[bool]:
    """Whether each layer has experts, as Qwen's configs say it: every decoder_sparse_step-th, but for mlp_only_layers."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if step < 1 or not isinstance(dense, list):
        raise ConfigError(f"decoder_sparse_step={step} and mlp_only_layers={dense!r:.80} do not say which layers have experts")
    return [i not in dense and (i + 1) % step == 0 for i in range(parts.num_layers(config))]


def moe_names(
    module: str = "mlp", *, router: str = "gate", each: Sequence[str] = ("gate_proj", "up_proj", "down_proj"), shared: str = "shared_expert"
) -> Names:
    """Names of a layer's experts: one by one, all in one tensor [E, out, in], or in one for each of an expert's matrices, as GGUF has them.

    Args:
      module: under model.layers.{i}; the others are under it.
      each: of an expert's matrices.
    """
    at = f"model.layers.{{i}}.{module}"
    gate, up, down = (f"{at}.experts.{{e}}.{name}.weight" for name in each)
    all_gates, all_ups, all_downs = (f"{at}.experts.{name}.weight" for name in each)
    return {
        "mlp.router.weight": stored(f"{at}.{router}.weight"),
        "mlp.router.correction": stored(f"{at}.{router}.e_score_correction_bias"),
        "mlp.experts.gate_up": stored(gate, up, layout="expert")
        + stored(f"{at}.experts.gate_up_proj", layout="expert")
        + stored(all_gates, all_ups, layout="expert"),
        "mlp.experts.down": stored(down, layout="expert")
        + stored(f"{at}.experts.down_proj", layout="expert")
        + stored(all_downs, layout="expert"),
        "mlp.shared.gate_up.weight": stored(f"{at}.{shared}.gate_proj.weight", f"{at}.{shared}.up_proj.weight"),
        "mlp.shared.down.weight": stored(f"{at}.{shared}.down_proj.weight"),
        "mlp.shared_gate.weight": stored(f"{at}.shared_expert_gate.weight") + stored(f"{at}.shared_expert_gate.vector", layout="stacked"),
    }
