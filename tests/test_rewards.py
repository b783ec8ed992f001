"""Verifiers on tables of tricky strings and real files; loading and calling rewards and judges."""

import gzip
import json
import os
import re
import signal
import sys
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from nanopost import InputError, rewards, verify
from nanopost.dist import World
from nanopost.rewards import call, judged, load, load_one
from nanopost.rollout import Rollout, sample_records
from nanopost.verify import (
    boxed,
    exact,
    exact_value,
    final_number,
    gsm8k,
    gsm8k_format,
    last_boxed,
    plain_latex,
    same_answer,
)


def rows(path):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf8") as file:
        return [json.loads(line) for line in file]


# -------------------------------------------------------------------------------------------- gsm8k
@pytest.mark.parametrize(
    "text, number",
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 7\nor rather 8", "7"),
        ("#### 7\n\nQuestion: 2+3?\n#### 5", "5"),
        ("####7", "7"),
        ("#### $1,234.50.", "1234.50"),
        ("#### -5", "-5"),
        ("#### \u22125 degrees", "-5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### **18**", "18"),
        ("#### \\$18", "18"),
        ("#### x = 18 apples, 2 pears", "18"),
        ("the answer is 12\n####", "12"),
        ("the answer is 12\n#### none", "12"),
        ("She has 18 dollars.", "18"),
        ("It costs $2,125,000.", "2125000"),
        ("12,34", "34"),
        ("1,2345", "2345"),
        ("1, 2, 3", "3"),
        ("50%", "50"),
        ("0.5", "0.5"),
        (".5", "0.5"),
        ("5.", "5"),
        ("3.14.", "3.14"),
        ("10-3", "3"),
        ("10 - 3", "3"),
        ("x=-3", "-3"),
        ("from 5 to -3", "-3"),
        ("5-10 dogs", "10"),
        ("1{,}234", "1234"),
        ("1,\\!234", "1234"),
        ("\\boxed{42}", "42"),
        ("<answer>46</answer>", "46"),
        ("007", "7"),
        ("€12 or £3", "3"),
        ("no number", None),
        ("", None),
        ("####", None),
        ("-", None),
        ("...", None),
    ],
)
def test_final_number_of_tricky_texts(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    "text, answer, reward",
    [
        ("18", "18", 1),
        ("18.0", "18", 1),
        ("18.00", 18, 1),
        ("it is 18.", 18.0, 1),
        ("$18", "work\n#### 18", 1),
        ("1,800", "1800", 1),
        ("1800", "#### 1,800", 1),
        ("17.999999999999999999", "18", 0),
        ("0.1", 0.1, 1),
        ("100000000000000000000000001", "100000000000000000000000000", 0),
        ("-18", "18", 0),
        ("18%", "18", 1),
        ("9" * 9000, "1", 0),
        ("", "18", 0),
        ("eighteen", "18", 0),
        ("180", "18", 0),
        ("18 or 19", "18", 0),
    ],
)
def test_gsm8k_compares_exact_decimals(text, answer, reward):
    assert gsm8k([text], [answer]) == [reward]
    assert gsm8k([[{"role": "assistant", "content": text}]], [answer], prompts=["?"]) == [reward]


def test_gsm8k_gold_answers_score_one_and_those_of_other_questions_nothing(shared):
    data = rows(shared / "gsm8k/train.jsonl.gz") + rows(shared / "gsm8k/test.jsonl")
    answers = [row["answer"] for row in data]
    assert gsm8k(answers, answers) == [1.0] * len(answers) == gsm8k_format(answers)
    assert gsm8k([a.rpartition("####")[2] for a in answers], answers) == [1.0] * len(answers)
    off_by_one = [f"so it is {int(final_number(a)) + 1}." for a in answers]
    assert gsm8k(off_by_one, answers) == [0.0] * len(answers)
    solutions = [a.rpartition("####")[0] for a in answers]
    # without the #### line the last number of the working counts
    assert 0.970 < np.mean(gsm8k(solutions, answers)) < 0.975
    assert not any(gsm8k_format(solutions))


def test_a_gold_answer_without_a_number_is_named():
    with pytest.raises(
        InputError, match="answer 'many' to completion 1 has no number; .* --rename"
    ):
        gsm8k(["1", "2"], ["1", "many"])


@pytest.mark.parametrize(
    "text, reward",
    [
        ("2 + 2 = 4\n#### 4", 1),
        ("a\nb\n#### -1,234.5\n", 1),
        ("a\n#### $5", 1),
        ("a #### 4", 0),
        ("#### 4", 0),
        ("\n#### 4", 0),
        ("a\n#### 4 apples", 0),
        ("a\n#### 4\nb", 0),
        ("a\n####4", 0),
        ("a\n#### 4\n#### 4", 0),
        ("a\n#### four", 0),
        ("", 0),
    ],
)
def test_format_is_text_and_then_one_last_line_with_the_number(text, reward):
    assert load_one("format").function([text]) == [reward]


def test_verifiers_take_linear_time_on_long_degenerate_texts():
    began = time.perf_counter()
    for text in (
        "#" * 100_000,
        "1," * 50_000,
        " " * 100_000,
        "\n" * 100_000,
        "-" * 100_000,
        "\\boxed{" * 20_000,
        "\\boxed{" + "{" * 50_000,
        "\\boxed{" + "\\frac" * 5_000 + "}",
        "\\boxed{" + "1" * 50_000 + "}",
        "\\boxed{1" + " " * 20_000 + "x}",
        "\\boxed{" + "{}" * 10_000 + "}",
    ):
        gsm8k_format([text])
        gsm8k([text], ["5"])
        assert boxed([text], ["5"]) == [0.0]
    assert time.perf_counter() - began < 10


HOSTILE_TEXTS = [
    ("\\boxed{^", " ", "x}"),
    ("\\boxed{", ".", "x}"),
    ("\\boxed{1", "\n", "x}"),
    ("\\boxed{1\\text{}", " ", "x}"),
    ("\\boxed{\\frac{", "{}", "}"),
    ("\\boxed{", "1\\text{", "}"),
    ("\\boxed{", "1/", "x}"),
    ("#### ", "1,", "x"),
    ("a\n#### 1", " ", "x"),
    ("", "-$", "x"),
]


@pytest.mark.parametrize("head, piece, tail", HOSTILE_TEXTS)
def test_a_verifier_takes_twice_the_time_for_twice_the_text(head, piece, tail):
    def seconds(length):
        text = head + piece * (length // len(piece)) + tail
        times = []
        for _ in range(3):
            began = time.process_time()
            gsm8k_format([text])
            gsm8k([text], ["5"])
            boxed([text], ["5"])
            exact([text], ["5"])
            times.append(time.process_time() - began)
        return min(times)

    assert seconds(80_000) < 8 * seconds(20_000) + 0.05  # quadratic: 16 times, and seconds


# -------------------------------------------------------------------------------------------- boxed
@pytest.mark.parametrize(
    "text, content",
    [
        (r"so $\boxed{5}$.", "5"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{5}", "5"),
        (r"\boxed{1} \fbox{2}", "2"),
        (r"\boxed {5}", "5"),
        (r"$\boxed 5$ ok", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\text{a}^{2^{3}}} }", r"\text{a}^{2^{3}}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{5", None),
        (r"\boxed{1} then \boxed{2", None),
        ("5", None),
        ("", None),
    ],
)
def test_last_boxed_of_tricky_texts(text, content):
    assert last_boxed(text) == content


EQUAL = [
    (r"\dfrac{1}{2}", r"\frac12"),
    (r"\tfrac12", "1/2"),
    ("0.5", r"\frac{1}{2}"),
    (".5", "0.50"),
    ("1.25", r"\frac54"),
    (r"\frac 59", r"\frac{5}{9}"),
    (r"\frac9{19}", r"\frac{9}{19}"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac{1}{-2}", "-0.5"),
    (r"1\frac{4}{5}", r"\frac{9}{5}"),
    (r"137 \frac{1}{2}", "137.5"),
    (r"-1\frac12", "-1.5"),
    (r"\frac{2}{4}", r"\frac12"),
    ("3.", "3"),
    ("3.0", "3"),
    (r"\$32,\!348", "32348"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    ("58,500", "58{,}500"),
    (r"\$18.90", "18.9"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    (r"90°", r"90\degree"),
    (r"10\%", "10"),
    ("10%", "10"),
    (r"5.4 \text{ cents}", "5.4"),
    (r"864 \mbox{ inches}^2", "864"),
    (r"15\mbox{ cm}^2", "15"),
    (r"8\pi\text{ cm}", r"8 \pi"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{(C)}", "C"),
    (r"(\text{E})", "E"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    (r"(3, \pi/2)", r"(3,\frac{\pi}{2})"),
    (r"\left[ 0, 1 \right)", "[0,1)"),
    (r"11\sqrt2", r"11 \sqrt{2}"),
    (r"\frac{\sqrt3}{2}", r"\frac{\sqrt{3}}{2}"),
    (r"\frac{\sqrt{6}}3", r"\frac{\sqrt{6}}{3}"),
    (r"\frac\pi6", r"\frac{\pi}{6}"),
    ("x=5", "5"),
    ("x = 5", "5"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("y = 2x + 3", "2x+3"),
    ("52_8", "52_{8}"),
    ("x^{2}", "x^2"),
    ("$5$", "5"),
    (r"3, 5, 7", "3,5,7"),
    (r"3\text{ or }5", "3,5"),
    (r"x \leq 3", r"x \le 3"),
    (r"a\ b~c\quad d", "abcd"),
    (
        r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
        r"\begin{pmatrix} -\frac{1}{3} \\ \frac{2}{3} \end{pmatrix}",
    ),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\displaystyle 5", "5"),
    ("-0", "0"),
]
DIFFERENT = [
    ("5", "-5"),
    ("5", "50"),
    ("0.333", r"\frac13"),
    ("50\\%", "0.5"),
    (r"\frac12", r"\frac21"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    (r"\sqrt{2}", "2"),
    ("x", "y"),
    ("2x+1", "1+2x"),
    ("52_8", "52"),
    (r"\pi", "3.14"),
    ("", "5"),
    (r"1\frac{4}{5}", r"\frac{14}{5}"),
    (r"3\text{ or }5", "35"),
    ("1,2", "12"),
    ("10,20", "1020"),
    ("1.5/2", "1.5"),
    ("a=b=5", "5"),
    (r"\text{even}", r"\text{odd}"),
    (r"\frac{1}{2x}", r"\frac{1}{2}x"),
    ("12x", "12"),
    ("5 m", "5"),
    (r"\frac{1}{0}", r"\frac{2}{0}"),
    ("1" * 5000, "1" * 5001),
]


@pytest.mark.parametrize("given, answer", EQUAL)
def test_answers_that_mean_the_same_are_equal_both_ways_round(given, answer):
    assert same_answer(given, answer) and same_answer(answer, given), (
        plain_latex(given),
        plain_latex(answer),
    )


@pytest.mark.parametrize("given, answer", DIFFERENT)
def test_answers_that_differ_stay_different(given, answer):
    assert not same_answer(given, answer) and not same_answer(answer, given), plain_latex(given)


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3),
        ("-0.25", Fraction(-1, 4)),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"-2\frac{1}{2}", Fraction(-5, 2)),
        (r"\frac{1}{0}", None),
        ("x", None),
        ("", None),
        ("1" * 5000, None),
    ],
)
def test_exact_value(text, value):
    assert exact_value(text) == value


def test_boxed_reads_strings_messages_and_gold_solutions():
    message = [{"role": "assistant", "content": r"Hence $\boxed{\dfrac{1}{2}}$."}]
    assert boxed(
        [message, r"\boxed{2}", "0.5", r"\boxed{0.5"], ["0.5", r"so \boxed{2}", "0.5", "0.5"]
    ) == [1, 1, 0, 0]


def test_math_answers_score_one_boxed_and_in_their_solutions_and_hardly_ever_match_others(shared):
    data = rows(shared / "tasks/math500.jsonl")
    answers, solutions = [r["answer"] for r in data], [r["solution"] for r in data]
    assert boxed([f"Thus $\\boxed{{{a}}}$." for a in answers], answers) == [1.0] * 500
    assert boxed(solutions, answers) == [1.0] * 500
    assert boxed(answers, answers) == [0.0] * 500  # no box, no reward
    assert boxed([f"\\boxed{{{a}1}}" for a in answers], answers) == [0.0] * 500
    test = [r["solution"] for r in rows(shared / "tasks/math_test.jsonl.gz")]
    assert boxed(test, test) == [1.0] * 5000


# ----------------------------------------------------------------------------- exact, regex, length
def test_exact_ignores_white_space_at_the_ends_alone():
    completions = [" 46\n", "4 6", [{"role": "assistant", "content": "46"}]]
    assert exact(completions, ["46", "46", 46]) == [1.0, 0.0, 1.0]


def test_regex_must_match_the_whole_completion_across_lines():
    reward = load_one(r"regex:<think>.*</think>\d+")
    assert reward.name == r"regex:<think>.*</think>\d+"
    assert call(reward, ["<think>a\nb</think>5", "<think></think>5.", "x<think></think>5"], {}) == [
        1.0,
        0.0,
        0.0,
    ]


def test_length_punishes_the_tokens_over_its_limit():
    ids = {"completion_ids": [[1] * 80, [1] * 90, [1] * 100]}
    assert call(load_one("length:100:20"), ["a"] * 3, ids) == [0.0, -0.5, -1.0]


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            "gsm9k",
            "'gsm9k' is unknown: built in are gsm8k, boxed, math_verify, code, exact, format, "
            "environment, "
            "regex:PATTERN, length:MAX:BUFFER and model:FOLDER; give your own as file.py:function",
        ),
        ("regex", "write regex:PATTERN"),
        ("regex:", "write regex:PATTERN"),
        ("model:", "write model:FOLDER"),
        ("regex:(", r"regex:\(: not a regular expression"),
        ("length", "write length:MAX:BUFFER in tokens"),
        ("length:100", "write length:MAX:BUFFER in tokens"),
        ("length:100:200", "buffer 200 is not between 0 and the maximum length 100"),
        ("nowhere/r.py:f", "there is no file nowhere/r.py"),
    ],
)
def test_a_wrong_reward_is_refused_with_the_way_out(spec, message):
    with pytest.raises(InputError, match=message):
        load_one(spec)


# -------------------------------------------------------------------------------------- math-verify
def test_math_verify_does_algebra():
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    table = [
        ("1/2", r"so \boxed{0.5}", 1),
        ("x + 1", r"\boxed{1 + x}", 1),
        (r"\boxed{3\sqrt{13}}", r"\boxed{\sqrt{117}}", 1),
        (r"3\sqrt{13}", r"\boxed{3}", 0),
        ("1, 2", r"\boxed{2, 1}", 1),
        ("(1, 2)", r"\boxed{(2, 1)}", 0),
        ("18", r"\boxed{4}, no, \boxed{18}", 1),
        ("18", r"\boxed{18}, no, \boxed{4}", 0),
        (18, "The answer is 18.", 1),
        ("18", "", 0),
        ("5", r"\boxed{", 0),
    ]
    answers, texts, scores = zip(*table)
    assert call(load_one("math_verify"), list(texts), {"answer": list(answers)}) == list(scores)
    message = [{"role": "assistant", "content": r"\boxed{2y}"}]
    assert call(load_one("math_verify"), [message], {"answer": ["y+y"]}) == [1.0]
    with pytest.raises(InputError, match="the answer '' to completion 0 has no value; .* --rename"):
        call(load_one("math_verify"), ["1"], {"answer": [""]})


def test_an_alarm_of_a_package_does_not_stop_the_clock():
    """math-verify sets alarms and cancels them."""

    def slow(completions, **columns):
        verify._with_alarm(signal.alarm)(0)
        time.sleep(5)

    with pytest.raises(InputError, match="took more than --reward_timeout 0.2 seconds"):
        call(rewards.Reward("slow", slow, 0.2), ["a"], {})


def test_math_verify_is_trl_s_accuracy_on_answers_in_a_box(shared):
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    accuracy_reward = pytest.importorskip("trl.rewards").accuracy_reward
    data = rows(shared / "tasks/math500.jsonl")[::10]
    texts = [row["solution"] for row in data] + [row["solution"] for row in data[1:] + data[:1]]
    golds = [row["answer"] for row in data] * 2
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    ours = call(load_one("math_verify"), texts, {"answer": golds})
    theirs = accuracy_reward(messages, [f"${gold}$" for gold in golds])
    assert ours == theirs
    assert ours[:50] == [1.0] * 50


def test_math_verify_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(
        InputError, match="needs the package math-verify .*: pip install math-verify"
    ):
        load_one("math_verify")


# ------------------------------------------------------------------------------------ a user's file
USER = """
import dataclasses

@dataclasses.dataclass
class Counter:
    calls: int = 0
    def __call__(self, completions, **columns):
        self.calls += 1
        return [float(self.calls)] * len(completions)

class Useless:
    pass

def starts(completions, prompts, first, **columns):
    return [None if f is None else c.startswith(f) for c, f in zip(completions, first)]

def no_columns(completions):
    return [0.0 for _ in completions]

def divides(completions, **columns):
    return [1 / int(c) for c in completions]

def pairs(completions, **columns):
    assert len(completions) % 2 == 1, "an odd number"
    return [0.0] * len(completions)

def together(completions, **columns):
    raise ValueError("together") if len(completions) > 1 else KeyError("alone")

def gives(completions, value, **columns):
    return value[0]

LIMIT = 3
"""


@pytest.fixture
def user(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(USER)
    return lambda name: f"{file}:{name}"


def test_a_function_of_a_file_gets_the_columns_and_may_return_none(user):
    reward = load_one(user("starts"))
    columns = {"prompts": ["p"] * 3, "first": ["a", "b", None], "unused": [1, 2, 3]}
    assert reward.name == "starts" and call(reward, ["ab"] * 3, columns) == [1.0, 0.0, None]


def test_a_class_is_made_once_and_keeps_its_state(user):
    reward = load_one(user("Counter"))
    assert [call(reward, ["a"], {}) for _ in range(3)] == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize(
    "name, message",
    [
        ("start", "mine.py has no 'start'; it has Counter, Useless, starts, .*, gives"),
        ("LIMIT", "has no 'LIMIT'"),
        ("", "has no ''; it has Counter"),
        ("Useless", "an instance of the class Useless is not callable"),
    ],
)
def test_a_name_that_is_not_in_the_file_is_answered_with_those_that_are(user, name, message):
    with pytest.raises(InputError, match=message):
        load_one(user(name))


def test_a_file_without_a_function_named_lists_what_it_has(user):
    with pytest.raises(InputError, match="has no ''; it has Counter"):
        load_one(user("").removesuffix(":"))


def test_an_error_in_the_file_itself_is_shown_as_it_is(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere")
    with pytest.raises(ModuleNotFoundError):
        load_one(f"{tmp_path}/broken.py:f")


def test_an_exception_names_the_completion_the_line_and_keeps_its_cause(user):
    with pytest.raises(
        InputError,
        match=r"divides raised ZeroDivisionError: division by zero \(.*mine.py:21\) on "
        r"completion 2 of 4, called alone: '0'",
    ) as caught:
        call(load_one(user("divides")), ["1", "2", "0", "x"], {"answer": ["a"] * 4})
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_of_the_batch_alone_is_not_blamed_on_a_completion(user):
    with pytest.raises(
        InputError, match="AssertionError: an odd number .* on the batch of 2 completions; none"
    ):
        call(load_one(user("pairs")), ["a", "b"], {})
    with pytest.raises(
        InputError, match="ValueError: together .* none of them fails like that alone"
    ):
        call(load_one(user("together")), ["a", "b"], {})


@pytest.mark.parametrize(
    "value, message",
    [
        ([1.0] * 3, "returned 3 values for 4 completions"),
        ([1.0, float("nan"), 0.0, 0.0], "returned nan for completion 1, 'b': return None where"),
        ([1.0, 0.0, float("inf"), 0.0], "returned inf for completion 2"),
        ([1.0, 0.0, 0.0, "1"], "returned '1', not a number, for completion 3: 'd'"),
        ([1.0, [1.0], 0.0, 0.0], r"returned \[1.0\], not a number, for completion 1"),
        ([1.0, np.zeros(1), 0.0, 0.0], r"returned array\(\[0.\]\), not a number, for completion 1"),
        ([1.0, 10**400, 0.0, 0.0], "returned 1000.*, not a number, for completion 1"),
        ([1j, 0.0, 0.0, 0.0], "returned 1j, not a number, for completion 0"),
        (np.zeros((4, 1)), r"returned \[0.0\], not a number, for completion 0"),
        (torch.zeros(4, 2), r"returned \[0.0, 0.0\], not a number, for completion 0"),
        (torch.tensor(1.0), "returned float, not a list"),
        (None, "returned NoneType, not a list"),
        (1.0, "returned float, not a list"),
        ({0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, "returned dict, not a list"),
        ({1.0, 2.0, 3.0, 4.0}, "returned set, not a list"),
        ("1111", "returned str, not a list"),
    ],
)
def test_a_wrong_return_is_refused_with_the_completion_named(user, value, message):
    with pytest.raises(InputError, match=f"Reward gives {message}"):
        call(load_one(user("gives")), list("abcd"), {"value": [value] * 4})


@pytest.mark.parametrize(
    "value",
    [
        [1, True, np.float32(0.5), None],
        (1.0, 1.0, 0.5, None),
        [torch.tensor(1.0), np.bool_(True), np.array(0.5), None],
    ],
)
def test_numbers_of_any_kind_become_floats(user, value):
    values = call(load_one(user("gives")), list("abcd"), {"value": [value] * 4})
    assert values == [1.0, 1.0, 0.5, None] and {type(v) for v in values} == {float, type(None)}


def test_arrays_and_tensors_are_lists_too(user):
    for value in (np.arange(4.0), torch.arange(4.0)):
        values = call(load_one(user("gives")), list("abcd"), {"value": [value] * 4})
        assert values == [0.0, 1.0, 2.0, 3.0]


def test_columns_that_do_not_fit_are_named_before_the_call(user):
    with pytest.raises(
        InputError,
        match="gsm8k cannot be called .* columns question: missing .*'answer'.* --rename",
    ):
        call(load_one("gsm8k"), ["1"], {"question": ["?"]})
    with pytest.raises(
        InputError, match=r"no_columns cannot .* unexpected keyword argument 'answer'.*\*\*columns"
    ):
        call(load_one(user("no_columns")), ["1"], {"answer": ["1"]})


def test_no_completions_are_scored_without_a_call(user):
    assert call(load_one(user("divides")), [], {}) == [] == call(load_one("gsm8k"), [], {})


def test_rewards_of_one_name_have_metrics_of_their_own():
    functions, weights = load(["exact", "length:9:3", "exact", "exact"], None)
    assert [f.name for f in functions] == ["exact", "length", "exact-2", "exact-3"]
    assert weights == [1.0] * 4
    functions, _ = load(["regex:a", "regex:a", "regex:a-2"], None)
    assert [f.name for f in functions] == ["regex:a", "regex:a-2", "regex:a-2-2"]


def test_no_reward_and_too_few_weights_are_refused():
    with pytest.raises(InputError, match="--reward is missing"):
        load([], None)
    with pytest.raises(InputError, match="--reward_weights has 1 values for 2 rewards"):
        load(["exact", "exact"], [1.0])
    assert load(["exact", "exact"], [1.0, 0.5])[1] == [1.0, 0.5]


def test_a_file_of_rewards_may_import_its_neighbour(tmp_path):
    (tmp_path / "neighbour_of_reward.py").write_text("LENGTH = 3\n")
    (tmp_path / "mine.py").write_text(
        "import neighbour_of_reward as n\n\n\ndef f(completions, **columns):\n"
        "    return [len(c) - n.LENGTH for c in completions]\n"
    )
    assert call(load_one(f"{tmp_path}/mine.py:f"), ["abcd"], {}) == [1.0]
    load_one(f"{tmp_path}/mine.py:f")
    assert sys.path.count(str(tmp_path)) == 1
    (tmp_path / "other").mkdir()
    # a neighbour of a name that is taken would not be the one that is imported
    for name in ("neighbour_of_reward", "kernels"):
        (tmp_path / "other" / f"{name}.py").write_text("LENGTH = 2\n")
        (tmp_path / "other" / f"of_{name}.py").write_text(
            f"from {name} import LENGTH\n\n\ndef f(**columns): pass\n"
        )
        with pytest.raises(
            InputError, match=f"it imports its neighbour {name}.py, but .* has that name: rename"
        ):
            load_one(f"{tmp_path}/other/of_{name}.py:f")


def test_an_input_error_of_a_reward_passes_as_it_is():
    with pytest.raises(InputError, match="^Reward gsm8k: the answer 'x'"):
        call(load_one("gsm8k"), ["1"], {"answer": ["x"]})


# ------------------------------------------------------------------------------- groups of rollouts
TEXTS = {1: "a", 2: "bb", 3: "ccc", 4: "<end>", 5: "<answer>", 9: "p"}  # 4, 5 are special


class Letters:
    stop_ids = frozenset({4})

    def decode(self, ids, skip_special=False):
        return "".join(TEXTS[i] for i in ids if i not in (4, 5) or not skip_special)


letters = Letters()


def rollout(*ids, version=0):
    return Rollout([9], list(ids), np.zeros(len(ids)), "stop", version)


def seen_by(rows_P, groups, step=1):
    """What a reward function is called with."""
    seen = {}

    def function(completions, **columns):
        seen.update(completions=completions, **columns)
        return [float(len(ids)) for ids in columns["completion_ids"]]

    reward = rewards.Reward("r", function)
    return rewards.score([reward], letters, rows_P, groups, step), seen


def test_each_rollout_is_scored_with_the_columns_of_its_row():
    rows_P = [
        {"prompt": "p", "prompt_ids": [9], "__line__": "f:1", "answer": 5},
        {"prompt": [{"role": "user", "content": "q"}], "prompt_ids": [9], "level": "hard"},
    ]
    groups = [[rollout(1, 4), rollout(2)], [rollout(3, 4), rollout(1, 2, 3)]]
    reward_FPG, seen = seen_by(rows_P, groups)
    assert reward_FPG.dtype == torch.float64 and reward_FPG.tolist() == [[[2.0, 1.0], [2.0, 3.0]]]
    q = rows_P[1]["prompt"]
    assert seen == {
        "completions": [
            "a",
            "bb",
            [{"role": "assistant", "content": "ccc"}],
            [{"role": "assistant", "content": "abbccc"}],
        ],
        "answer": [5, 5, None, None],
        "level": [None, None, "hard", "hard"],
        "prompts": ["p", "p", q, q],
        "prompt_ids": [[9]] * 4,
        "completion_ids": [[1, 4], [2], [3, 4], [1, 2, 3]],
        "step": [1] * 4,
    }


def test_what_does_not_apply_is_nan_and_counts_in_no_mean():
    functions = [
        rewards.Reward("half", lambda completions, **columns: [None, 1.0, 2.0, None]),
        rewards.Reward("whole", lambda completions, **columns: [1.0, 1.0, 1.0, 0.0]),
    ]
    rows_P = [{"prompt": "p"}, {"prompt": "p"}]
    reward_FPG = rewards.score(functions, letters, rows_P, [[rollout(1), rollout(2)]] * 2)
    assert reward_FPG.shape == (2, 2, 2)
    assert reward_FPG.isnan().tolist() == [[[True, False], [False, True]], [[False] * 2] * 2]
    found = rewards.sums(["a", "b"], reward_FPG)
    assert {name: (x.tolist(), n) for name, (x, n) in found.items()} == {
        "a": ([1.0, 2.0], 2),
        "b": ([1.0, 1.0, 1.0, 0.0], 4),
    }
    total_PG = rewards.total(reward_FPG, [2.0, 0.5])
    assert total_PG.dtype == torch.float64 and total_PG.tolist() == [[0.5, 2.5], [4.5, 0.0]]


def test_a_rank_without_groups_has_no_rewards_and_no_mean():
    functions, weights = load(["exact", "length:9:3"], None)
    reward_FPG = rewards.score(functions, letters, [], [])
    assert reward_FPG.shape == (2, 0, 0) and rewards.total(reward_FPG, weights).shape == (0, 0)
    found = rewards.sums(["a", "b"], reward_FPG)
    assert {name: (x.tolist(), n) for name, (x, n) in found.items()} == {"a": ([], 0), "b": ([], 0)}
    assert judged(rewards.Reward("j", None), letters, [], []).shape == (0, 0)


def test_a_judge_compares_all_of_a_group_and_a_tie_is_no_win():
    calls = []

    def longer(prompts, pairs):
        calls.append((prompts, pairs))
        return [None if len(a) == len(b) else int(len(b) > len(a)) for a, b in pairs]

    groups = [[rollout(1), rollout(3), rollout(1)], [rollout(2), rollout(2), rollout(4)]]
    wins_PG = judged(
        rewards.Reward("j", longer), letters, [{"prompt": "p"}, {"prompt": "q"}], groups
    )
    assert wins_PG.dtype == torch.float64 and wins_PG.tolist() == [[0, 2, 0], [1, 1, 0]]
    ((prompts, pairs),) = calls
    assert prompts == ["p"] * 3 + ["q"] * 3
    assert pairs[:3] == [("ccc", "a"), ("a", "a"), ("a", "ccc")]


def test_a_judge_that_raises_or_gives_no_verdict_is_named(tmp_path):
    file = tmp_path / "judge.py"
    file.write_text(
        "def f(prompts, pairs):\n    return pairs[0][2]\n\n\n"
        "def g(prompts, pairs):\n    return [2]\n"
    )
    rows_P, groups = [{"prompt": "p"}], [[rollout(1), rollout(2)]]
    with pytest.raises(InputError, match=r"--judge f raised IndexError: .*judge.py:2\) on 1 pairs"):
        judged(load_one(f"{file}:f"), letters, rows_P, groups)
    with pytest.raises(
        InputError, match="--judge g gave 1 verdicts for 1 pairs, or one that is not"
    ):
        judged(load_one(f"{file}:g"), letters, rows_P, groups)


def test_rollouts_get_the_answers_of_their_rows():
    groups = [[rollout(1), rollout(2)], [rollout(1)] * 2, [rollout(3)] * 2]
    seen_by(
        [{"prompt": "p", "answer": 4}, {"prompt": "q", "answer": None}, {"prompt": "r"}], groups
    )
    shown = [sample_records(letters.decode, group)[-1].get("answer") for group in groups]
    assert shown == ["4", None, None]


def test_a_reward_reads_what_samples_jsonl_shows_but_for_the_token_that_ended_it():
    """The user's own special tokens too; a second end token is text like any other."""
    groups = [[rollout(5, 1, 5, 4), rollout(5, 1)], [rollout(1, 4, 4), rollout(4)]]
    _, seen = seen_by([{"prompt": "p"}] * 2, groups)
    assert seen["completions"] == ["<answer>a<answer>", "<answer>a", "a<end>", ""]
    shown = [r["completion"] for group in groups for r in sample_records(letters.decode, group)]
    assert len(shown) == 4
    for text, completion in zip(seen["completions"], shown):
        assert completion in (text, text + "<end>")
    compared = []
    judge = rewards.Reward("j", lambda prompts, pairs: compared.extend(pairs) or [None])
    judged(judge, letters, [{"prompt": "p"}], [[rollout(1, 4), rollout(5)]])
    assert compared == [("<answer>", "a")]


def test_a_reward_gets_copies_of_its_own():
    """Whatever it does to them, the run and the next reward have what they had."""
    row = {"prompt": [{"role": "user", "content": "q"}], "tests": [{"in": 1}], "prompt_ids": [9]}
    rows_P, groups = [row], [[rollout(1, 2, 4), rollout(3)]]
    seen = []

    def spoils(completions, tests, prompts, prompt_ids, completion_ids, **columns):
        seen.append(repr((completions, tests, prompts, prompt_ids, completion_ids)))
        for i in range(2):
            completions[i][0]["content"] = "spoilt"
            tests[i][0]["in"] = prompts[i][0]["content"] = "spoilt"
            prompt_ids[i].clear()
            completion_ids[i].clear()
        completions.clear()
        return [0.0, 0.0]

    def judge(prompts, pairs):
        prompts[0].clear()
        return [None]

    rewards.score([rewards.Reward("r", spoils)] * 2, letters, rows_P, groups)
    judged(rewards.Reward("j", judge), letters, rows_P, groups)
    assert seen[0] == seen[1] and "spoilt" not in seen[0]
    assert "spoilt" not in repr(rows_P) and row["prompt"] and row["prompt_ids"] == [9]
    assert [r.ids for r in groups[0]] == [[1, 2, 4], [3]] and groups[0][0].prompt == [9]


def test_a_reward_may_take_the_step():
    """The step of metrics.jsonl that trains on the rollouts, however old the weights that sampled
    them."""
    groups = [[rollout(1, version=6), rollout(2, version=4)]]
    _, seen = seen_by([{"prompt": "p"}], groups, step=7)
    assert seen["step"] == [7, 7]


# ------------------------------------------------------------------- what a user's code may not do
HOSTILE = """
import os, sys, time

def leaves(completions, **columns):
    sys.exit(0)

def leaves_too(completions, **columns):
    raise SystemExit

def leaves_at_once(completions, **columns):
    os._exit(0)

def asks_twice(completions, **columns):
    try:
        exit()
    except SystemExit:
        pass
    quit(0)

def child(completions, **columns):
    process = os.fork()
    if process == 0:
        os._exit(7)
    return [float(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))] * len(completions)

def wanders(completions, **columns):
    import torch
    os.chdir("/")
    torch.set_grad_enabled(False)
    print("hello from a reward")
    return [0.0] * len(completions)

def lost(completions, **columns):
    os.chdir("/")
    raise ValueError("lost")

def sleeps(completions, **columns):
    time.sleep(30)

def insists(completions, **columns):
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            time.sleep(0.01)
        except Exception:
            pass

def hanging_judge(prompts, pairs):
    time.sleep(30)

def leaving_judge(prompts, pairs):
    sys.exit(0)

class Leaves:
    def __init__(self):
        exit()
"""


@pytest.fixture
def hostile(tmp_path):
    file = tmp_path / "hostile.py"
    file.write_text(HOSTILE)
    return lambda name, timeout=0.0: load_one(f"{file}:{name}", timeout=timeout)


@pytest.mark.parametrize("name", ["leaves", "leaves_too", "leaves_at_once", "asks_twice"])
def test_a_reward_cannot_end_the_run(hostile, name):
    with pytest.raises(InputError, match=rf"Reward {name} called exit\((0|None)\) \(.*hostile.py:"):
        call(hostile(name), ["a"], {})
    assert os._exit.__name__ == "_exit"


def test_neither_can_a_judge_a_class_or_the_file_of_a_reward(hostile, tmp_path):
    groups = [[rollout(1), rollout(2)]]
    with pytest.raises(InputError, match=r"--judge leaving_judge called exit\(0\)"):
        judged(hostile("leaving_judge"), letters, [{"prompt": "p"}], groups)
    with pytest.raises(InputError, match=r"Leaves called exit\(None\) .*must not end the run"):
        hostile("Leaves")
    (tmp_path / "script.py").write_text("def f(completions): pass\n\n\nraise SystemExit(0)\n")
    with pytest.raises(InputError, match=r"script.py:f called exit\(0\) \(.*script.py:4\)"):
        load_one(f"{tmp_path}/script.py:f")


def test_a_process_that_a_reward_forks_may_end(hostile):
    assert call(hostile("child"), ["a", "b"], {}) == [7.0, 7.0]


def test_a_reward_leaves_folder_output_and_autograd_as_they_were(hostile, capsys):
    before = os.getcwd()
    assert call(hostile("wanders"), ["a"], {}) == [0.0]
    assert os.getcwd() == before and torch.is_grad_enabled()
    output = capsys.readouterr()
    assert output.out == "" and output.err == "hello from a reward\n"
    with pytest.raises(InputError, match="raised ValueError: lost"):
        call(hostile("lost"), ["a"], {})
    assert os.getcwd() == before


@pytest.mark.parametrize("name", ["sleeps", "insists"])
def test_a_reward_that_hangs_is_stopped(hostile, name):
    began, handler = time.monotonic(), signal.getsignal(signal.SIGALRM)
    with pytest.raises(
        InputError, match=f"{name} took more than --reward_timeout 0.2 seconds for 2 completions"
    ):
        call(hostile(name, timeout=0.2), ["a", "b"], {})
    assert time.monotonic() - began < 10
    assert signal.getsignal(signal.SIGALRM) == handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_so_are_a_judge_and_a_regular_expression_that_backtracks(hostile):
    began = time.monotonic()
    with pytest.raises(InputError, match="--judge hanging_judge took more than --reward_timeout"):
        judge = hostile("hanging_judge", timeout=0.2)
        judged(judge, letters, [{"prompt": "p"}], [[rollout(1), rollout(2)]])
    with pytest.raises(InputError, match="took more than --reward_timeout 0.2 seconds"):
        call(load_one("regex:(a+)+b", timeout=0.2), ["a" * 60], {})
    assert time.monotonic() - began < 10
    functions, _ = load(["exact", "regex:x"], None, timeout=3.0)
    assert [f.timeout for f in functions] == [3.0, 3.0]


# -------------------------------------------------------------------------------- before the run
def test_a_built_in_reward_needs_its_column_in_every_row():
    rows_P = [
        {"prompt": "p", "answer": "1", "__line__": "f.jsonl:1"},
        {"prompt": "p", "answer": None, "__line__": "f.jsonl:2"},
        {"prompt": "p", "other": "x", "__line__": "f.jsonl:3"},
    ]
    for name in ("exact", "gsm8k", "boxed"):
        with pytest.raises(
            InputError,
            match=f"f.jsonl:2: reward {name} needs the column answer, which is missing or null in "
            "2 of 3 rows; remove or complete these rows.",
        ):
            rewards.check([load_one(name)], rows_P)
        with pytest.raises(
            InputError, match="1 rows; the columns are other: --rename theirs=answe"
        ):
            rewards.check([load_one(name)], rows_P[2:])
        assert rewards.check([load_one(name)], rows_P[:1]) == ""
    functions, _ = load(["format", "regex:a", "length:9:3"], None)
    assert rewards.check(functions, rows_P) == ""


def test_a_gold_answer_that_cannot_be_read_is_found_before_the_run():
    rows_P = [{"prompt": "p", "answer": x, "__line__": f"f:{x}"} for x in ("1", "2", "many")]
    with pytest.raises(InputError, match="f:many: Reward gsm8k: the answer 'many'"):
        rewards.check([load_one("gsm8k")], rows_P)


def test_an_own_reward_finds_its_columns_before_the_run(user, tmp_path):
    with_first = [{"prompt": "p", "first": "a"}, {"prompt": "p", "first": None}]
    assert rewards.check([load_one(user("starts"))], with_first) == ""  # it has None there
    with pytest.raises(
        InputError, match="data:1: reward starts needs the column first, which is missing"
    ):
        rewards.check([load_one(user("starts"))], [{"prompt": "p", "__line__": "data:1"}])
    with pytest.raises(InputError, match="no_columns cannot be called .* unexpected keyword"):
        rewards.check([load_one(user("no_columns"))], with_first)


def test_columns_of_the_data_that_the_run_hides_are_said():
    rows_P = [{"prompt": "p", "step": 3, "completions": ["x"], "prompt_ids": [9]}]
    said = rewards.check([rewards.Reward("r", lambda **columns: None)], rows_P)
    assert "do not see the data's step, completions" in said and "--rename step=other" in said
    _, seen = seen_by(rows_P, [[rollout(1)]])
    assert seen["step"] == [1] and seen["completions"] == ["a"]


# ------------------------------------------------------------------------------------------- state
class Mean:
    """A reward relative to the mean so far."""

    def __init__(self):
        self.total, self.seen = 0.0, []

    def __call__(self, completions, **columns):
        self.total += sum(map(len, completions))
        self.seen += completions
        return [self.total] * len(completions)

    def state_dict(self):
        return {"total": torch.tensor(self.total, dtype=torch.float64), "seen": self.seen}

    def load_state_dict(self, state):
        self.total, self.seen = float(state["total"]), state["seen"]


def with_mean():
    return [load_one("format"), rewards.Reward("mean", Mean())]


def test_the_state_of_a_reward_is_saved_and_restored(alone):
    functions, others = with_mean(), with_mean()
    call(functions[1], ["abc", "d"], {})
    saved = json.loads(json.dumps(rewards.states(functions)))
    assert rewards.restore(others, {"rewards": saved}) == ""
    assert call(others[1], ["a"], {}) == call(functions[1], ["a"], {}) == [5.0]
    assert others[1].function.seen == ["abc", "d", "a"]
    fresh = {}
    assert rewards.restore(others, fresh) == "" and fresh == {"rewards": rewards.states(others)}
    assert rewards.states([load_one("format")]) == []
    assert "without their state, which 2 ranks had saved and 1 resume" in rewards.restore(
        others, {"rewards": saved * 2}
    )


def test_an_evaluation_leaves_the_state_of_a_reward_alone():
    functions = with_mean()
    call(functions[1], ["abc"], {})
    for error in (None, KeyError):
        try:
            with rewards.held_out(functions):
                call(functions[1], ["a"] * 5, {})
                assert functions[1].function.total == 8.0
                if error:
                    raise error
        except KeyError:
            pass
        assert functions[1].function.total == 3.0 and functions[1].function.seen == ["abc"]


def test_a_state_that_cannot_be_saved_says_so(alone, monkeypatch):
    functions = with_mean()
    functions[1].function.seen = [Mean()]
    with pytest.raises(InputError, match="cannot be saved: make it of numbers, text, lists, dicts"):
        rewards.restore(functions, {})
    functions[1].function.seen = ["a"]
    monkeypatch.setattr(rewards, "LARGEST_STATE", 100)
    with pytest.raises(InputError, match="leave out what does not change"):
        rewards.states(functions)


def test_where_no_reward_applies_the_sum_is_nan():
    nan = float("nan")
    total_PG = rewards.total([[[1.0, nan, nan]], [[2.0, 4.0, nan]]], [1.0, 0.5])
    assert total_PG[0, :2].tolist() == [2.0, 2.0] and total_PG.isnan().tolist() == [
        [False, False, True]
    ]


# --------------------------------------------------------------------------- models, and the README
def test_a_reward_model_has_the_dtype_and_the_tokens_of_the_run(monkeypatch):
    seen = []

    class Same:
        def check_same(self, folder, flag):
            seen.append((folder, flag))

    monkeypatch.setattr(rewards, "load_scalar_model", lambda *given: seen.append(given))
    for dtype in (torch.float32, torch.bfloat16):
        functions, _ = load(["model:rm"], None, Same(), World(0, 1, "cpu", dtype), tokens=77)
        assert seen[-2:] == [("rm", "--reward model:"), ("rm", "cpu", dtype)]
        assert functions[0].function.tokens == 77


def test_the_reward_in_the_readme_scores_chat_prompts_and_plain_ones():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf8")
    (source,) = [
        x for x in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) if "def short" in x
    ]
    defined = {}
    exec(source, defined)
    reward = rewards.Reward("short", defined["short"])
    rows_P = [{"prompt": "2+2?"}, {"prompt": [{"role": "user", "content": "2+2?"}]}]
    reward_FPG = rewards.score([reward], letters, rows_P, [[rollout(1), rollout(*[1] * 99)]] * 2)
    assert reward_FPG.tolist() == [[[1.0, 0.0], [1.0, 0.0]]]


def test_a_reward_that_catches_its_timeout_does_not_answer_with_what_it_caught():
    def catches_all(completions, **columns):
        scores = []
        for _ in completions:
            try:
                time.sleep(0.2)
                scores.append(1.0)
            except BaseException:
                scores.append(0.0)
        return scores

    with pytest.raises(InputError, match="took more than --reward_timeout 0.1 seconds"):
        rewards.call(rewards.Reward("slow", catches_all, 0.1), ["a", "b"], {})


def test_the_state_of_rewards_goes_by_their_names(alone):
    class Counts:
        count = 0

        def __call__(self, completions, **columns):
            return [0.0] * len(completions)

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    first, second = Counts(), Counts()
    first.count, second.count = 1, 2
    state = {"rewards": rewards.states([rewards.Reward("a", first), rewards.Reward("b", second)])}
    again = {name: Counts() for name in "bc"}
    said = rewards.restore([rewards.Reward(name, f) for name, f in again.items()], state)
    assert again["b"].count == 2 and again["c"].count == 0
    assert said == "warning: the saved state of a is lost: no such reward."
