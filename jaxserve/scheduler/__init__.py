"""Decides which tokens of which requests each step computes, and owns the pages of the cache; never imports jax."""
