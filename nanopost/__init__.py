"""nanopost: LLM post-training, one readable script per algorithm."""


class InputError(ValueError):
    """A user's mistake. The message is one sentence: what is wrong, the numbers, the fix."""


class StepError(RuntimeError):
    """A step went wrong in a way that no flag caused. The message is one sentence, too."""
