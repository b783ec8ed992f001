"""A reward for timing: it varies within a group and means nothing."""


def length_modulo_7(completions, **columns) -> list[float]:
    """Characters of each completion, text or messages, modulo 7."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(len(text) % 7) for text in texts]
