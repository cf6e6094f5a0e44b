"""Kernels for CPUs: compiled by numba, called by XLA as foreign functions, run by XLA's own threads."""
