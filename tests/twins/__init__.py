"""Slow twins of the training scripts: the same numbers from plain loops on transformers' models."""
