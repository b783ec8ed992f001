r"""Tokenizer and chat template: from rows to token ids, and to the mask of what is trained.

A row is rendered once and encoded once with no special tokens added, so that BOS stands there at most once. Which
tokens are trained follows from character spans of the rendering, carried over by the tokenizer's offsets:

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
                                                         ~~~~~~~~~~~~~~~
A span begins where the generation prompt ends, because from there on the model must write by itself, and ends with the
token that closes the turn, because it must learn to stop. `{% generation %}` blocks say where that is. Without them it
is found by experiment: render again with a character that occurs nowhere (PROBE) beside a message's content, and see
where in the text it lands. That holds where templates trim, drop earlier thinking or write blocks nobody asked for.
What cannot be found this way is refused, never guessed.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import jinja2
import numpy as np
import tokenizers
from tokenizers import AddedToken, processors

from nanopost import InputError
from nanopost.batch import Example
from nanopost.hf import read_config
from nanopost.rows import check_pair_row, check_prompt_row, split_prompt
from nanopost.template import (
    CLOSE,
    OPEN,
    PROBE,
    TOOL,
    _any,
    _as_templates_know_it,
    _compile,
    _tool,
    _tools,
)

NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)


class Tokenizer:
    """A folder's tokenizer.json, tokenizer_config.json and chat template.

    bos_id, eos_id, pad_id: int, or None where none is declared. stop_ids: what ends a completion, namely eos_token,
    generation_config.json's eos_token_id and the token that the template writes behind an answer.
    """

    def __init__(
        self, raw: tokenizers.Tokenizer, config: dict, template: str | None, extra_stops=()
    ):
        """raw: the tokenizer. config: tokenizer_config.json. template: Jinja source, or None for a base model."""
        self.raw, self.template, self.named = raw, template, _named(config)
        raw.no_truncation(), raw.no_padding()
        self.bos_id, self.eos_id, self.pad_id = (
            raw.token_to_id(self.named.get(name, ""))
            for name in ("bos_token", "eos_token", "pad_token")
        )
        self.special = {
            token.content: i for i, token in raw.get_added_tokens_decoder().items() if token.special
        }
        with_special, plain = raw.encode("a").ids, raw.encode("a", add_special_tokens=False).ids
        self.prefix = (
            with_special[: with_special.index(plain[0])] if plain else []
        )  # what stands before any text
        raw.post_processor = processors.Sequence(
            []
        )  # adds no more than that, and may cut spaces off offsets (GPT-2's)
        self.stop_ids = frozenset(
            {self.eos_id, self.special.get(self.turn_end), *extra_stops} - {None}
        )

    @classmethod
    def load(cls, folder, chat_template=None) -> "Tokenizer":
        """Read a folder; chat_template: a file that replaces the model's template. InputError says what is wrong.

        Ids are those of transformers' AutoTokenizer: the post-processor of tokenizer.json alone says whether BOS is
        added (add_bos_token is not read), and added_tokens_decoder adds tokens and overrules how they are matched.
        """
        folder = Path(folder)
        raw, config = _raw(folder), _read_json(folder / "tokenizer_config.json")
        added = {
            int(i): AddedToken(**token)
            for i, token in config.get("added_tokens_decoder", {}).items()
        }
        if not added:
            config |= _read_json(folder / "special_tokens_map.json")
        for i, token in sorted(added.items()):
            (raw.add_special_tokens if token.special else raw.add_tokens)([token])
            if raw.token_to_id(token.content) != i:
                raise InputError(
                    f"{folder}: {token.content!r} has the id {i} in tokenizer_config.json and "
                    f"{raw.token_to_id(token.content)} in tokenizer.json: they do not belong together."
                )
        known = {token.content for token in raw.get_added_tokens_decoder().values()}
        for name, token in _named(config).items():
            if raw.token_to_id(token) is not None and token not in known:
                raw.add_special_tokens([AddedToken(token, normalized=False)])
            elif token not in known and name in ("bos_token", "eos_token"):
                raise InputError(
                    f"{folder}: tokenizer_config.json names {token!r} as {name}, and tokenizer.json has "
                    "no such token: mend one of them."
                )
        last, embedded = (
            max(raw.get_vocab().values()),
            _read_json(folder / "config.json").get("vocab_size"),
        )
        if embedded and last >= embedded:
            raise InputError(
                f"{folder}: the tokenizer's last id is {last}, for {raw.id_to_token(last)!r}, and "
                f"config.json has a vocab_size of {embedded}: they do not belong together."
            )
        stops = _read_json(folder / "generation_config.json").get("eos_token_id")
        return cls(raw, config, _template(folder, config, chat_template), _listed(stops))

    # ------------------------------------------------------------------------------------------------------------ text
    @property
    def vocab_size(self) -> int:
        """Tokens known, added ones included; a model may have more rows."""
        return self.raw.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens spelled in the text are recognised, none are added."""
        return self.raw.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special: bool = False) -> str:
        return self.raw.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def text_ids(self, text: str) -> list[int]:
        """Plain text with the BOS that this tokenizer puts before a text, unless the text brings it along."""
        ids = self.encode(text)
        return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def render(
        self,
        messages: list[dict],
        tools=None,
        add_generation_prompt=False,
        marks=("", ""),
        **variables,
    ) -> str:
        """The conversation as text, by the chat template; `marks` go around what its {% generation %} blocks write.

        InputError quotes what the template itself refuses.
        """
        if self.template is None:
            raise InputError(
                "messages need a chat template, and this model has none: give one (--chat_template FILE)."
            )
        try:
            return _compile(self.template, *marks).render(
                {
                    **self.named,
                    "messages": [_as_templates_know_it(m) for m in messages],
                    "tools": tools,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                    **variables,
                }
            )
        except InputError:
            raise
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template refuses this conversation: {error}.") from error
        except (
            TypeError,
            AttributeError,
            LookupError,
            ValueError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise InputError(
                f"the chat template fails here ({type(error).__name__}: {error})."
            ) from error

    def try_render(self, *args, **variables) -> str:
        """The same, or "" where the template refuses: some want a conversation to go on."""
        try:
            return self.render(*args, **variables)
        except InputError:
            return ""

    # ------------------------------------------------------------------------------------------------------------ rows
    def prompt_ids(self, prompt: str | list[dict], tools=None, **variables) -> list[int]:
        """What a rollout starts from: messages with the generation prompt, or plain text (with its BOS)."""
        if isinstance(prompt, str):
            return self.text_ids(prompt)
        text = self.render(prompt, tools, add_generation_prompt=True, **variables)
        if self.unprompted:
            raise InputError(
                "the chat template has no generation prompt, so a rollout would have to write "
                f"{self.unprompted!r} itself: give one that has (--chat_template FILE)."
            )
        return self.encode(text)

    def check_same(self, folder, flag: str):
        """InputError if the checkpoint in `folder`, that `flag` named, has another tokenizer than this."""
        if Tokenizer.load(folder).tokenizer_hash != self.tokenizer_hash:
            raise InputError(
                f"{flag}{folder}: its tokenizer is not the policy's, so it reads other text: take one "
                "that was trained from the policy's model."
            )

    def with_prompts(
        self,
        parts,
        max_prompt: int | None,
        max_new: int,
        tokens: int,
        positions: int,
        sides: int = 1,
    ):
        """Rows {"prompt", ...}, in several lists, each with the column prompt_ids and all with the same columns -> (the
        lists, a report). Longer prompts than max_prompt are left out and counted; InputError names a row that does not
        fit with max_new tokens behind it into tokens / sides (2: pairs), or that the template refuses."""
        names = dict.fromkeys(name for rows in parts for row in rows for name in row)
        room = min(tokens // sides, positions)
        kept, left_out, plain = [[] for _ in parts], 0, 0
        for rows, keep in zip(parts, kept):
            for row in rows:
                check_prompt_row(row)
                try:
                    variables = {
                        "tools": _tools(row.get("tools")),
                        **(row.get("chat_template_kwargs") or {}),
                    }
                    ids = self.prompt_ids(row["prompt"], **variables)
                except InputError as error:
                    raise InputError(f"{row.get('__line__', 'row')}: {error}") from error
                if max_prompt is not None and len(ids) > max_prompt:
                    left_out += 1
                    continue
                if len(ids) + max_new > room:
                    half = " / 2, a side of a pair" if sides == 2 else ""
                    limit = (
                        f"the model's {positions} positions"
                        if room == positions
                        else f"--tokens {tokens}{half}"
                    )
                    raise InputError(
                        f"{row.get('__line__', 'row')}: a prompt of {len(ids)} tokens and {max_new} new "
                        f"ones are more than {limit}: leave long prompts out (--max_prompt, in training), "
                        f"lower --max_new_tokens{' or raise --tokens' if room < positions else ''}."
                    )
                plain += isinstance(row["prompt"], str)
                keep.append({**dict.fromkeys(names), **row, "prompt_ids": ids})
        if emptied := next((rows for rows, keep in zip(parts, kept) if rows and not keep), None):
            counts = " and ".join(str(len(rows)) for rows in parts)
            raise InputError(
                f"none of {len(emptied):,} prompts is left within --max_prompt {max_prompt} (there are "
                f"{counts} to train on and held out)."
            )
        doubt = f"; doubtful: {plain:,} prompts are plain text, and the model has a chat template"
        return (
            kept,
            f"{left_out:,} left out by --max_prompt{doubt if plain and self.template else ''}",
        )

    def example(self, row: dict, train_on: str = "assistant") -> Example:
        """A row {"messages"}, {"prompt", "completion"} or {"text"}, maybe with "tools" and "chat_template_kwargs".

        train_on: assistant (every assistant turn), last (the last one), completion (those behind the last user turn),
        all. Only `all` trains what a row has as its prompt. Plain text is trained whole, a plain completion alone, both
        with an EOS behind them. InputError names the row.
        """
        try:
            if "messages" in row or isinstance(row.get("prompt"), list):
                return self._chat_example(row, train_on)
            prompt, text = (
                (row["prompt"], row["completion"]) if "prompt" in row else ("", row["text"])
            )
            return self._text_example(prompt, text, train_on)
        except InputError as error:
            raise InputError(f"{row.get('__line__', 'row')}: {error}") from error

    def pair(self, row: dict) -> tuple[Example, Example]:
        """A row {"prompt", "chosen", "rejected"}, or with whole conversations in these two -> chosen and rejected.

        Both end with their last trained token, as rollouts do. InputError if their prompts differ in a token.
        """
        check_pair_row(row)
        row = split_prompt(row)
        rest = {
            name: row[name] for name in ("tools", "chat_template_kwargs", "__line__") if name in row
        }
        pair = [
            self.example({**rest, "prompt": row["prompt"], "completion": row[side]}, "completion")
            for side in ("chosen", "rejected")
        ]
        prompts = [e.ids[: e.mask.argmax()].tolist() for e in pair]
        if prompts[0] != prompts[1]:
            at = len(os.path.commonprefix(prompts))
            raise InputError(
                f"{row.get('__line__', 'row')}: the prompts of chosen and rejected differ from token {at} "
                f"on ({' and '.join(repr(self.decode(ids[at : at + 5])) for ids in prompts)}): the template "
                "or the tokenizer lets the answer change what stands before it."
            )
        return tuple(e.ended() for e in pair)

    def _text_example(self, prompt, completion, train_on):
        # One encoding of the whole, as in TRL; but where a token reaches across the boundary each part by itself, so
        # that the prompt's tokens are those of a rollout. (Always apart, SentencePiece would put a space between them.)
        prompt_ids, ids = self.text_ids(prompt), self.text_ids(prompt + completion)
        if ids[: len(prompt_ids)] != prompt_ids:
            ids = prompt_ids + self.encode(completion)
        if self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids.append(self.eos_id)
        return Example(ids, np.arange(len(ids)) >= (0 if train_on == "all" else len(prompt_ids)))

    def _chat_example(self, row, train_on):
        messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
        variables = {"tools": _tools(row.get("tools")), **(row.get("chat_template_kwargs") or {})}
        text = self.render(messages, **variables)
        encoding = self.raw.encode(text, add_special_tokens=False)
        if train_on == "all":
            return Example(encoding.ids, np.ones(len(encoding.ids)))
        first = 0
        if "messages" not in row:
            first = len(row["prompt"])
        elif train_on == "completion":
            first = max((k for k, m in enumerate(messages) if m["role"] == "user"), default=0)
        turns = [k for k, m in enumerate(messages) if m["role"] == "assistant" and k >= first]
        spans = self.spans(messages, text, turns[-1:] if train_on == "last" else turns, **variables)
        return Example(encoding.ids, self._tokens_in(encoding, spans))

    def _tokens_in(self, encoding, spans):
        """Tokens that share a character with a span, save a special one before it that swallows spaces -> bool [T]."""
        start_T, end_T = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        mask_T = np.zeros(len(start_T), bool)
        for start, end in spans:
            inside_T = (start_T < end) & (end_T > start)
            first = inside_T.argmax()
            inside_T[first] &= (
                start_T[first] >= start
                or self.raw.id_to_token(encoding.ids[first]) not in self.special
            )
            mask_T |= inside_T
        return mask_T

    def spans(
        self, messages: list[dict], text: str, turns: list[int], **variables
    ) -> list[tuple[int, int]]:
        """Where `text`, the rendering of messages, has those with the indices `turns` -> (start, end) in characters.

        InputError if that cannot be found, or if the template leaves something out: a tool, a call, a turn.
        """
        if any(c in text for c in (PROBE, OPEN, CLOSE)):
            raise InputError(
                "the text holds one of U+F5A5A to U+F5A5C, by which answers are found: remove it."
            )
        self._check_tools(messages, **variables)
        found = _Turns(self, messages, text, partial(self.try_render, **variables))
        if not re.search(r"\{%[-+]?\s*generation\b", self.template):
            return [found.span(k) for k in turns]
        return found.marked_spans(self.render(messages, marks=(OPEN, CLOSE), **variables), turns)

    def _check_tools(self, messages, tools=None, **variables):
        """InputError if the template shows no tools, or not every call: renamed, they must show up by the new name."""
        if tools and TOOL not in self.render(messages, _renamed(tools), **variables):
            raise InputError(
                "the chat template leaves the tools out: take the column tools away, or give another one."
            )
        calls = sum(len(m.get("tool_calls") or ()) for m in messages)
        renamed = [
            {**m, "tool_calls": _renamed(m["tool_calls"])} if m.get("tool_calls") else m
            for m in messages
        ]
        if calls and self.render(renamed, tools, **variables).count(TOOL) < calls:
            raise InputError(
                f"the chat template leaves out some of the {calls} tool calls: it knows none, or only one "
                "in a turn."
            )

    # ------------------------------------------------------------------------------- what the template writes, by trial
    @cached_property
    def _trial(self) -> tuple[str, str, str, str]:
        """What the template writes between a question and its answer, behind the answer, and behind a question that is
        the last message, with and without generation prompt. Empty if it refuses so plain a conversation."""
        question, answer = (
            {"role": "user", "content": OPEN},
            {"role": "assistant", "content": PROBE},
        )
        both = self.try_render([question, answer])
        between, _, behind = both.rpartition(OPEN)[2].partition(PROBE)
        prompt, asked = (
            self.try_render([question], add_generation_prompt=add) for add in (True, False)
        )
        return (
            (between, behind, prompt.rpartition(OPEN)[2], asked.rpartition(OPEN)[2])
            if both
            else ("",) * 4
        )

    @cached_property
    def unprompted(self) -> str:
        """The header of an answer, if it stands in no prompt because the template knows no generation prompt."""
        between, _, prompt, asked = self._trial
        return between.removeprefix(asked).strip() if prompt == asked else ""

    @cached_property
    def turn_end(self) -> str | None:
        """The special token that the template writes behind an answer."""
        return self._first_closing(self._trial[1])

    @cached_property
    def answer_end(self) -> re.Pattern:
        """What closes an answer: all that the template writes up to turn_end, another stop token, or what closes a
        question (gpt-oss closes the last answer otherwise than earlier ones)."""
        behind = self._trial[1]
        whole = (
            [re.escape(behind[: behind.index(self.turn_end) + len(self.turn_end)])]
            if self.turn_end
            else []
        )
        return re.compile(
            "|".join(
                [*whole, rf"\s*{self.stops}", rf"\s*{_any([self._first_closing(self._trial[3])])}"]
            )
        )

    @cached_property
    def stops(self) -> str:
        """A pattern of the stop tokens."""
        return _any(self.raw.id_to_token(i) for i in self.stop_ids)

    @cached_property
    def closing(self) -> re.Pattern:
        """The special tokens and white space in which a text ends."""
        return re.compile(rf"(?:\s|{_any(self.special)})*$")

    def _first_closing(self, text):
        """The last of the special tokens that come first in `closing`, with nothing between them."""
        found = re.search(rf"(?:{_any(self.special)})+", self.closing.search(text).group())
        return found and re.findall(_any(self.special), found.group())[-1]

    def doubts(self) -> list[str]:
        """What is doubtful about tokenizer and template by themselves, in sentences."""
        between, _, prompt, _ = self._trial
        roles = ("system", "user", "assistant")
        answered = self.try_render([{"role": role, "content": role + PROBE} for role in roles])
        said = {
            "no end-of-sequence token is declared, so nothing can learn to stop.": not self.stop_ids,
            "the template writes no end-of-turn token behind an answer.": between
            and not self.turn_end,
            f"the template has no generation prompt: a rollout has to write {self.unprompted!r}.": self.unprompted,
            f"the template's prompt goes on with {prompt!r} and an answer follows {between!r}: rollouts start from "
            "text that training does not show.": not between.startswith(prompt),
            "the template leaves a system message out once the question has an answer.": answered
            and roles[0] + PROBE not in answered,
            "the template writes today's date, so tokens change from day to day (chat_template_kwargs may set it).": "strftime_now"
            in (self.template or ""),
        }
        return [sentence for sentence, true in said.items() if true]

    # -------------------------------------------------------------------------------------------------------- identity
    @property
    def template_hash(self) -> str | None:
        return self.template and hashlib.sha256(self.template.encode()).hexdigest()[:16]

    @cached_property
    def tokenizer_hash(self) -> str:
        return hashlib.sha256(f"{self.raw.to_str()}{self.prefix}".encode()).hexdigest()[:16]


@dataclass
class _Turns:
    """Finds where messages stand in `text`, their rendering. A place is the index of a character, or None."""

    tokenizer: Tokenizer
    messages: list[dict]
    text: str
    render: Callable[..., str]  # of other messages in the same way, or ""

    def span(self, k: int) -> tuple[int, int]:
        """From the end of the generation prompt before answer k to behind what closes it."""
        start = self.content_start(k) if self.tokenizer.unprompted else self.prompt_end(k)
        if start is None:
            start = self.prompt_end(k) if self.tokenizer.unprompted else self.content_start(k)
        find_end = self.end_of_calls if self.messages[k].get("tool_calls") else self.end
        end = None if start is None else find_end(k, start)
        if end is None:
            raise InputError(
                f"where the answer of message {k} {'begins' if start is None else 'ends'} in the text "
                "cannot be found: mark the answers in the template with {% generation %} ... "
                "{% endgeneration %} (--chat_template FILE)."
            )
        return start, end

    def content(self, k):
        content = self.messages[k].get("content")
        return content if isinstance(content, str) else ""

    def around(self, k, content, upto=None, **variables):
        """What the rendering of messages[:upto] has before and behind the PROBE in `content`, put in as message k's."""
        text = self.render(
            [
                *self.messages[:k],
                {**self.messages[k], "content": content},
                *self.messages[k + 1 : upto],
            ],
            **variables,
        )
        before, _, behind = text.partition(PROBE)
        return (before, behind) if text.count(PROBE) == 1 else (None, None)

    def content_start(self, k):
        before, _ = self.around(k, PROBE + self.content(k))
        return len(before) if before is not None and self.text.startswith(before) else None

    def content_end(self, k):
        _, behind = self.around(k, self.content(k) + PROBE)
        return (
            len(self.text) - len(behind)
            if behind is not None and self.text.endswith(behind)
            else None
        )

    def prompt_end(self, k):
        """How far text agrees with the prompt that a rollout of message k starts from."""
        past = self.content_end(k - 1) if k else None
        if past is None:
            return None
        _, prompt = self.around(
            k - 1, self.content(k - 1) + PROBE, upto=k, add_generation_prompt=True
        )
        if prompt is None or self.text.startswith(prompt, past):
            return None if prompt is None else past + len(prompt)
        # The prompt says more than this turn (DeepSeek-R1's ends in <think>). The content may look alike: put it aside.
        before, _ = self.around(k, PROBE)
        if before is None or not before.startswith(self.text[:past]):
            return None
        if before[past:].split() == prompt.split() and self.text.startswith(
            before
        ):  # they differ in white space alone
            return len(before)
        return past + len(os.path.commonprefix([prompt, before[past:], self.text[past:]]))

    def end(self, k, start):
        """Behind what closes the turn; if nothing does, behind the content."""
        content_end = self.content_end(k)
        if content_end is None:
            return None
        closed = self.tokenizer.answer_end.match(self.text, max(start, content_end))
        return closed.end() if closed else max(start, content_end)

    def end_of_calls(self, k, start):
        """Behind what closes a turn with tool calls: from the last call's name on, it reads as in a conversation that
        ends there, in which the closing token is among the special ones at the end."""
        name, is_last = (
            _tool(self.messages[k]["tool_calls"][-1])["name"],
            k + 1 == len(self.messages),
        )
        alone = self.text if is_last else self.render(self.messages[: k + 1])
        closing = self.tokenizer.closing.search(alone)
        ends = [*re.finditer(_any(self.tokenizer.special), closing.group())]
        chosen = next(
            (m for m in ends if m.group() == self.tokenizer.turn_end), ends[-1] if ends else None
        )
        tail = (
            alone[alone.rfind(name) : closing.start() + (chosen.end() if chosen else 0)]
            if name in alone
            else PROBE
        )
        at = self.text.find(
            tail, max(start, self.content_end(k) or 0), None if is_last else self.content_end(k + 1)
        )
        return at + len(tail) if at >= 0 else None

    def marked_spans(self, marked, turns):
        """The {% generation %} blocks that belong to turns, which stand between OPEN and CLOSE in `marked`."""
        if marked.replace(OPEN, "").replace(CLOSE, "") != self.text:
            raise InputError(
                "the template's {% generation %} blocks change what it writes: mark whole pieces of text."
            )
        past = {
            k: self.content_end(k - 1) if k else 0
            for k, m in enumerate(self.messages)
            if m["role"] == "assistant"
        }
        if None in past.values():
            raise InputError(
                "which {% generation %} block of the template belongs to which message cannot be told."
            )
        spans, at, start = [], 0, 0
        for piece in re.split(f"([{OPEN}{CLOSE}])", marked):
            if piece == OPEN:
                start = at
            elif piece == CLOSE:
                k = max((k for k in past if past[k] <= start), default=None)
                spans += [self.trimmed(k, start, at)] if k in turns else []
            else:
                at += len(piece)
        return spans

    def trimmed(self, k, start, end):
        """A block of turn k from behind the generation prompt, if it holds that too, up to a stop token, be it at its
        end (white space behind it is not trained) or right behind it."""
        prompt_end, stops = self.prompt_end(k) or 0, self.tokenizer.stops
        inside = re.compile(rf"({stops})\s*$").search(
            self.text[:end], max(start, self.content_end(k) or start)
        )
        behind = re.compile(rf"\s*{stops}").match(self.text, end)
        return (
            prompt_end if start < prompt_end <= end else start,
            inside.end(1) if inside else behind.end() if behind else end,
        )


# ------------------------------------------------------------------------------------------------ checks and identity
def report(
    examples: list[Example], tokenizer: Tokenizer, rows: list[dict] | None = None, shown: int = 800
) -> str:
    """Checks before training -> a short report. InputError for what is surely wrong; what is doubtful is said in it.

    rows: where the examples come from, so that they are named by file and line.
    """

    def places(indices):
        named = [rows[i].get("__line__", f"row {i}") if rows else f"row {i}" for i in indices[:5]]
        return f"{len(indices):,} of {len(examples):,} rows ({', '.join(named)}{', ...' if len(indices) > 5 else ''})"

    def having(test):
        return [i for i, e in enumerate(examples) if test(e)]

    bos, prefix, stops = tokenizer.bos_id, tokenizer.prefix, tokenizer.stop_ids
    if bos is not None and (doubled := having(lambda e: e.ids[:2].tolist() == [bos, bos])):
        raise InputError(
            f"{places(doubled)} begin with BOS twice: the text brings one along; take it out there."
        )
    if len(empty := having(lambda e: not e.num_targets)) == len(examples):
        raise InputError(
            f"not one of {len(examples):,} rows has a token to train: --train_on and the template leave "
            "nothing of them."
        )
    unended = having(lambda e: stops.isdisjoint(e.ids[e.mask].tolist()))
    counts = [int((e.ids == bos).sum()) for e in examples] if bos is not None else [0]
    twice = (
        having(lambda e: (e.ids[1:] == bos).any())
        if min(counts) < 2 and bos not in {None, *stops}
        else []
    )
    bare = having(lambda e: e.ids[: len(prefix)].tolist() != prefix)
    doubts = {
        "train nothing": empty,
        "train no stop token, so their answers never end": unended,
        "begin without the BOS that this tokenizer gives a text": bare,
        "have a BOS further on": twice,
    }
    tokens, trained = sum(map(len, examples)), sum(int(e.mask.sum()) for e in examples)
    longest = max(range(len(examples)), key=lambda i: len(examples[i]))
    example = marked_text(min((e for e in examples if e.num_targets), key=len), tokenizer)
    return "\n".join(
        [
            f"{len(examples):,} rows, {tokens:,} tokens, {trained / tokens:.1%} of them trained; a stop token trained in "
            f"{1 - len(unended) / len(examples):.1%} of rows; "
            f"{'no BOS declared' if bos is None else f'{min(counts)} to {max(counts)} BOS in a row'}; longest row: "
            f"{len(examples[longest]):,} tokens ({places([longest]).partition('(')[2]}",
            *(f"doubtful: {sentence}" for sentence in tokenizer.doubts()),
            *(f"doubtful: {places(found)} {what}." for what, found in doubts.items() if found),
            "what is trained stands between » and «:",
            example
            if len(example) <= shown
            else f"{example[: shown // 2]} ... {example[-shown // 2 :]}",
        ]
    )


def marked_text(example: Example, tokenizer: Tokenizer) -> str:
    """An example decoded, with » and « around what is trained."""
    cuts = np.flatnonzero(np.diff(example.mask)) + 1
    pieces = zip(np.split(example.ids, cuts), np.split(example.mask, cuts))
    return "".join(
        f"»{tokenizer.decode(ids)}«" if mask[0] else tokenizer.decode(ids) for ids, mask in pieces
    )


def tokenizer_files(folder, tokenizer: Tokenizer) -> dict[str, str | bytes | None]:
    """What goes beside a checkpoint: the folder's tokenizer files and generation_config.json as they are, the template
    in force, and a fingerprint for check_stage. None: the model has no such file, and another one's may not stay.

    A token that ends answers here and not in the folder (another template's) joins generation_config.json's
    eos_token_id: else transformers and vLLM, which know nothing of the template's end, would write on behind it.
    """
    files = {
        name: path.read_bytes() if (path := Path(folder) / name).is_file() else None
        for name in FILES
    }
    files["chat_template.jinja"] = tokenizer.template
    generation, config = (
        _read_json(Path(folder) / name) for name in ("generation_config.json", "config.json")
    )
    known = _listed(generation.get("eos_token_id"))
    known = known or [i for i in _listed(config.get("eos_token_id")) if i in tokenizer.stop_ids]
    if new := sorted(tokenizer.stop_ids - {*known}):
        files["generation_config.json"] = (
            json.dumps({**generation, "eos_token_id": known + new}, indent=2) + "\n"
        )
    return {**files, "nanopost.json": json.dumps(fingerprint(tokenizer), indent=1) + "\n"}


def fingerprint(tokenizer: Tokenizer) -> dict:
    return {
        "template_hash": tokenizer.template_hash,
        "tokenizer_hash": tokenizer.tokenizer_hash,
        "versions": {"tokenizers": tokenizers.__version__, "jinja2": jinja2.__version__},
    }


def check_stage(folder, tokenizer: Tokenizer) -> str:
    """A loud sentence if the checkpoint in `folder` was trained with another template or tokenizer, else ""."""
    trained, now = _read_json(Path(folder) / "nanopost.json"), fingerprint(tokenizer)
    changed = [
        name
        for name in ("template", "tokenizer")
        if trained and trained[f"{name}_hash"] != now[f"{name}_hash"]
    ]
    return (
        changed
        and (
            f"WARNING: {folder} was trained with another {' and '.join(changed)} than this run uses, so "
            "prompts will look different from those it knows: was --chat_template meant?"
        )
        or ""
    )


# ------------------------------------------------------------------------------------------------------------- reading
def _raw(folder):
    path = folder / "tokenizer.json"
    if not folder.is_dir():
        read_config(folder)  # says what it could be
    if (folder / "state.json").is_file() and not path.is_file():
        raise InputError(
            f"{folder} is a checkpoint of a run, for --resume, which writes the model when it ends: with "
            "--steps at the checkpoint's own step, at once."
        )
    if not path.is_file():
        raise InputError(
            f"{folder} has no tokenizer.json: load its tokenizer in transformers and save_pretrained it "
            "there."
        )
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(
            f"{path}: tokenizers {tokenizers.__version__} cannot read it ({error})."
        ) from error


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}).") from error


def _listed(ids):
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _template(folder, config, chat_template):
    """The template in force: the file given, else chat_template.jinja, else tokenizer_config.json's."""
    path = folder / "chat_template.jinja" if chat_template is None else Path(chat_template)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    if chat_template is not None:
        raise InputError(f"--chat_template {chat_template}: no such file.")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t["name"]: t["template"] for t in template}
        return named.get("default", next(iter(named.values()), None))
    return template


def _named(config):
    """The special tokens that have a role, by which templates know them: {"eos_token": "</s>", ...}."""
    tokens = {name: config[name] for name in NAMED_TOKENS if config.get(name)}
    return {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in tokens.items()
    }


def _renamed(tools):
    return [
        {**tool, "function": {**tool["function"], "name": TOOL}}
        if "function" in tool
        else {**tool, "name": TOOL}
        for tool in tools
    ]
