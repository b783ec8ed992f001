"""A chat template as text: its sandbox, what it renders, and what it writes around an answer.

Special tokens are strings here. spans.py finds answers in what is rendered; tokenizer.py turns
text into token ids.
"""

import hashlib
import json
import re
import resource
import signal
import sys
import threading
import time
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property, lru_cache, wraps
from typing import NamedTuple

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanopost import InputError

# Private-use characters that mark places in renderings; a text that holds one is refused.
PROBE, OPEN, CLOSE = "\U000f5a5a", "\U000f5a5b", "\U000f5a5c"
# What a template may raise while it runs.
ERRORS = (
    *(TypeError, AttributeError, LookupError, ValueError, ArithmeticError),
    *(RecursionError, MemoryError),
)
# What a rendering may take. Templates are untrusted, and rows may be endless too.
SECONDS = 10  # of CPU time
CHARACTERS = 2**26
BYTES = 2**30  # by which the peak memory of the process may grow


class TooMuch(InputError):
    """A rendering that takes too long or is too large: whatever it was for, it ends here."""


class Trial(NamedTuple):
    """What a template writes around one plain question and its answer."""

    header: str = ""  # between question and answer
    footer: str = ""  # after the answer
    prompt: str = ""  # after a lone question, with the generation prompt
    asked: str = ""  # after a lone question, without it


class Template:
    """A chat template and the special tokens that it may write.

    source: Jinja, or None for a base model. named: special tokens by the names that templates use,
    {"eos_token": "</s>", ...}. special: all of them. stops: those that end a completion; turn_end
    joins them.
    """

    def __init__(self, source: str | None, named: dict[str, str], special, stops=()):
        self.source = source
        if source is not None:
            _compile(source, "", "")  # so that no row is blamed for an error in it
        self.named = named
        self.special = frozenset(special)
        self.stops = frozenset({*stops, self.turn_end} - {None})

    @property
    def hash(self) -> str | None:
        return self.source and hashlib.sha256(self.source.encode()).hexdigest()[:16]

    @property
    def marks_answers(self) -> bool:
        """Whether it has {% generation %} blocks."""
        return re.search(r"\{%[-+]?\s*generation\b", self.source) is not None

    def render(
        self,
        messages: list[dict],
        tools=None,
        add_generation_prompt=False,
        marks=("", ""),
        **variables,
    ) -> str:
        """The conversation as text; `marks` go around the text of each {% generation %} block.

        InputError quotes the template's own refusal.
        """
        if self.source is None:
            raise InputError(
                "messages need a chat template, and this model has none: give one "
                "(--chat_template FILE)."
            )
        variables = {
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        template = _compile(self.source, *marks)
        messages = [_as_templates_expect(message) for message in messages]
        try:
            with _limited():
                try:
                    text = template.render({**self.named, "messages": messages, **variables})
                except TypeError:  # perhaps it puts arguments of calls between text (DeepSeek's)
                    messages = [_with_text_arguments(message) for message in messages]
                    text = template.render({**self.named, "messages": messages, **variables})
        except InputError:  # a ValueError; from the limits
            raise
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template refuses this conversation: {error}.") from error
        except ERRORS as error:
            raise InputError(
                f"the chat template fails on this conversation ({type(error).__name__}: {error})."
            ) from error
        _check_size(len(text))
        return text

    def try_render(self, *args, **variables) -> str:
        """The same, or "" if the template refuses; some refuse a conversation cut short."""
        try:
            return self.render(*args, **variables)
        except TooMuch:
            raise
        except InputError:
            return ""

    def turn(self, prompt: list[dict], reply: list[dict], **variables) -> str:
        """What follows the token that ends an answer to `prompt`: `reply`, the messages of an
        environment, and the generation prompt.

        It is the same whatever the answer says, so a stand-in is rendered in its place: one that
        calls the tools whose messages are in `reply`. InputError if the template refuses.
        """
        if PROBE in str(reply):
            raise InputError(f"a message of the environment has the character {PROBE!a}: drop it.")
        calls = []
        for message in reply:
            if message["role"] == "tool":
                function = {"name": message.get("name", "tool"), "arguments": {"text": PROBE}}
                given = message.get("tool_call_id", "call00000")
                calls.append({"type": "function", "id": given, "function": function})
        answer = {"role": "assistant", "content": PROBE, "tool_calls": calls or None}
        text = self.render([*prompt, answer, *reply], add_generation_prompt=True, **variables)
        _, answered, after = text.rpartition(PROBE)
        _, ended, turn = after.partition(self.turn_end or PROBE)
        if not answered or not ended:
            raise InputError(
                "the chat template writes no token that ends an answer, so no turn can follow: "
                "give one that does (--chat_template FILE)."
            )
        return turn

    # --------------------------------------------------------------------------- found by trial
    @cached_property
    def trial(self) -> Trial:
        """Every part is empty if the template refuses even this plain conversation."""
        question = {"role": "user", "content": OPEN}
        answer = {"role": "assistant", "content": PROBE}
        conversation = self.try_render([question, answer])
        if not conversation:
            return Trial()
        header, _, footer = conversation.rpartition(OPEN)[2].partition(PROBE)
        prompt = self.try_render([question], add_generation_prompt=True).rpartition(OPEN)[2]
        asked = self.try_render([question], add_generation_prompt=False).rpartition(OPEN)[2]
        return Trial(header, footer, prompt, asked)

    @cached_property
    def unprompted(self) -> str:
        """The header of an answer, if the template has no generation prompt to write it."""
        if self.trial.prompt != self.trial.asked:
            return ""
        return self.trial.header.removeprefix(self.trial.asked).strip()

    @cached_property
    def turn_end(self) -> str | None:
        """The special token that the template writes after an answer."""
        return self._closing_token(self.trial.footer)

    @cached_property
    def answer_end(self) -> re.Pattern:
        """What closes an answer: the template's footer up to turn_end, a stop token, or the token
        that closes a question (gpt-oss closes the last answer differently from earlier ones)."""
        question_end = self._closing_token(self.trial.asked)
        ways = [rf"\s*{any_of(self.stops)}", rf"\s*{any_of([question_end])}"]
        if self.turn_end:
            before, end, _ = self.trial.footer.partition(self.turn_end)
            ways.insert(0, re.escape(before + end))
        return re.compile("|".join(ways))

    def closing(self, text: str) -> int:
        """Where the special tokens and the whitespace that end a text begin."""
        end = len(text)
        while True:
            at = len(text[:end].rstrip())
            tokens = [token for token in self.special if token and text.endswith(token, 0, at)]
            if not tokens:
                return at
            end = at - max(map(len, tokens))

    def _closing_token(self, text):
        """The last token of the first run of special tokens in what closes a text."""
        special = any_of(self.special)
        run = re.search(f"(?:{special})+", text[self.closing(text) :])
        return run and re.findall(special, run.group())[-1]

    def warnings(self) -> list[str]:
        """What looks wrong with the template, whatever the rows: one sentence each."""
        header, _, prompt, _ = self.trial
        roles = ("system", "user", "assistant")
        answered = self.try_render([{"role": role, "content": role + PROBE} for role in roles])
        warnings = []
        if header and not self.turn_end:
            warnings.append("the template writes no end-of-turn token after an answer.")
        if self.unprompted:
            warnings.append(
                "the template has no generation prompt: a rollout must write "
                f"{self.unprompted!r} itself."
            )
        if not header.startswith(prompt):
            warnings.append(
                f"a rollout starts from a prompt that ends in {prompt!r}, but in training an "
                f"answer follows {header!r}."
            )
        if answered and "system" + PROBE not in answered:
            warnings.append("the template drops the system message once the question is answered.")
        if "strftime_now" in (self.source or ""):
            warnings.append(
                "the template writes today's date, so tokens change from day to day "
                "(chat_template_kwargs may set it)."
            )
        return warnings


def any_of(tokens) -> str:
    """A pattern that matches any of the tokens, the longest first; None and "" match nothing."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return f"(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})"


def _as_templates_expect(message):
    """As in transformers: no key without a value, and reasoning under both names in use."""
    message = {key: value for key, value in message.items() if value is not None}
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in message:
            reasoning = message[name]
            return {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _with_text_arguments(message):
    """A message with the arguments of its tool calls as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        inner = call.get("function", call)
        inner = {**inner, "arguments": _tojson(inner.get("arguments"))}
        calls.append({**call, "function": inner} if "function" in call else inner)
    return {**message, "tool_calls": calls}


# ------------------------------------------------------------------------------------------ limits
@contextmanager
def _limited():
    """TooMuch if what runs inside takes too long or too much memory.

    Python's signals reach the main thread alone: elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    began, peak = time.thread_time(), _peak_bytes()

    def check(signum, frame):
        if time.thread_time() - began > SECONDS:
            raise TooMuch(
                f"the chat template takes more than {SECONDS} seconds for one conversation: give "
                "another template (--chat_template FILE), or leave this row out."
            )
        if _peak_bytes() - peak > BYTES:
            raise TooMuch(_too_large())

    before = signal.signal(signal.SIGVTALRM, check)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.05, 0.05)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _peak_bytes():
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _too_large():
    return (
        f"the chat template writes more than {CHARACTERS:,} characters for one conversation: give "
        "another template (--chat_template FILE), or leave this row out."
    )


def _check_size(size):
    if size > CHARACTERS:
        raise TooMuch(_too_large())


def _check_arguments(values):
    """TooMuch for a width or a count that would make an endless text at once: no signal interrupts
    that."""
    for value in values:
        if isinstance(value, int):
            _check_size(value)


def _check_format(pattern):
    """TooMuch for widths of more characters than there may be, or given apart from the pattern."""
    if isinstance(pattern, str):
        if re.search(r"[0-9]{9}|%[^%a-zA-Z]*[*]", pattern):
            raise TooMuch(_too_large())
        _check_size(sum(map(int, re.findall(r"[0-9]+", pattern))))


def _check_method(name, text, args):
    """TooMuch for a method of strings, or a filter of its name, whose result would be too long."""
    if name == "join" and isinstance(text, str) and args and isinstance(args[0], (list, tuple)):
        _check_size(sum(_length(part) + len(text) for part in args[0]))
    elif name == "replace" and isinstance(text, str) and len(args) > 1:
        old, new = str(args[0]), str(args[1])
        _check_size(len(text) + text.count(old) * len(new))
    elif name == "expandtabs" and isinstance(text, str):
        width = args[0] if args and isinstance(args[0], int) else 8
        _check_size(len(text) + text.count("\t") * width)


def _joined(function):
    """The filter join, which is called with the parts, then what is between them."""

    @wraps(function)
    def checked(context, value, d="", attribute=None):  # d: what goes between, by jinja's name
        value = list(value)
        _check_method("join", str(d), [value])
        return function(context, value, d, attribute)

    return checked


def _replaced(function):
    @wraps(function)
    def checked(context, text, *args, **more):
        _check_method("replace", str(text), [*args, *more.values()])
        return function(context, text, *args, **more)

    return checked


def _bounded(function):
    @wraps(function)
    def checked(value, *args, **more):
        _check_arguments([*args, *more.values()])
        return function(value, *args, **more)

    return checked


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context, operator, left, right):
        if operator == "%":
            _check_format(left)
        elif operator == "**":
            _check_size(_bits(left) * (right if isinstance(right, int) else 1))
        elif isinstance(left, int) and isinstance(right, int):
            _check_size(_bits(left) + _bits(right))
        else:
            _check_size(_length(left) * _length(right))
        return super().call_binop(context, operator, left, right)

    def call(*given, **more):  # self is in given, so an argument may have that name
        environment, context, function, *args = given
        _check_arguments([*args, *more.values()])
        if getattr(function, "__name__", "") in ("format", "format_map"):
            method = getattr(function, "__wrapped__", function)
            _check_format(getattr(method, "__self__", ""))
        name, owner = getattr(function, "__name__", ""), getattr(function, "__self__", None)
        _check_method(name, owner, [*args, *more.values()])
        return super(_Environment, environment).call(context, function, *args, **more)


def _bits(number):
    return number.bit_length() if isinstance(number, int) else 1


def _length(operand):
    """Of a sequence, or how often a number repeats one."""
    if isinstance(operand, (str, list, tuple)):
        return len(operand)
    return operand if isinstance(operand, int) else 1


# ----------------------------------------------------------------------------------------- sandbox
@lru_cache(8)
def _compile(source, begin, end):
    """A template in the sandbox, with the helpers that transformers gives it.

    begin and end go around the text of each {% generation %} block.
    """

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller):
            return begin + caller() + end

    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    for name in ("center", "indent", "tojson"):
        environment.filters[name] = _bounded(environment.filters[name])
    environment.filters["join"] = _joined(environment.filters["join"])
    environment.filters["replace"] = _replaced(environment.filters["replace"])
    environment.filters["format"] = _format
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
        "dict": _dict,
    }
    try:
        compiled = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(
            f"the chat template is not valid Jinja (line {error.lineno}: {error.message})."
        ) from error
    # Each rendering copies the globals; as a ChainMap that would take most of the time.
    compiled.globals = dict(compiled.globals)
    return compiled


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _strftime_now(pattern):
    return datetime.now().strftime(pattern)


def _dict(*args, **more):
    """The class itself would give access to dict.update, which changes messages in place."""
    return dict(*args, **more)


def _format(pattern, *args, **more):
    _check_format(pattern)
    return pattern % (more or args)


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Namespace(jinja2.utils.Namespace):
    """A template is untrusted: it can store nothing whose name begins with an underscore."""

    def __init__(*args, **attributes):  # self is in args, so an attribute may have that name
        jinja2.utils.Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **attributes).items():
            args[0][name] = value

    def __setitem__(self, name, value):
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"{name!r} on a namespace")
        super().__setitem__(name, value)
