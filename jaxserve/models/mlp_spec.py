"""What the feed-forward half of a layer is made of: an MLP, or experts among which a router chooses."""

from __future__ import annotations

import dataclasses
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "gelu_sigmoid", "relu", "relu2"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClampedSwiglu:
    """gate * sigmoid(alpha * gate) * (up + 1), the gate cut above limit and up to -limit .. limit (GPT-OSS)."""

    alpha: float
    limit: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MlpSpec:
    """Feed-forward layer of hidden width `width`: down(activation(gate(x)) * up(x)), or down(activation(up(x))) if not gated.

    Args:
      activation: ClampedSwiglu takes gate and up together.
      down_bias: whether the projection down has one, where that differs from `bias`.
    """

    width: int
    activation: Activation | ClampedSwiglu
    bias: bool = False
    gated: bool = True
    down_bias: bool | None = None

    @property
    def has_down_bias(self) -> bool:
        """Whether the projection down has a bias."""
        return self.bias if self.down_bias is None else self.down_bias

    def numbers_a_token(self, model_width: int) -> int:
        """Temporaries of a token, about; those of the model's width are the layer's."""
        del model_width
        return 3 * self.width


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """Chooses experts for a token by the logits of a linear map, in float32.

    Args:
      scores: of experts: softmax or sigmoid of their logits; "sparsemixer" chooses two, each weighted by its softmax among those experts
        whose logits are within a part of 2 * jitter of its own, the second without the first.
      renormalize: the weights of the chosen are divided by their sum.
      scale: multiplies the weights.
      bias: the logits have a bias.
      correction: a learned number for each expert is added to its score for the choice, not for the weight.
      num_groups, top_groups: experts are chosen from top_groups of num_groups groups of neighbours.
      group_score: of a group: its highest score, or the sum of its two highest.
    """

    scores: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    bias: bool = False
    correction: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["highest", "two_highest"] = "highest"
    jitter: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """Feed-forward layer of E experts, of which each token goes through top_k: their outputs, weighted, are added.

    Args:
      expert: each of them.
      shared: one more, that every token goes through.
      shared_gate: its output is multiplied by the sigmoid of a learned projection of the token.
      weigh_inputs: what an expert is given, not its output, is multiplied by its weight.
    """

    num_experts: int
    top_k: int
    expert: MlpSpec
    router: RouterSpec
    shared: MlpSpec | None = None
    shared_gate: bool = False
    weigh_inputs: bool = False

    def numbers_a_token(self, model_width: int) -> int:
        """Temporaries of a token, about."""
        shared = 0 if self.shared is None else self.shared.numbers_a_token(model_width)
        return shared + self.top_k * (self.expert.numbers_a_token(model_width) + 3 * model_width) + 4 * self.num_experts
