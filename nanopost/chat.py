r"""Tokeniser and chat template: from rows to token ids and to the mask of what is trained.

A row is rendered once and encoded once with no special tokens added, so that BOS stands there at most once. Which
tokens are trained follows from character spans of the rendering, carried over by the tokeniser's offsets:

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
                                                         ~~~~~~~~~~~~~~~

A span begins where the generation prompt ends, because from there on the model must write by itself, and ends with the
token that ends the turn, because it must learn to stop. `{% generation %}` blocks say where that is. Without them it is
found by experiment: render again with a character that occurs nowhere put behind (or before) a message, and see where
in the text it lands. That stands firm where templates trim, drop earlier thinking or write blocks nobody asked for.
"""
import hashlib
import json
import re
import sys
from datetime import datetime
from functools import cached_property
from pathlib import Path

import jinja2
import numpy as np
import tokenizers
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, processors

from nanopost import InputError
from nanopost.data import Example

PROBE, OPEN, CLOSE = "\U000f5a5a", "\U000f5a5b", "\U000f5a5c"  # private use: in no text and in no vocabulary
MARKED = "mark the template's answers with {% generation %} ... {% endgeneration %} (--chat_template FILE)"
# What ends an assistant's turn in the families at hand, beside eos_token and what follows an answer in the template.
TURN_ENDS = ("<|eom_id|>", "<|call|>", "<|return|>", "<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")


class Tokenizer:
    """A folder's tokenizer.json, tokenizer_config.json and chat template."""

    def __init__(self, raw: tokenizers.Tokenizer, config: dict, template: str | None, extra_stops=()):
        """raw: the tokeniser. config: tokenizer_config.json. template: Jinja source, or None for a base model."""
        self.raw, self.config, self.template = raw, config, template
        raw.no_truncation(), raw.no_padding()
        self.special = {k: _content(config[k]) for k in ("bos_token", "eos_token", "pad_token", "unk_token")
                        if config.get(k)}
        self.bos_id, self.eos_id, self.pad_id = (self._id(self.special.get(k)) for k in
                                                 ("bos_token", "eos_token", "pad_token"))
        with_special, plain = raw.encode("a").ids, raw.encode("a", add_special_tokens=False).ids
        self.prefix = with_special[:with_special.index(plain[0])] if plain else []  # what stands before any text
        if not self.prefix and config.get("add_bos_token") and self.bos_id is not None:
            self.prefix = [self.bos_id]
        # A post-processor may trim the offsets (GPT-2's does), and adds only what `prefix` already says.
        raw.post_processor = processors.Sequence([])
        stops = {self.eos_id, *extra_stops, self._id(self._turn_end) if self.template else None}
        self.stop_ids = frozenset(stops - {None})
        if not self.stop_ids:
            print("warning: this tokeniser declares no end-of-sequence token, so nothing can learn to stop.", file=sys.stderr)

    @classmethod
    def load(cls, folder, chat_template=None) -> "Tokenizer":
        """Read a folder; chat_template: a file that replaces the model's template. InputError says what is missing."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{folder} has no tokenizer.json: load the tokeniser in transformers and save_pretrained "
                             "it into this folder." if folder.is_dir() else f"there is no folder {folder}: make it "
                             "(python train_sft.py writes out/sft) or mend --model.")
        try:
            raw = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{path}: not a tokeniser that this version of tokenizers reads ({error}).") from error
        config = _read_json(folder / "tokenizer_config.json")
        for name, token in _read_json(folder / "special_tokens_map.json").items():
            config.setdefault(name, token)
        for i, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda kv: int(kv[0])):
            if raw.token_to_id(token["content"]) is None:
                raw.add_tokens([AddedToken(**{k: v for k, v in token.items() if k != "__type"})])
                if raw.token_to_id(token["content"]) != int(i):
                    raise InputError(f"{folder}: tokenizer_config.json gives {token['content']!r} the id {i}, and in "
                                     f"tokenizer.json the next free one is {raw.token_to_id(token['content'])}: these "
                                     "two files do not belong together.")
        stops = _read_json(folder / "generation_config.json").get("eos_token_id")
        stops = stops if isinstance(stops, list) else [stops]
        return cls(raw, config, _template(folder, config, chat_template), stops)

    # ------------------------------------------------------------------------------------------------------------ text
    def _id(self, token):
        return None if token is None else self.raw.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        return self.raw.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens spelled in the text are recognised, none are added."""
        return self.raw.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special: bool = False) -> str:
        return self.raw.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def text_ids(self, text: str) -> list[int]:
        """Plain text with the BOS that this tokeniser puts before a text, unless the text brings it along."""
        ids = self.encode(text)
        return ids if ids[:len(self.prefix)] == self.prefix else self.prefix + ids

    def render(self, messages: list[dict], tools=None, add_generation_prompt=False, **variables) -> str:
        """The conversation as text, by the chat template. InputError quotes what the template itself refuses."""
        return self._render(self._jinja, messages, tools, add_generation_prompt, variables)

    def _render(self, jinja, messages, tools, add_generation_prompt, variables):
        try:
            return jinja.render(messages=[_reasoning(m) for m in messages], tools=tools, documents=None,
                                add_generation_prompt=add_generation_prompt, **{**self.special, **variables})
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template refuses this conversation: {error}.") from error
        except (TypeError, AttributeError, KeyError, ValueError, IndexError) as error:
            raise InputError(f"the chat template fails on this conversation ({type(error).__name__}: {error}).") from error

    @cached_property
    def _jinja(self):
        if self.template is None:
            raise InputError("this model has no chat template, and rows with messages need one: give one with "
                             "--chat_template FILE.")
        return _compile(self.template, marks=False)

    @cached_property
    def _marking_jinja(self):
        return _compile(self.template, marks=True)

    @cached_property
    def has_generation_tags(self) -> bool:
        return self.template is not None and re.search(r"\{%-?\s*generation\b", self.template) is not None

    # ----------------------------------------------------------------------------------------------------------- rows
    def prompt_ids(self, prompt, tools=None, **variables) -> list[int]:
        """What a rollout starts from: messages with the generation prompt, or plain text (with its BOS)."""
        if isinstance(prompt, str):
            return self.text_ids(prompt)
        return self.encode(self.render(prompt, tools, add_generation_prompt=True, **variables))

    def example(self, row: dict, train_on: str = "assistant") -> Example:
        """A row {"messages"}, {"prompt", "completion"} or {"text"} (with "tools", "chat_template_kwargs") -> Example.

        train_on: assistant (every assistant turn), last (the last one), completion (the row's completion; in a row of
        messages what follows the last user turn), all. Plain text is trained whole, a plain completion alone, and both
        with an EOS behind them.
        """
        try:
            if isinstance(row.get("prompt"), str):
                return self._completion_example(row["prompt"], row["completion"], train_on)
            if "messages" in row or "prompt" in row:
                return self._chat_example(row, train_on)
            return self._completion_example("", row["text"], train_on)
        except InputError as error:
            raise InputError(f"{row.get('__line__', 'row')}: {error}") from error

    def _completion_example(self, prompt, completion, train_on):
        # Encoded apart, so that training sees the prompt's tokens just as a rollout will.
        prompt_ids = self.text_ids(prompt)
        ids = prompt_ids + self.encode(completion)
        if self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids.append(self.eos_id)
        return _example(ids, np.arange(len(ids)) >= (0 if train_on == "all" else len(prompt_ids)))

    def _chat_example(self, row, train_on):
        messages = row.get("messages") or row["prompt"] + row["completion"]
        variables = row.get("chat_template_kwargs") or {}
        text = self.render(messages, row.get("tools"), **variables)
        encoding = self.raw.encode(text, add_special_tokens=False)
        if train_on == "all":
            return _example(encoding.ids, np.ones(len(encoding.ids), bool))
        spans = self.assistant_spans(messages, text, row.get("tools"), **variables)
        turns = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
        if train_on == "last":
            spans = spans[-1:]
        elif train_on == "completion" or "completion" in row:
            first = len(row["prompt"]) if "completion" in row else 1 + max(
                (k for k, m in enumerate(messages) if m["role"] == "user"), default=-1)
            if len(spans) != len(turns):
                raise InputError(f"the template's {{% generation %}} blocks gave {len(spans)} spans for {len(turns)} "
                                 "assistant turns, so which of them the completion is cannot be told: use --train_on "
                                 "assistant or last.")
            spans = [s for s, k in zip(spans, turns) if k >= first]
        return _example(encoding.ids, _tokens_in(encoding.offsets, spans))

    # ---------------------------------------------------------------------------------------------------------- spans
    def assistant_spans(self, messages, text, tools=None, **variables) -> list[tuple[int, int]]:
        """Character spans of `text`, the rendering of `messages`, that the assistant wrote, one a turn, in order."""
        def around(k, shown, prepend=False, **more):
            """Text before and after a probe put behind (before) message k's content; (None, None) if it is not shown."""
            content = messages[k].get("content") or ""
            probed = {**messages[k], "content": PROBE + content if prepend else content + PROBE}
            rendered = self.render([*shown[:k], probed, *shown[k + 1:]], tools, **more, **variables)
            before, found, after = rendered.rpartition(PROBE)
            return (before, after) if found else (None, None)

        def content_end(k):
            _, after = around(k, messages)
            return len(text) - len(after) if after is not None and text.endswith(after) else None

        for name in (_call_name(c) for m in messages for c in m.get("tool_calls") or ()):
            if name not in text:
                raise InputError(f"the chat template leaves the tool call {name!r} out: this model's template knows no "
                                 "tool calls.")
        if self.has_generation_tags:
            return [self._narrowed(text, *span) for span in self._marked_spans(messages, text, tools, variables)]
        spans = []
        for k in (k for k, m in enumerate(messages) if m["role"] == "assistant"):
            start, limit = None, content_end(k)
            past = content_end(k - 1) if k else None
            if past is not None:
                try:
                    _, prompt = around(k - 1, messages[:k], add_generation_prompt=True)
                except InputError:
                    prompt = None  # some templates refuse a conversation that stops here
                start = self._behind(prompt, text, past)
            if start is None:
                before, _ = around(k, messages, prepend=True)
                start = len(before) if before is not None and text.startswith(before) else None
            if start is None:
                raise InputError(f"where the answer of message {k} begins in the rendering cannot be found: {MARKED}.")
            spans.append((start, self._answer_end(text, start, limit, k, messages[k])))
        return spans

    def _behind(self, prompt, text, past):
        """Where text goes on behind `prompt`, which a rollout would see from `past` on: behind all of it, or, where the
        prompt says more than the turn does (DeepSeek R1 opens <think>, ChatML may add a newline), behind the last
        special token or white space up to which they agree."""
        if prompt is None:
            return None
        if text.startswith(prompt, past):
            return past + len(prompt)
        agreed = next((i for i, (a, b) in enumerate(zip(prompt, text[past:])) if a != b), 0)
        ends = [m.end() for m in re.finditer("|".join([r"\s", *map(re.escape, self._special_tokens)]), prompt[:agreed])]
        return past + ends[-1] if ends else None

    def _answer_end(self, text, start, limit, k, message):
        if message.get("tool_calls"):
            found = re.compile(self._ends(more=False)).search(text, max(start, limit or 0))
            end = found.end() if found else len(text.rstrip())
            lost = [n for n in map(_call_name, message["tool_calls"]) if n not in text[start:end]]
            if lost:
                raise InputError(f"the tool call {lost[0]!r} of message {k} is not inside its turn: {MARKED}.")
            return end
        if limit is None or limit < start:
            raise InputError(f"where the answer of message {k} ends in the rendering cannot be found: {MARKED}.")
        return self._turn_end_at(text, limit) or limit

    def _narrowed(self, text, start, end):
        """A {% generation %} block from behind the generation prompt, if it holds that too, to the turn's end token,
        which may stand behind the block; white space behind it is not trained."""
        header = self._generation_prompt
        start += len(header) if text.startswith(header, start, end) else 0
        inside = re.compile(rf"(?:{self._ends()})(?=\s*$)").search(text[:end], start)
        return start, inside.end() if inside else self._turn_end_at(text, end) or end

    @cached_property
    def _generation_prompt(self):
        user = [{"role": "user", "content": PROBE}]
        try:
            return self.render(user, add_generation_prompt=True).removeprefix(self.render(user))
        except InputError:
            return ""

    @cached_property
    def _special_tokens(self):
        return [t.content for t in self.raw.get_added_tokens_decoder().values() if t.special]

    @cached_property
    def _turn_end(self) -> str | None:
        """The token that the template writes behind an answer, or None."""
        try:
            probed = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}])
        except InputError:
            return None
        after = probed.rpartition(PROBE)[2].lstrip()
        found = [t for t in {*self._special_tokens, self.special.get("eos_token", "")} if t and after.startswith(t)]
        return max(found, key=len, default=None)

    def _ends(self, more=True):
        """A pattern of the tokens that end a turn. Without `more`, only those that end one with tool calls."""
        known = [t for t in TURN_ENDS if t in self._special_tokens and (more or t in ("<|eom_id|>", "<|call|>"))]
        ends = {self._turn_end, self.special.get("eos_token"), *known} - {None}
        return "|".join(map(re.escape, sorted(ends, key=len, reverse=True))) or "(?!)"

    def _turn_end_at(self, text, at):
        """Behind the end-of-turn token that stands at `at`, white space before it included; None if there is none."""
        found = re.compile(rf"\s*(?:{self._ends()})").match(text, at)
        return found and found.end()

    @cached_property
    def prompt_begins_answers(self) -> bool:
        """Whether a conversation with an answer begins with the prompt that a rollout of that answer gets."""
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}
        try:
            return self.render([user, answer]).startswith(self.render([user], add_generation_prompt=True))
        except InputError:
            return True

    def _marked_spans(self, messages, text, tools, variables):
        marked = self._render(self._marking_jinja, messages, tools, False, variables)
        if marked.replace(OPEN, "").replace(CLOSE, "") != text:
            raise InputError("the {% generation %} blocks of the chat template change what it renders: let them hold "
                             "whole pieces of text.")
        spans, at, start = [], 0, 0
        for piece in re.split(f"([{OPEN}{CLOSE}])", marked):
            if piece == OPEN:
                start = at
            elif piece == CLOSE:
                spans.append((start, at))
            else:
                at += len(piece)
        return spans

    # ----------------------------------------------------------------------------------------------------- identity
    @property
    def template_hash(self) -> str | None:
        return self.template and hashlib.sha256(self.template.encode()).hexdigest()[:16]

    @property
    def tokenizer_hash(self) -> str:
        return hashlib.sha256(self.raw.to_str().encode()).hexdigest()[:16]


def tokenizer_files(folder, tokenizer: Tokenizer) -> dict[str, str | bytes]:
    """What goes beside a checkpoint: the folder's tokeniser files and generation_config.json unchanged, the template
    in force, and a fingerprint by which a later stage recognises it (check_stage)."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
             "merges.txt", "tokenizer.model", "generation_config.json")
    files = {n: (Path(folder) / n).read_bytes() for n in names if (Path(folder) / n).is_file()}
    if tokenizer.template is not None:
        files["chat_template.jinja"] = tokenizer.template
    return {**files, "nanopost.json": json.dumps(fingerprint(tokenizer), indent=1) + "\n"}


def fingerprint(tokenizer: Tokenizer) -> dict:
    return {"template_hash": tokenizer.template_hash, "tokenizer_hash": tokenizer.tokenizer_hash,
            "versions": {"tokenizers": tokenizers.__version__, "jinja2": jinja2.__version__}}


def check_stage(folder, tokenizer: Tokenizer) -> str:
    """A loud sentence if the checkpoint in `folder` was trained with another template or tokeniser, else ""."""
    trained = _read_json(Path(folder) / "nanopost.json")
    now = fingerprint(tokenizer)
    changed = [k.removesuffix("_hash") for k in ("template_hash", "tokenizer_hash") if trained and trained[k] != now[k]]
    return changed and (f"WARNING: {folder} was trained with another {' and '.join(changed)} than this run uses; its "
                        "prompts will look different from those it knows. Drop --chat_template if that is not meant.") or ""


def report(examples: list[Example], tokenizer: Tokenizer, shown: int = 600) -> str:
    """Checks before training -> a short report. InputError for what is surely wrong; what is doubtful is said in it."""
    bos, stops = tokenizer.bos_id, np.array(sorted(tokenizer.stop_ids))
    doubled = [i for i, e in enumerate(examples) if bos is not None and list(e.ids[:2]) == [bos, bos]]
    if doubled:
        raise InputError(f"row {doubled[0]} and {len(doubled) - 1} more begin with BOS twice: the template writes it "
                         "and so does the text; take it out of the text.")
    empty = [i for i, e in enumerate(examples) if not e.mask[1:].any()]
    if len(empty) == len(examples):
        raise InputError("no row has a token to train: --train_on and the template leave nothing of the answers.")
    tokens, trained = sum(map(len, examples)), sum(int(e.mask.sum()) for e in examples)
    ends = sum(bool(np.isin(e.ids[e.mask], stops).any()) for e in examples)
    counts = [int((e.ids == bos).sum()) for e in examples]
    longest = max(range(len(examples)), key=lambda i: len(examples[i]))
    lines = [f"rows {len(examples):,}   tokens {tokens:,}   trained {trained / tokens:.1%}   "
             f"BOS a row {f'{min(counts)}..{max(counts)}' if bos is not None else 'none declared'}   "
             f"end-of-turn trained in {ends / len(examples):.1%} of rows   "
             f"longest row {longest}: {len(examples[longest]):,} tokens"]
    if empty:
        lines.append(f"doubtful: {len(empty)} rows train nothing, such as row {empty[0]}.")
    if tokenizer.template is not None and not tokenizer.prompt_begins_answers:
        lines.append("doubtful: the template's generation prompt is not how its answers begin, so rollouts start from "
                     "text that training never shows.")
    if ends == 0:
        lines.append("doubtful: no end-of-turn token is trained in any row, so the model will not learn to stop.")
    first = next(e for e in examples if e.mask[1:].any())
    return "\n".join([*lines, "trained text is between » and «:", marked_text(first, tokenizer)[:shown]])


def marked_text(example: Example, tokenizer: Tokenizer) -> str:
    """An example decoded, with » and « around what is trained."""
    cuts = np.flatnonzero(np.diff(example.mask.astype(int))) + 1
    pieces = zip(np.split(example.ids, cuts), np.split(example.mask, cuts))
    return "".join(f"»{tokenizer.decode(ids)}«" if mask[0] else tokenizer.decode(ids) for ids, mask in pieces)


def _example(ids, mask):
    return Example(np.array(ids, np.int32), mask)


def _tokens_in(offsets, spans):
    """A token is trained if it shares a character with a span."""
    start, end = np.array(offsets, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(start), bool)
    for a, b in spans:
        mask |= (start < b) & (end > a)
    return mask


def _content(token):
    return token["content"] if isinstance(token, dict) else token


def _call_name(call):
    return call.get("function", call).get("name", "")


def _reasoning(message):
    """Reasoning goes by three names; templates read the first, gpt-oss the second. As in transformers."""
    given = next((message[k] for k in ("reasoning_content", "thinking", "reasoning") if message.get(k) is not None), None)
    return message if given is None else {"thinking": given, **message, "reasoning_content": given}


def _read_json(path):
    return json.loads(path.read_text()) if path.is_file() else {}


def _template(folder, config, chat_template):
    """The template in force: the file that was given, chat_template.jinja, or tokenizer_config.json's."""
    if chat_template is not None:
        if not Path(chat_template).is_file():
            raise InputError(f"--chat_template {chat_template}: no such file.")
        return Path(chat_template).read_text()
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t["name"]: t["template"] for t in template}
        return named.get("default", next(iter(named.values())))
    return template


# ------------------------------------------------------------------------------------------------------------- sandbox
class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: marks its body's place in the text, or does nothing."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller):
        return OPEN + caller() + CLOSE if self.environment.nanopost_marks else caller()


class _Namespace(jinja2.utils.Namespace):
    """A template is untrusted: nothing that begins with an underscore is stored on a namespace."""

    def __setitem__(self, name, value):
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"attribute {name!r} on a namespace")
        super().__setitem__(name, value)


def _compile(template, marks):
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(pattern):
        return datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.nanopost_marks = marks
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, namespace=_Namespace)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template is not valid Jinja (line {error.lineno}: {error.message}).") from error
