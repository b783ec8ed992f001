"""A chat template as text: the sandbox it runs in, and what it is given."""

import json
import re
from datetime import datetime
from functools import lru_cache

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanopost import InputError

PROBE, OPEN, CLOSE = (
    "\U000f5a5a",
    "\U000f5a5b",
    "\U000f5a5c",
)  # private use; a text that has one is refused


TOOL = "nanopost_QxZ"  # a name that no tool has


def _tools(tools):
    """A row's tools, which may be JSON text."""
    try:
        return json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        raise InputError(
            f"tools is text, but not JSON ({error}): make it a list of tools."
        ) from error


def _tool(tool):
    return tool.get("function", tool)


def _any(tokens):
    """A pattern that matches any of the tokens, the longest first."""
    return f"(?:{'|'.join(map(re.escape, sorted(filter(None, tokens), key=len, reverse=True))) or '(?!)'})"


def _as_templates_know_it(message):
    """As in transformers: no key without a value, and reasoning by the two names that templates read."""
    message = {key: value for key, value in message.items() if value is not None}
    names = [key for key in ("reasoning_content", "thinking", "reasoning") if key in message]
    return (
        {"thinking": message[names[0]], **message, "reasoning_content": message[names[0]]}
        if names
        else message
    )


# ------------------------------------------------------------------------------------------------------------- sandbox
@lru_cache(8)
def _compile(template, begin, end):
    """A template in the sandbox and with the helpers that transformers gives it. begin and end go around the text of
    each {% generation %} block."""

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller):
            return begin + caller() + end

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
        "dict": lambda *args, **more: dict(*args, **more),
    }  # the class itself would unlock mutation
    try:
        compiled = environment.from_string(template)
        compiled.globals = dict(
            compiled.globals
        )  # a ChainMap, copied at each rendering, takes most of the time
        return compiled
    except jinja2.TemplateSyntaxError as error:
        raise InputError(
            f"the chat template is not valid Jinja (line {error.lineno}: {error.message})."
        ) from error


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _strftime_now(pattern):
    return datetime.now().strftime(pattern)


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Namespace(jinja2.utils.Namespace):
    """A template is untrusted: nothing whose name begins with an underscore is stored."""

    def __init__(*args, **attributes):  # self is in args, so that an attribute may have that name
        jinja2.utils.Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **attributes).items():
            args[0][name] = value

    def __setitem__(self, name, value):
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"{name!r} on a namespace")
        super().__setitem__(name, value)
