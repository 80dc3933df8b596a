"""Kernels for GPUs, written in Triton, which is imported only where one is used."""
