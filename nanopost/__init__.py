"""nanopost: LLM post-training, one readable script per algorithm."""

from nanopost.terminal import printable


class InputError(ValueError):
    """A user's mistake. The message is one sentence: what is wrong, the numbers, the fix."""

    def __str__(self):
        return printable(super().__str__())  # it may quote data


class StepError(RuntimeError):
    """A step went wrong in a way that no flag caused. The message is one sentence, too."""
