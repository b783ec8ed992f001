"""Answer verifiers: exact match, format, length, GSM8K, MATH, programs with unit tests.

The verifiers are reward functions: f(completions, **columns) -> list[float]; see rewards.py.
"""

import ast
import builtins
import inspect
import re
import signal
import sys
import time
import types
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import cache
from importlib.machinery import PathFinder

from nanopost import InputError, sandbox


def text_of(completion) -> str:
    """The text of a completion: a string, or the content of its last message."""
    if isinstance(completion, str):
        return completion
    return completion[-1]["content"] or ""


# ---------------------------------------------------------------------- exact match, format, length
def exact(completions, answer, **columns):
    """1 where the completion equals the column answer, up to whitespace at both ends."""
    return [float(text_of(c).strip() == str(a).strip()) for c, a in zip(completions, answer)]


def full_match(pattern: str) -> Callable:
    """1 where the whole completion matches the regular expression, whose dot matches newlines."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InputError(f"--reward regex:{pattern}: not a regular expression: {error}.") from error

    def matches(completions, **columns):
        return [float(bool(compiled.fullmatch(text_of(c)))) for c in completions]

    return matches


LAST_LINE = re.compile(r" -?\$?[0-9][0-9,]*(\.[0-9]+)?\s*")


def gsm8k_format(completions, **columns):
    """1 where a completion has the format of GSM8K.

    That is some text, then a last line "#### number", which holds the only ####.
    """
    scores = []
    for completion in completions:
        head, _, tail = text_of(completion).partition("####")
        good = head.strip() and head.endswith("\n") and LAST_LINE.fullmatch(tail)
        scores.append(float(bool(good)))
    return scores


def length_limit(limits: str) -> Callable:
    """length_penalty of the tokens in the column completion_ids, or of an episode's sampled ones.
    limits: "MAX:BUFFER"."""
    if not re.fullmatch(r"\d+:\d+", limits):
        raise InputError(
            f"--reward length:{limits}: write length:MAX:BUFFER in tokens, such as length:1024:256."
        )
    max_length, buffer = map(int, limits.split(":"))
    if buffer > max_length:
        raise InputError(
            f"--reward length:{limits}: the buffer {buffer} is not between 0 and the maximum "
            f"length {max_length}."
        )

    def penalties(completions, completion_ids, completion_lengths=None, **columns):
        lengths = completion_lengths or map(len, completion_ids)
        return [length_penalty(length, max_length, buffer) for length in lengths]

    return penalties


def length_penalty(length: int, max_length: int, buffer: int) -> float:
    """DAPO 2503.14476 eq. 13: 0 up to max_length - buffer tokens, then linear to -1 at max_length.

    Longer completions get -1. buffer: 0 to max_length tokens.
    """
    over = length - (max_length - buffer)
    if over <= 0:
        return 0.0
    if over >= buffer:
        return -1.0
    return -over / buffer


# -------------------------------------------------------------------------------------------- gsm8k
# A minus is a sign unless an operand precedes it (10-3 ends in 3); a comma precedes three digits.
NUMBER = re.compile(
    r"((?<![\w.)])-)?[$€£]?"
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def gsm8k(completions, answer, **columns):
    """1 where the completion's final number equals that of the column answer, exactly.

    InputError names the first answer without a number.
    """
    gold = [final_number(str(a)) for a in answer]
    if None in gold:
        i = gold.index(None)
        raise InputError(
            f"Reward gsm8k: the answer {str(answer[i])[:80]!r} to completion {i} has no number; "
            f"name the right column with --rename."
        )
    return [float(final_number(text_of(c)) == number) for c, number in zip(completions, gold)]


def final_number(text: str) -> Decimal | None:
    """The number after the last ####, or else the last number; None if there is none.

    -$1,234.50 is -1234.5.
    """
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("{,}", ",").replace("\\!", "")
    _, marker, tail = text.rpartition("####")
    after_marker = NUMBER.findall(tail)
    if marker and after_marker:
        sign, digits = after_marker[0]
    else:
        numbers = NUMBER.findall(text)
        if not numbers:
            return None
        sign, digits = numbers[-1]
    return Decimal(sign + digits.replace(",", ""))


# -------------------------------------------------------------------------------------------- boxed
ARGUMENT = r"(\{(?:[^{}]|\{[^{}]*\})*\}|\\[a-z]+|\w)"
# Applied in this order to the stripped text: (pattern, replacement). Each takes linear time: no two
# repetitions that match the same characters stand next to each other, and none that can fail begins
# at each of a run of characters.
REWRITES = [
    # "3 or 5" is "3,5"
    (r"\\(text|mbox|mathrm)\s*\{\s*(or|and)\s*\}", ","),
    # a unit after a number: \text{ cm}^2
    (
        r"(?:(?<=[\d})])|(?<=\\pi))\s*\\(text|mbox|mathrm)\s*\{[^{}]*\}(\s*\^\s*\{?\d\}?)?\s*$",
        "",
    ),
    (r"\\(text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\2"),
    # dollars, percent, \left and \right, degrees
    (
        r"\\[$%]|[$%]|\\(left|right|displaystyle)(?![a-zA-Z])|\^\s*(\{\s*)?\\circ\s*\}?|\\degree|°",
        "",
    ),
    (r"\\(le|ge|ne)q(?![a-zA-Z])", r"\\\1"),
    # spaces, but not \\, which ends the row of a matrix
    (r"(?<!\\)\\[!,;: ]|\\q?quad(?![a-zA-Z])|~|\s+", ""),
    (r"\{,\}", ","),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\sqrt(\w)", r"\\sqrt{\1}"),
    (r"([_^])\{(\w)\}", r"\1\2"),
    # 1/2, pi/6
    (r"(?<![\w}.])(\d*\\pi|\d+)/(\d+)(?![\w{]|\\(?!\\|end)|\.\d)", r"\\frac{\1}{\2}"),
    (r"(?<![\d.])\.(?=\d)", "0."),
    # x = 5, x \in [0, 1]
    (r"^\w{1,2}(=|\\in(?![a-zA-Z]))(?!.*=)", ""),
    (r"(?<!\.)\.+$", ""),
    # (C)
    (r"^\((\w)\)$", r"\1"),
]
REWRITES = [(re.compile(pattern), new) for pattern, new in REWRITES]


def boxed(completions, answer, **columns):
    r"""1 where the last \boxed{} equals the column answer, which may be bare or boxed itself.

    Two answers are equal if they are equal numbers, or the same LaTeX once plain_latex has
    rewritten it. That goes a bit further than is_equiv of the MATH data set (2103.03874). It does
    no algebra: 2x + 1 is not 1 + 2x.
    """
    scores = []
    for completion, gold in zip(completions, answer):
        given = last_boxed(text_of(completion))
        gold = last_boxed(str(gold)) or str(gold)
        scores.append(float(same_answer(given, gold)))
    return scores


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} or \fbox{...}, whose braces may nest.

    None if there is none, or if its braces do not close.
    """
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    head = re.compile(r"\\(?:boxed|fbox)\s*(\{?)").match(text, start)
    if not head[1]:
        return re.compile(r"[^$\n]*").match(text, head.end())[0]  # \boxed 5$
    depth = 1
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, head.end()):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
        if depth == 0:
            return text[head.end() : brace.start()]
    return None


def same_answer(given: str | None, answer: str) -> bool:
    """Whether two LaTeX answers are equal, as exact numbers or as rewritten text."""
    if given is None:
        return False
    given = plain_latex(given)
    answer = plain_latex(answer)
    if given == answer:
        return True
    value = exact_value(given)
    return value is not None and value == exact_value(answer)


def answer_of(reward: str, text: str):
    """What a majority vote counts: gsm8k's number, boxed's answer, else the whole text, or None."""
    if reward == "gsm8k":
        return final_number(text)
    if reward != "boxed":
        return text.strip() or None
    content = last_boxed(text)
    if not content:
        return content
    plain = plain_latex(content)
    value = exact_value(plain)
    if value is None:
        return plain
    return value


def plain_latex(text: str) -> str:
    r"""One spelling of an answer: no spaces, units or sized brackets; \frac{a}{b} in full."""
    for pattern, new in REWRITES:
        text = pattern.sub(new, text.strip())
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    return re.sub(r"\\frac" + ARGUMENT + ARGUMENT, _braced_fraction, text)


def _braced_fraction(match):
    over, under = [part if part[0] == "{" else "{" + part + "}" for part in match.groups()]
    return f"\\frac{over}{under}"


def exact_value(text: str) -> Fraction | None:
    r"""The value of 3, -0.25, \frac{1}{2} or the mixed 1\frac{4}{5}; None for anything else."""
    if re.fullmatch(r"-?\d{1,99}(\.\d{1,99})?", text):
        return Fraction(text)
    mixed = re.fullmatch(r"(-?)(\d{0,99})\\frac\{(-?\d{1,99})\}\{(-?\d{1,99})\}", text)
    if not mixed or not int(mixed[4]):
        return None
    value = int(mixed[2] or 0) + Fraction(int(mixed[3]), int(mixed[4]))
    if mixed[1]:
        return -value
    return value


# -------------------------------------------------------------------------------------- math-verify
def import_math_verify():
    """The package math-verify, or InputError."""
    try:
        import math_verify
    except ImportError as error:
        raise InputError(
            f"--reward math_verify needs the package math-verify ({error}): pip install "
            "math-verify, or take --reward boxed."
        ) from error
    return math_verify


def math_verify(completions, answer, **columns):
    r"""1 where math-verify finds the completion's answer equal to the column answer.

    That is the last \boxed{} of a completion, or else what math-verify extracts from it. The column
    may be bare or boxed. Unlike boxed this does algebra: 2x + 1 is 1 + 2x. A comparison that takes
    more than 5 seconds gives 0; --reward_timeout may come up to 5 seconds late. InputError names
    the first answer without a value.
    """
    package = import_math_verify()
    parse, verify = _with_alarm(package.parse), _with_alarm(package.verify)
    golds = {}
    for i, text in enumerate(map(str, answer)):
        # Bare, 3\sqrt{13} would be read as the number 3.
        golds[text] = golds.get(text) or parse(f"\\boxed{{{last_boxed(text) or text}}}")
        if not golds[text]:
            raise InputError(
                f"Reward math_verify: the answer {text[:80]!r} to completion {i} has no value; "
                "name the right column with --rename."
            )
    scores = []
    for completion, gold in zip(completions, answer):
        text = text_of(completion)
        content = last_boxed(text)
        given = parse(text if content is None else f"\\boxed{{{content}}}")
        scores.append(float(verify(golds[str(gold)], given)))
    return scores


def _with_alarm(function):
    """A function that sets an alarm of its own, after which one that was set before goes on."""

    def call(*arguments):
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        start = time.monotonic()
        try:
            return function(*arguments)
        finally:
            if left:
                left = max(left - (time.monotonic() - start), 1e-3)
                signal.setitimer(signal.ITIMER_REAL, left, interval)

    return call


# ------------------------------------------------------------------------- programs and unit tests
BLOCK = re.compile(r"^([ \t]*)```([^`\n]*)\n(.*?)^[ \t]*```", re.M | re.S)
DEFINITION = re.compile(r"^(def|async def|class)\b", re.M)
TESTED = 200  # rows, at most, whose tests are run before training


def code(completions, prompts=None, **columns):
    """1 where the completion's program passes the tests of its row, in a sandbox; see job_of.

    Each program may take 10 seconds. The other limits are in sandbox.Limits.
    """
    return _code(completions, prompts, columns, isolated=True)


def unsafe_code(completions, prompts=None, **columns):
    """As code, without a sandbox: limits alone."""
    return _code(completions, prompts, columns, isolated=False)


def _code(completions, prompts, columns, isolated):
    jobs, scores = {}, [0.0] * len(completions)
    for i, completion in enumerate(completions):
        row = {name: column[i] for name, column in columns.items()}
        prompt = program(text_of(prompts[i])) if prompts else ""
        job = job_of(row, prompt, program(text_of(completion)))
        if job.code.strip():
            jobs[i] = job
    for i, passed in zip(jobs, sandbox.passed(list(jobs.values()), isolated=isolated)):
        scores[i] = float(passed)
    return scores


def program(text: str) -> str:
    """The last ```python block of a text, or else the last one without a language, or the text.

    If some of the blocks define functions or classes, it is the last of these: others use it.
    """
    text = text.replace("\r\n", "\n")
    if "```" not in text or _parses(text):
        return text
    blocks = {True: [], False: []}
    for indent, language, block in BLOCK.findall(text):
        language = language.strip().lower()
        if language in ("python", "python3", "py", "py3", ""):
            block = re.sub(f"^[ \t]{{0,{len(indent)}}}", "", block, flags=re.M)
            blocks[language != ""].append(block)
    found = blocks[True] or blocks[False]
    defining = [block for block in found if DEFINITION.search(block)]
    return (defining or found or [text])[-1]


def job_of(row: dict, prompt: str, text: str) -> sandbox.Job:
    """A program and the tests of its row, or InputError.

    The row has test_list (MBPP: statements, with test_setup_code or test_imports), or test and
    entry_point (HumanEval: a function check(candidate), which may call what the prompt defines), or
    tests: statements or functions test_*, as one text or a list. In a row of HumanEval, a program
    that does not define entry_point is the body of the function that the prompt begins, and the
    tests see nothing of the program but entry_point.
    """
    is_human_eval = False
    if row.get("test_list") is not None:
        setup = [*_texts(row.get("test_imports")), *_texts(row.get("test_setup_code"))]
        given, entry = row["test_list"], ""
    elif row.get("test") is not None and row.get("entry_point") is not None:
        is_human_eval = True
        setup, entry = [prompt if _parses(prompt) else ""], row["entry_point"]
        given = [row["test"], f"check({entry})"]
        if not re.search(rf"^(def|class) {re.escape(entry)}\b", text, re.M):
            text = _continued(prompt, text)
        elif "__future__" not in text:  # which has to come first
            text = _imports(prompt) + text
    elif row.get("tests") is not None:
        setup, given, entry = _texts(row.get("test_setup_code")), row["tests"], ""
    else:
        raise InputError(
            "Reward code: the row has no tests: it needs the column tests, or test_list (MBPP), or "
            "test and entry_point (HumanEval); --rename theirs=tests."
        )
    given = _texts(given)
    if not all(isinstance(text, str) for text in [*given, *setup]):
        raise InputError("Reward code: tests are a text or a list of texts: complete the row.")
    tests, setup = "\n".join(given), "\n".join(setup)
    try:
        tree = ast.parse(tests)
        compiled = compile(tree, "tests", "exec")
        setup_tree = ast.parse(setup)
    except (SyntaxError, ValueError) as error:
        raise InputError(
            f"Reward code: the tests are not Python: {error}: mend the row."
        ) from error
    if not any(map(_runs, tree.body)):
        raise InputError(
            "Reward code: the tests run nothing: write statements, such as assert f(1) == 2, or "
            "functions test_* without parameters."
        )
    _check_functions(compiled)
    _check_imports([*setup_tree.body, *tree.body])
    names, _ = _names(tree)
    _, own = _names(setup_tree)
    if is_human_eval:
        _check_names(names - own - {entry}, _names(tree)[1] | own)
    elif len(names) == 1 and not names & own:
        entry = names.pop()  # the program's, even if it is called sum
    return sandbox.Job(text, tests, setup, entry, is_human_eval)


def _texts(value):
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _imports(prompt):
    """What the prompt imports: a whole function of a completion leans on it, as in HumanEval's own
    harness, which puts the prompt before it."""
    if not _parses(prompt):
        return ""
    statements = ast.parse(prompt).body
    imports = [ast.unparse(x) for x in statements if isinstance(x, (ast.Import, ast.ImportFrom))]
    return "".join(f"{line}\n" for line in imports)


def _continued(prompt, text):
    """The function that the prompt begins, with its body; a statement cut off after it is left
    out."""
    statements = [match.start() for match in re.finditer(r"(?<=\n)\S", text)]
    if statements and not _parses(prompt + text):
        text = text[: statements[-1]]
    return prompt + text


def _check_functions(compiled):
    """InputError for functions test_* that a call without arguments does not run."""
    unused = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
    for function in compiled.co_consts:
        if isinstance(function, types.CodeType) and function.co_name.startswith("test_"):
            has_parameters = function.co_argcount or function.co_kwonlyargcount
            if has_parameters or function.co_flags & unused:
                raise InputError(
                    f"Reward code: {function.co_name} has parameters, or is async or a generator: "
                    "functions test_* are called without arguments; rewrite or remove it."
                )


def _check_imports(statements):
    """InputError for a module that is not in the sandbox, but for imports in a try."""
    statements = [statement for statement in statements if not isinstance(statement, ast.Try)]
    for node in [node for statement in statements for node in ast.walk(statement)]:
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            modules = ["." * node.level + (node.module or "")]
        for module in modules:
            if not _is_installed(module.partition(".")[0]):
                raise InputError(
                    f"Reward code: the tests import {module}, which is not installed: remove the "
                    "line if that is the program, whose names the tests have without it; or "
                    "install it."
                )


@cache
def _is_installed(module) -> bool:
    if module in sys.stdlib_module_names:
        return True
    return bool(module) and PathFinder.find_spec(module, sandbox.packages()) is not None


def _names(tree) -> tuple[set, set]:
    """The names that are used anywhere in a tree, and those that it defines."""
    used, defined = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.alias):
            defined.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            defined.add(node.name)
    return used, defined


def _check_names(used, defined):
    """InputError for names of HumanEval's tests that nothing defines."""
    unknown = used - defined - set(dir(builtins)) - sys.stdlib_module_names
    if unknown and "*" not in defined:
        raise InputError(
            f"Reward code: the tests use {min(unknown)}, which neither they nor the prompt define: "
            "a prompt in words needs its code in a ```python block."
        )


def passes_without_program(rows: list[dict], isolated: bool) -> dict | None:
    """A row of `code` whose tests an empty program passes, or None."""
    jobs = []
    for row in rows:
        prompt = program(text_of(row["prompt"])) if row.get("prompt") else ""
        jobs.append(job_of(row, prompt, "")._replace(code="", must_ask=False))
    for row, passed in zip(rows, sandbox.passed(jobs, isolated=isolated)):
        if passed:
            return row
    return None


def _parses(text):
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def _runs(statement) -> bool:
    """Whether a statement of the tests can fail for what a program returns."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return statement.name.startswith("test_")
    return not isinstance(statement, (ast.ClassDef, ast.Import, ast.ImportFrom))
