r"""Where answers are in a rendered conversation: the characters to train.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
                                                         ~~~~~~~~~~~~~~~
A span starts where the generation prompt ends, since the model writes everything after it, and ends
with the token that closes the turn, since the model must learn to stop. Templates may mark answers
with {% generation %} blocks. Without them spans are found by experiment: render again with PROBE, a
character that occurs nowhere else, next to a message's content, and see where it lands. That works
for templates that trim content, drop earlier thinking or add text of their own. Whatever cannot be
found this way is refused, never guessed.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nanopost import InputError
from nanopost.template import CLOSE, OPEN, PROBE, Template, any_of

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

    def around_probe(self, k, content, upto=None, **variables):
        """Text before and after PROBE when `content`, which holds it, replaces message k's.

        Only messages[:upto] are rendered. (None, None) unless PROBE is rendered exactly once.
        """
        probed = {**self.messages[k], "content": content}
        messages = [*self.messages[:k], probed, *self.messages[k + 1 : upto]]
        text = self.render(messages, **variables)
        if text.count(PROBE) != 1:
            return None, None
        before, _, after = text.partition(PROBE)
        return before, after

    def content_start(self, k):
        before, _ = self.around_probe(k, PROBE + self.content(k))
        if before is None or not self.text.startswith(before):
            return None
        return len(before)

    def content_end(self, k):
        _, after = self.around_probe(k, self.content(k) + PROBE)
        if after is None or not self.text.endswith(after):
            return None
        return len(self.text) - len(after)

    def prompt_end(self, k):
        """How far text agrees with the prompt from which a rollout would write answer k."""
        if k == 0:
            return None
        previous_end = self.content_end(k - 1)
        if previous_end is None:
            return None
        probed = self.content(k - 1) + PROBE
        _, prompt = self.around_probe(k - 1, probed, upto=k, add_generation_prompt=True)
        if prompt is None:
            return None
        if self.text.startswith(prompt, previous_end):
            return previous_end + len(prompt)
        # The prompt has more than this turn (DeepSeek-R1's ends in <think>). The content may begin
        # like the rest of the prompt, so the header is what comes before a content of PROBE alone.
        before, _ = self.around_probe(k, PROBE)
        if before is None or not before.startswith(self.text[:previous_end]):
            return None
        header = before[previous_end:]
        if header.split() == prompt.split() and self.text.startswith(before):
            return len(before)  # they differ only in whitespace
        agreed = os.path.commonprefix([prompt, header, self.text[previous_end:]])
        return previous_end + len(agreed)

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
        is_last = k + 1 == len(self.messages)
        alone = self.text if is_last else self.render(self.messages[: k + 1])
        if name not in alone:
            return None
        tail = alone[alone.rfind(name) : self.close_of(alone)]
        after = max(start, self.content_end(k) or 0)
        before = None if is_last else self.content_end(k + 1)
        found = self.text.find(tail, after, before)
        return found + len(tail) if found >= 0 else None

    def close_of(self, text):
        """The end of turn_end, or else of the last special token, among those that end `text`."""
        closing = self.template.closing.search(text)
        end = 0
        for token in re.finditer(any_of(self.template.special), closing.group()):
            end = token.end()
            if token.group() == self.template.turn_end:
                break
        return closing.start() + end

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
        inside = re.compile(rf"({stops})\s*$").search(self.text[:end], content_end)
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
