r"""Where answers are in a rendered conversation: the characters to train.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
                                                         ~~~~~~~~~~~~~~~
A span starts where the generation prompt ends, since the model writes everything after it, and ends
with the token that closes the turn, since the model must learn to stop. Templates may mark answers
with {% generation %} blocks. Without them spans are found by experiment: render again with PROBE, a
character that occurs nowhere else, next to a message's content, and see where it lands. That works
for templates that trim content, drop earlier thinking or add text of their own. Whatever cannot be
found this way is refused, never guessed.

Most of it is found in a few renderings with a probe in every message, and in renderings of single
questions, so that a message is rendered equally often however long its conversation is. Where these
do not match the text, one probe at a time is used instead.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

from nanopost import InputError
from nanopost.template import CLOSE, OPEN, PROBE, Template, any_of

SYSTEM = ("system", "developer")
TOOL = "nanopost_QxZ"  # a name that no tool has


def answer_spans(
    template: Template, messages: list[dict], text: str, turns: list[int], **variables
) -> list[tuple[int, int]]:
    """Spans of the assistant messages with indices `turns` in `text` -> (start, end) in characters.

    text: the rendering of messages with these variables. InputError if a span cannot be found, or
    if the template drops a tool or a tool call.
    """
    if any(mark in text for mark in (PROBE, OPEN, CLOSE)):
        raise InputError(
            "the text holds a character of U+F5A5A to U+F5A5C, which mark answers here: remove it."
        )
    _check_tools(template, messages, **variables)
    rendering = _Rendering(template, messages, text, partial(template.try_render, **variables))
    if not template.marks_answers:
        return [rendering.span(k) for k in turns]
    marked = template.render(messages, marks=(OPEN, CLOSE), **variables)
    return rendering.marked_spans(marked, turns)


@dataclass
class _Rendering:
    """Messages and their rendering. Places are indices of characters in `text`, None if unknown."""

    template: Template
    messages: list[dict]
    text: str
    render: Callable[..., str]  # renders other messages in the same way; "" if refused
    alone: set[int] = field(default_factory=set)  # whose ends one rendering of all does not show

    def span(self, k: int) -> tuple[int, int]:
        """From the end of answer k's generation prompt to the end of what closes the answer."""
        find_start = [self.prompt_end, self.content_start]
        if self.template.unprompted:
            find_start.reverse()
        start = find_start[0](k)
        if start is None:
            start = find_start[1](k)
        if start is None:
            raise _not_found(k, "begins")
        if self.messages[k].get("tool_calls"):
            end = self.end_of_calls(k, start)
        else:
            end = self.end(k, start)
        if end is None:
            raise _not_found(k, "ends")
        return start, end

    def content(self, k):
        content = self.messages[k].get("content")
        return content if isinstance(content, str) else ""

    def around_probe(self, k, content, among=None, **variables):
        """Text before and after PROBE when `content`, which holds it, replaces message k's.

        among: indices of the messages to render; default: all. (None, None) unless PROBE is
        rendered exactly once.
        """
        messages = list(self.messages)
        messages[k] = {**messages[k], "content": content}
        if among is not None:
            messages = [messages[i] for i in among]
        text = self.render(messages, **variables)
        if text.count(PROBE) != 1:
            return None, None
        before, _, after = text.partition(PROBE)
        return before, after

    def between_probes(self, contents):
        """The pieces of a rendering in which these contents, {k: text with PROBE}, replace those of
        many messages at once -> {k: the piece before the probe of message k}, and the last piece
        at None. {} if the probes come in another order."""
        messages = list(self.messages)
        for k, content in contents.items():
            messages[k] = {**messages[k], "content": content.replace(PROBE, f"{PROBE}{k}{PROBE}")}
        pieces = re.split(f"{PROBE}([0-9]+){PROBE}", self.render(messages))
        order = [int(k) for k in pieces[1::2]]
        if order != sorted(set(order)):
            return {}
        return dict(zip([*order, None], pieces[::2]))

    @cached_property
    def probed(self):
        """The messages that hold a probe along with the others. Not a call without content: with
        content, templates write something else around it. Nor what the system says, which some
        templates move, unless it is what an answer follows."""
        found = []
        for k, message in enumerate(self.messages):
            followed = k + 1 < len(self.messages) and self.messages[k + 1]["role"] == "assistant"
            if message["role"] in SYSTEM and not followed:
                continue
            if self.content(k) or not message.get("tool_calls"):
                found.append(k)
        return found

    @cached_property
    def content_ends(self):
        """{k: where the content of message k ends}, from the last one back: the piece between two
        probes is in `text` too, with the content as it is or trimmed."""
        as_is = self.between_probes({k: self.content(k) + PROBE for k in self.probed})
        trimmed = as_is
        if "".join(as_is.values()) != self.text:
            trimmed = self.between_probes(
                {k: self.content(k).rstrip() + PROBE for k in self.probed}
            )
        ends, at = {}, len(self.text)
        for k, after in reversed([*zip(as_is, [*as_is][1:])]):
            fits = (p[after] for p in (as_is, trimmed) if after in p)
            piece = next((p for p in fits if at is not None and self.text.endswith(p, 0, at)), None)
            if piece is None:
                self.alone.add(k)
            at = self.content_end_alone(k) if piece is None else at - len(piece)
            ends[k] = at
        return ends

    @property
    def is_regular(self):
        """Whether the probes showed messages in order, and none changed what is around another."""
        return bool(self.content_ends) and not self.alone

    @cached_property
    def content_starts(self):
        """{k: where the content of answer k begins}, in the same way from the first one on."""
        answers = [k for k in self.probed if self.messages[k]["role"] == "assistant"]
        as_is = self.between_probes({k: PROBE + self.content(k) for k in answers})
        trimmed = as_is
        if "".join(as_is.values()) != self.text:
            trimmed = self.between_probes({k: PROBE + self.content(k).lstrip() for k in answers})
        starts, at = {}, 0
        for k in [*as_is][:-1]:
            fits = (p[k] for p in (as_is, trimmed) if k in p)
            piece = next((p for p in fits if at is not None and self.text.startswith(p, at)), None)
            at = self.content_start_alone(k) if piece is None else at + len(piece)
            starts[k] = at
        return starts

    def content_start(self, k):
        if k in self.content_starts:
            return self.content_starts[k]
        return self.content_start_alone(k)

    def content_start_alone(self, k):
        before, _ = self.around_probe(k, PROBE + self.content(k))
        if before is None or not self.text.startswith(before):
            return None
        return len(before)

    def content_end(self, k):
        if k in self.content_ends:
            return self.content_ends[k]
        return self.content_end_alone(k)

    def content_end_alone(self, k):
        _, after = self.around_probe(k, self.content(k) + PROBE)
        if after is None or not self.text.endswith(after):
            return None
        return len(self.text) - len(after)

    # ----------------------------------------------------------------------------------- prompts
    def question(self, k):
        """Indices of the messages that answer k is for: the last question and what came of it last,
        after the system's."""
        roles = [m["role"] for m in self.messages[:k]]
        if "user" not in roles:
            return range(k)
        asked = k - 1 - roles[::-1].index("user")
        latest = k - 1 - roles[::-1].index("assistant") if "assistant" in roles else 0
        system = 0
        while roles[system] in SYSTEM:
            system += 1
        return sorted({*range(system), asked, *range(max(asked, latest), k)})

    @cached_property
    def asks_alike(self):
        """Whether the last answer's question alone gives the prompt that the conversation gives."""
        if not self.is_regular:
            return False
        answers = [k for k, m in enumerate(self.messages) if m["role"] == "assistant" and k]
        k = answers[-1]
        return self.prompt_among(self.question(k), k) == self.prompt_among(range(k), k)

    def prompt_among(self, among, k):
        """What follows message k - 1 in the prompt from which a rollout would write answer k."""
        probed = self.content(k - 1) + PROBE
        return self.around_probe(k - 1, probed, among, add_generation_prompt=True)[1]

    def prompt(self, k):
        found = None
        question = self.question(k)
        if len(question) < k and self.asks_alike:
            found = self.prompt_among(question, k)
        return self.prompt_among(range(k), k) if found is None else found

    @cached_property
    def headers(self):
        """{k: what the template writes between message k - 1 and the content of answer k}."""
        if not self.is_regular:
            return {}
        contents, answers = {}, []
        for k, message in enumerate(self.messages):
            if message["role"] == "assistant" and k and k - 1 not in contents:
                contents |= {k - 1: self.content(k - 1) + PROBE, k: PROBE}
                answers.append(k)
        pieces = self.between_probes(contents)
        found = {k: pieces[k] for k in answers if k in pieces and k - 1 in pieces}
        last = max(found, default=None)
        return found if last and found[last] == self.header_alone(last) else {}

    def header(self, k):
        return self.headers[k] if k in self.headers else self.header_alone(k)

    def header_alone(self, k):
        before, _ = self.around_probe(k, PROBE)
        previous_end = self.content_end(k - 1)
        if before is None or not before.startswith(self.text[:previous_end]):
            return None
        return before[previous_end:]

    def prompt_end(self, k):
        """How far text agrees with the prompt from which a rollout would write answer k."""
        if k == 0:
            return None
        previous_end = self.content_end(k - 1)
        if previous_end is None:
            return None
        prompt = self.prompt(k)
        if prompt is None:
            return None
        if self.text.startswith(prompt, previous_end):
            return previous_end + len(prompt)
        # The prompt has more than this turn (DeepSeek-R1's ends in <think>). The content may begin
        # like the rest of the prompt, so the header is what comes before a content of PROBE alone.
        header = self.header(k)
        if header is None:
            return None
        if header.split() == prompt.split() and self.text.startswith(header, previous_end):
            return previous_end + len(header)  # they differ only in whitespace
        there = self.text[previous_end : previous_end + len(header)]
        return previous_end + len(os.path.commonprefix([prompt, header, there]))

    def end(self, k, start):
        """After what closes the turn; if nothing does, after the content."""
        content_end = self.content_end(k)
        if content_end is None:
            return None
        answer_end = max(start, content_end)
        closed = self.template.answer_end.match(self.text, answer_end)
        return closed.end() if closed else answer_end

    def end_of_calls(self, k, start):
        """After what closes a turn with tool calls.

        The turn's tail, from the last call's name to the closing token, is read off a rendering
        that ends with this turn, where that token is among the special tokens at the very end.
        """
        name = _function(self.messages[k]["tool_calls"][-1])["name"]
        after = start
        if self.content(k):
            after = max(start, self.content_end(k) or 0)
        if k + 1 == len(self.messages):
            return self.end_of_tail(name, self.text, after, None)
        before = self.content_end(k + 1)
        for among in (self.question(k), range(k)):
            alone = self.render([*(self.messages[i] for i in among), self.messages[k]])
            end = self.end_of_tail(name, alone, after, before)
            if end is not None:
                return end
        return None

    def end_of_tail(self, name, alone, after, before):
        """The end of alone's tail, from the last `name` to the closing token, in text."""
        if name not in alone:
            return None
        tail = alone[alone.rfind(name) : self.close_of(alone)]
        found = self.text.find(tail, after, before)
        return found + len(tail) if found >= 0 else None

    def close_of(self, text):
        """The end of turn_end, or else of the last special token, among those that end `text`."""
        end = self.template.closing(text)
        for token in re.compile(any_of(self.template.special)).finditer(text, end):
            end = token.end()
            if token.group() == self.template.turn_end:
                break
        return end

    def marked_spans(self, marked, turns):
        """The {% generation %} blocks of these turns; OPEN and CLOSE surround blocks in marked."""
        if marked.replace(OPEN, "").replace(CLOSE, "") != self.text:
            raise InputError(
                "the template's {% generation %} blocks change what it writes: mark whole pieces "
                "of text."
            )
        starts = self.turn_starts()
        spans = []
        at = start = 0
        for piece in re.split(f"([{OPEN}{CLOSE}])", marked):
            if piece == OPEN:
                start = at
            elif piece == CLOSE:
                k = max((k for k in starts if starts[k] <= start), default=None)
                if k in turns:
                    spans.append(self.trimmed(k, start, at))
            else:
                at += len(piece)
        return spans

    def turn_starts(self):
        """{k: where the message before assistant message k ends}."""
        starts = {}
        for k, message in enumerate(self.messages):
            if message["role"] == "assistant":
                starts[k] = self.content_end(k - 1) if k else 0
        if None in starts.values():
            raise InputError(
                "cannot tell which {% generation %} block of the template belongs to which message."
            )
        return starts

    def trimmed(self, k, start, end):
        """A block of turn k without the generation prompt, and up to a stop token.

        The stop token may end the block, with whitespace after it, or directly follow the block.
        """
        prompt_end = self.prompt_end(k) or 0
        stops = any_of(self.template.stops)
        content_end = max(start, self.content_end(k) or start)
        inside = re.compile(rf"({stops})\s*$").search(self.text, content_end, end)
        outside = re.compile(rf"\s*{stops}").match(self.text, end)
        if start < prompt_end <= end:
            start = prompt_end
        if inside:
            return start, inside.end(1)
        if outside:
            return start, outside.end()
        return start, end


def _not_found(k, what):
    return InputError(
        f"cannot find where the answer in message {k} {what}: mark the answers in the template "
        "with {% generation %} ... {% endgeneration %} (--chat_template FILE)."
    )


# ------------------------------------------------------------------------------------------- tools
def _check_tools(template, messages, tools=None, **variables):
    """InputError unless the template shows tools and each call: renamed, they must still appear."""
    if tools and TOOL not in template.render(messages, _renamed(tools), **variables):
        raise InputError(
            "the chat template ignores tools: remove the column tools, or give a template that "
            "shows them (--chat_template FILE)."
        )
    calls = sum(len(message.get("tool_calls") or ()) for message in messages)
    if not calls:
        return
    renamed = []
    for message in messages:
        if message.get("tool_calls"):
            message = {**message, "tool_calls": _renamed(message["tool_calls"])}
        renamed.append(message)
    if template.render(renamed, tools, **variables).count(TOOL) < calls:
        raise InputError(
            f"the chat template drops some of the {calls} tool calls: it supports none, or one per "
            "turn; give a template that shows them (--chat_template FILE)."
        )


def _function(tool):
    return tool.get("function", tool)


def _renamed(tools):
    """Tools or calls, with TOOL as their function's name."""
    renamed = []
    for tool in tools:
        if "function" in tool:
            renamed.append({**tool, "function": {**tool["function"], "name": TOOL}})
        else:
            renamed.append({**tool, "name": TOOL})
    return renamed
