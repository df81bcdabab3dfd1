"""Triton kernels, each with its plain PyTorch reference."""
