"""Attention and matmul kernels for serving: Pallas on TPU and GPU, plain XLA elsewhere; independent of jaxserve."""
