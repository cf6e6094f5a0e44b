"""Checkpoints: where a model comes from, what it holds, and how it gets onto the device."""
