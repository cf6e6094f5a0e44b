"""Ragged paged attention on Hopper, prompts in the Mosaic GPU kernel (hopper_kernel.py), whether or not that is the faster one there."""

from __future__ import annotations

import functools

from pallas_kernels.ragged_paged_attention import gpu

cache_shape = gpu.cache_shape
ragged_paged_attention = functools.partial(gpu.ragged_paged_attention, mosaic=True)
