"""Verifiers of answers: exact match, form, length, GSM8K, MATH."""

import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

from nanopost import InputError


def text_of(completion) -> str:
    """The text of a completion: itself, or the content of its last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"] or ""


# ---------------------------------------------------------------------------------- plain match, form, length
def exact(completions, answer, **columns):
    """1 where the completion equals the column answer, white space at the ends aside."""
    return [float(text_of(c).strip() == str(a).strip()) for c, a in zip(completions, answer)]


def full_match(pattern: str) -> Callable:
    """1 where the whole completion matches the regular expression; its dot matches line ends too."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InputError(f"--reward regex:{pattern}: not a regular expression: {error}.") from error
    return lambda completions, **columns: [
        float(bool(compiled.fullmatch(text_of(c)))) for c in completions
    ]


def gsm8k_format(completions, **columns):
    """1 where a completion has the form of GSM8K: some text, and a last line "#### number", the only ####."""
    parts = [text_of(c).partition("####") for c in completions]
    last_line = re.compile(r" -?\$?[0-9][0-9,]*(\.[0-9]+)?\s*")
    return [
        float(bool(head.strip() and head.endswith("\n") and last_line.fullmatch(tail)))
        for head, _, tail in parts
    ]


def overlong(limits: str) -> Callable:
    """soft_overlong_penalty of the tokens in the column completion_ids; limits: "MAX:BUFFER"."""
    if not re.fullmatch(r"\d+:\d+", limits):
        raise InputError(
            f"--reward length:{limits}: write length:MAX:BUFFER in tokens, as length:1024:256."
        )
    longest, buffer = map(int, limits.split(":"))
    soft_overlong_penalty(0, longest, buffer)  # refuses a buffer that does not fit before the run
    return lambda completions, completion_ids, **columns: [
        soft_overlong_penalty(len(ids), longest, buffer) for ids in completion_ids
    ]


# ------------------------------------------------------------------------------------------------------ gsm8k
# A minus is a sign where no operand stands before it (10-3 ends in 3); commas stand before three digits.
NUMBER = re.compile(
    r"((?<![\w.)])-)?[$€£]?"
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def gsm8k(completions, answer, **columns):
    """1 where the number after the last ####, or else the last one, is exactly that of the column answer."""
    gold = [final_number(str(a)) for a in answer]
    if None in gold:
        i = gold.index(None)
        raise InputError(
            f"Reward gsm8k: the answer {str(answer[i])[:80]!r} to completion {i} has no number; "
            f"name the right column with --rename."
        )
    return [float(final_number(text_of(c)) == number) for c, number in zip(completions, gold)]


def final_number(text: str) -> Decimal | None:
    """Number after the last ####, or else the last number; None without one. -$1,234.50 is -1234.5."""
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("{,}", ",").replace("\\!", "")
    _, marker, tail = text.rpartition("####")
    found = list(NUMBER.finditer(tail))[:1] if marker else []
    for number in found or list(NUMBER.finditer(text))[-1:]:
        return Decimal((number[1] or "") + number[2].replace(",", ""))
    return None


# ------------------------------------------------------------------------------------------------------ boxed
ARGUMENT = r"(\{(?:[^{}]|\{[^{}]*\})*\}|\\[a-z]+|\w)"


REWRITES = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"\\(text|mbox|mathrm)\s*\{\s*(or|and)\s*\}", ","),
        (
            r"(?:(?<=[\d})])|(?<=\\pi))\s*\\(text|mbox|mathrm)\s*\{[^{}]*\}(\s*\^\s*\{?\d\}?)?\s*$",
            "",
        ),  # units
        (r"\\(text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\2"),
        (
            r"\\[$%]|[$%]|\\(left|right|displaystyle)(?![a-zA-Z])|\^\s*\{?\s*\\circ\s*\}?|\\degree|°",
            "",
        ),
        (r"\\(le|ge|ne)q(?![a-zA-Z])", r"\\\1"),
        (r"(?<!\\)\\[!,;: ]|\\q?quad(?![a-zA-Z])|~|\s+", ""),  # but \\ ends the row of a matrix
        (r"\{,\}", ","),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\sqrt(\w)", r"\\sqrt{\1}"),
        (r"([_^])\{(\w)\}", r"\1\2"),
        (r"(?<![\w}.])(\d*\\pi|\d+)/(\d+)(?![\w{]|\\(?!\\|end)|\.\d)", r"\\frac{\1}{\2}"),
        (r"(?<![\d.])\.(?=\d)", "0."),
        (r"^\w{1,2}(=|\\in(?![a-zA-Z]))(?!.*=)", ""),  # x = 5, x \in [0, 1]
        (r"\.+$", ""),
        (r"^\((\w)\)$", r"\1"),  # (C)
    ]
]


def boxed(completions, answer, **columns):
    r"""1 where the last \boxed{} says what the column answer says: that is bare or has a \boxed{} of its own.

    Equal are equal numbers, and LaTeX that is the same after the rewriting of plain_latex, which goes a bit
    further than is_equiv of the MATH data set (2103.03874). It knows no algebra: 2x + 1 is not 1 + 2x.
    """
    return [
        float(same_answer(last_boxed(text_of(c)), last_boxed(str(a)) or str(a)))
        for c, a in zip(completions, answer)
    ]


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} or \fbox{...}, braces nested; None without one or its end."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    head = re.compile(r"\\(?:boxed|fbox)\s*(\{?)").match(text, start)
    if not head[1]:
        return re.compile(r"[^$\n]*").match(text, head.end())[0]  # \boxed 5$
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, head.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[head.end() : brace.start()]
    return None


def same_answer(given: str | None, answer: str) -> bool:
    """Whether two LaTeX answers are equal, as exact numbers or as rewritten text."""
    if given is None:
        return False
    given, answer = plain_latex(given), plain_latex(answer)
    number = exact_value(given)
    return given == answer or number is not None and number == exact_value(answer)


def answer_of(reward: str, text: str):
    """What a vote is about: the number of gsm8k, the boxed answer, else the whole text."""
    if reward == "gsm8k":
        return final_number(text)
    if reward == "boxed":
        plain = last_boxed(text) and plain_latex(last_boxed(text))
        return plain if exact_value(plain or "") is None else exact_value(plain)
    return text.strip() or None


def plain_latex(text: str) -> str:
    r"""One spelling for the many of an answer: no spaces, units, sized brackets; \frac{a}{b} in full."""
    for pattern, new in REWRITES:
        text = pattern.sub(new, text.strip())
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    return re.sub(
        r"\\frac" + ARGUMENT + ARGUMENT, lambda m: f"\\frac{_braced(m[1])}{_braced(m[2])}", text
    )


def _braced(argument):
    return argument if argument[0] == "{" else "{" + argument + "}"


def exact_value(text: str) -> Fraction | None:
    r"""Value of 3, -0.25, \frac{1}{2} or the mixed 1\frac{4}{5}; None of anything else."""
    if re.fullmatch(r"-?\d{1,99}(\.\d{1,99})?", text):
        return Fraction(text)
    mixed = re.fullmatch(r"(-?)(\d{0,99})\\frac\{(-?\d{1,99})\}\{(-?\d{1,99})\}", text)
    if not mixed or not int(mixed[4]):
        return None
    value = int(mixed[2] or 0) + Fraction(int(mixed[3]), int(mixed[4]))
    return -value if mixed[1] else value


def soft_overlong_penalty(length: int, max_length: int, buffer: int) -> float:
    """DAPO 2503.14476 eq. 13: 0 up to max_length - buffer tokens, then falling evenly to -1 at max_length."""
    if not 0 <= buffer <= max_length:
        raise InputError(
            f"The overlong buffer {buffer} is not between 0 and the length {max_length}."
        )
    over = length - (max_length - buffer)
    return -min(1.0, over / buffer if buffer else 1.0) if over > 0 else 0.0
