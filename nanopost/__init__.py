"""nanopost: LLM post-training, one readable script per algorithm."""


class InputError(ValueError):
    """Something a person gave is wrong. The message is one sentence: what, the numbers, the way
    out."""
