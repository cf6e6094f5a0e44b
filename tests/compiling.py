"""How tests compile what runs a few times on little, and is compared within a tolerance."""

from __future__ import annotations

# Compiling is what takes the time, with fusion emitters up to twice as much of it. Whatever runs for long, whole engines too, is slower so.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
