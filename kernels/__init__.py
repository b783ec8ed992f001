"""Triton kernels, each beside its autograd function and a torch reference."""
