"""Triton kernels, each with its autograd function and a torch reference."""
