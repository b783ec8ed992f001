"""Text -> token ids, and the mask of what is trained: prompts, completions, conversations, pairs.

A conversation is rendered once and encoded once, with no special tokens added: BOS appears at most
once. What is trained follows from character spans of the rendering (spans.py), which the encoding's
offsets map to tokens.
"""

import hashlib
import json
import os
from collections import Counter
from functools import cached_property
from itertools import chain
from pathlib import Path

import jinja2
import numpy as np
import tokenizers
from tokenizers import processors

from nanopost import InputError, lora
from nanopost.batch import Example
from nanopost.hf import is_own
from nanopost.rows import errors_at, place
from nanopost.save import PROCESSOR
from nanopost.spans import answer_spans
from nanopost.template import Template
from nanopost.terminal import progress
from nanopost.tokenizer_json import (
    listed,
    named_tokens,
    read_optional_json,
    read_template,
    read_tokenizer,
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
    *PROCESSOR,
)

REASONING = ("reasoning_content", "reasoning", "thinking")  # what models call it in a message
MARKED_REASONING = "because of this"


class Tokenizer:
    """A folder's tokenizer.json, tokenizer_config.json and chat template.

    bos_id, eos_id, pad_id: None where the folder declares none. stop_ids: the tokens that end a
    completion, namely eos_token, generation_config.json's eos_token_id and the token that the
    template writes after an answer. Rows are those of rows.py's forms.
    """

    def __init__(
        self,
        raw: tokenizers.Tokenizer,
        config: dict,
        template: str | None,
        extra_stops=(),
        lacking_id: int | None = None,
    ):
        """config: tokenizer_config.json. template: Jinja, or None for a base model. lacking_id: a
        token that the model has no embedding for."""
        raw.no_truncation()
        raw.no_padding()
        named = named_tokens(config)
        self.raw, self.lacking_id = raw, lacking_id
        self.bos_id = raw.token_to_id(named.get("bos_token", ""))
        self.eos_id = raw.token_to_id(named.get("eos_token", ""))
        self.pad_id = raw.token_to_id(named.get("pad_token", ""))
        self.special = {
            token.content: i for i, token in raw.get_added_tokens_decoder().items() if token.special
        }
        self.prefix = _prefix(raw)
        # It adds nothing but the prefix, and GPT-2's trims spaces from offsets.
        raw.post_processor = processors.Sequence([])
        stop_ids = {self.eos_id, *extra_stops} - {None}
        self.template = Template(template, named, self.special, map(raw.id_to_token, stop_ids))
        turn_end_id = self.special.get(self.template.turn_end)
        self.stop_ids = frozenset({*stop_ids, turn_end_id} - {None})

    @classmethod
    def load(cls, folder, chat_template=None) -> "Tokenizer":
        """Read a folder; chat_template: a file to use instead of the model's template."""
        own = _own_folder(folder)
        raw, config, lacking_id = read_tokenizer(own)
        template = read_template(own, config, chat_template)
        stops = read_optional_json(_path(folder, "generation_config.json")).get("eos_token_id")
        try:
            return cls(raw, config, template, listed(stops), lacking_id)
        except InputError as error:
            raise InputError(f"{chat_template or folder}: {error}") from error

    # ---------------------------------------------------------------------------------------- text
    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may have more rows."""
        return self.raw.get_vocab_size()

    def unused_ids(self, size: int) -> list[int]:
        """Ids below `size` that no token has: rows that pad an embedding, and holes."""
        return sorted(set(range(size)) - set(self.raw.get_vocab().values()))

    def encode(self, text: str) -> list[int]:
        """Token ids. Special tokens spelled out in the text are recognised; none are added."""
        return self._encoding(text).ids

    def _encoding(self, text: str) -> tokenizers.Encoding:
        encoding = self.raw.encode(text, add_special_tokens=False)
        if self.lacking_id is not None and self.lacking_id in encoding.ids:
            raise InputError(
                f"the text has {self.raw.id_to_token(self.lacking_id)!r}, for which this model, of "
                "text alone, has no embedding: remove it."
            )
        return encoding

    def decode(self, ids, skip_special: bool = False) -> str:
        return self.raw.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text, after the BOS that this tokenizer adds, unless the text has it."""
        ids = self.encode(text)
        if ids[: len(self.prefix)] == self.prefix:
            return ids
        return self.prefix + ids

    def prompt_ids(self, prompt: str | list[dict], tools=None, **variables) -> list[int]:
        """What a rollout starts from: messages and the generation prompt, or plain text."""
        if isinstance(prompt, str):
            return self.text_ids(prompt)
        text = self.template.render(prompt, tools, add_generation_prompt=True, **variables)
        if self.template.unprompted:
            raise InputError(
                "the chat template has no generation prompt, so a rollout would have to write "
                f"{self.template.unprompted!r} itself: use one that has one (--chat_template FILE)."
            )
        return self.encode(text)

    def turn_ids(self, prompt: list[dict], reply: list[dict], **variables) -> list[int]:
        """What follows the token that ends an answer to `prompt`: see Template.turn. Encoded alone,
        so that what was sampled before it stays as it is."""
        return self.encode(self.template.turn(prompt, reply, **variables))

    # ---------------------------------------------------------------------------------------- rows
    def with_prompts(
        self,
        parts,
        max_prompt: int | None,
        max_new: int,
        tokens: int,
        positions: int,
        sides: int = 1,
    ) -> tuple[list[list[dict]], str]:
        """Tokenize the prompts of several lists of rows -> (the lists, a report).

        Each row gains the column prompt_ids, and all get the same columns, filled with None.
        Prompts of more than max_prompt tokens are dropped and counted. InputError if no row of a
        list is left, or for a row that the template refuses, or whose prompt and max_new
        tokens exceed the model's positions or tokens / sides (2 sides: both of a pair must fit).
        """
        columns = dict.fromkeys(chain.from_iterable(chain(*parts)))
        kept = [[] for _ in parts]
        dropped = 0
        for rows, keep in zip(parts, kept):
            for row in progress(rows, "prompts encoded"):
                with errors_at(row):
                    ids = self.prompt_ids(row["prompt"], **variables(row))
                    if max_prompt is not None and len(ids) > max_prompt:
                        dropped += 1
                        continue
                    _check_room(len(ids), max_new, tokens, positions, sides)
                keep.append({**columns, **row, "prompt_ids": ids})
            if rows and not keep:
                counts = " and ".join(str(len(rows)) for rows in parts)
                raise InputError(
                    f"none of {len(rows):,} prompts is left within --max_prompt {max_prompt} "
                    f"(training and held-out prompts: {counts})."
                )
        report = f"{dropped:,} dropped by --max_prompt"
        doubt = self.doubts(list(chain(*parts)))
        return kept, f"{report}; {doubt}" if doubt else report

    def doubts(self, rows: list[dict]) -> str:
        """Warnings of prompts in plain text beside a chat template, and of reasoning that it
        ignores, or ""."""
        return "\n".join(filter(None, [self._plain_prompts(rows), self._ignored_reasoning(rows)]))

    def _ignored_reasoning(self, rows):
        if not self.template.source:
            return ""
        counts, said = Counter(), []
        for row in rows:
            messages = chain(*(value for value in row.values() if isinstance(value, list)))
            keys = set(chain(*(message for message in messages if isinstance(message, dict))))
            counts.update(keys.intersection(REASONING))
        for key, count in counts.items():
            answer = {"role": "assistant", "content": "a", key: MARKED_REASONING}
            try:
                text = self.template.render([{"role": "user", "content": "q"}, answer])
            except InputError:  # of a template that wants other messages
                continue
            if MARKED_REASONING not in text:
                said.append(
                    f"warning: the chat template ignores {key}, which {count:,} of {len(rows):,} "
                    "rows have: write it into the content, or give another template "
                    "(--chat_template FILE)"
                )
        return "\n".join(said)

    def _plain_prompts(self, rows):
        plain = [row for row in rows if isinstance(row.get("prompt"), str)]
        plain = [row for row in plain if "messages" not in row]
        if not plain or not self.template.source:
            return ""
        return (
            f"warning: {len(plain):,} of {len(rows):,} prompts are plain text, which gets no chat "
            f"template, though the model has one ({place(plain[0])} is the first): --to_messages "
            "makes them messages"
        )

    def example(self, row: dict, train_on: str = "assistant") -> Example:
        """A row of the form sft, with optional columns tools and chat_template_kwargs.

        train_on: assistant (every assistant turn), last (the last one), completion (those after the
        last user turn) or all. Only `all` trains a row's prompt. Plain text is trained whole; of a
        plain prompt and completion, only the completion is. Both end with EOS.
        """
        with errors_at(row):
            if "messages" in row or isinstance(row.get("prompt"), list):
                return self._chat_example(row, train_on)
            if "prompt" in row:
                return self._text_example(row["prompt"], row["completion"], train_on)
            return self._text_example("", row["text"], train_on)

    def pair(self, row: dict) -> tuple[Example, Example]:
        """A row of the form pair -> chosen and rejected.

        Both end with their last trained token, as rollouts do. Where an answer begins with text
        that forms one token with the end of its prompt, both answers begin at the last token that
        the prompts share. InputError if the prompts differ otherwise.
        """
        names = ("prompt", "tools", "chat_template_kwargs", "__line__")
        shared = {name: row[name] for name in names if name in row}
        examples = [
            self.example({**shared, "completion": row[side]}, "completion").ended()
            for side in ("chosen", "rejected")
        ]
        if not all(e.mask.any() for e in examples):
            return tuple(examples)  # pairs.fit_to leaves it out
        prompts = [e.ids[: e.mask.argmax()].tolist() for e in examples]
        at = len(os.path.commonprefix(prompts))
        if at < min(map(len, prompts)):
            chosen, rejected = (self.decode(ids[at : at + 5]) for ids in prompts)
            raise InputError(
                f"{place(row)}: the prompts of chosen and rejected differ from token {at} on "
                f"({chosen!r} and {rejected!r}): the template or the tokenizer lets an answer "
                "change what comes before it."
            )
        for e in examples:
            e.mask[at : e.mask.argmax()] = True
        return tuple(examples)

    def _text_example(self, prompt, completion, train_on):
        # Encode both together, as in TRL: separately, SentencePiece would put a space between them.
        # But encode them separately if a token would cross the boundary, since the prompt's tokens
        # must be those of a rollout.
        prompt_ids = self.text_ids(prompt)
        ids = self.text_ids(prompt + completion)
        if ids[: len(prompt_ids)] != prompt_ids:
            ids = prompt_ids + self.encode(completion)
        if self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids.append(self.eos_id)
        start = 0 if train_on == "all" else len(prompt_ids)
        return Example(ids, np.arange(len(ids)) >= start)

    def _chat_example(self, row, train_on):
        messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
        given = variables(row)
        text = self.template.render(messages, **given)
        encoding = self._encoding(text)
        if train_on == "all":
            return Example(encoding.ids, np.ones(len(encoding.ids)))
        turns = _trained_turns(row, messages, train_on)
        spans = answer_spans(self.template, messages, text, turns, **given)
        return Example(encoding.ids, self._tokens_in(encoding, spans))

    def _tokens_in(self, encoding, spans):
        """Tokens that share a character with a span -> bool [T].

        Except a special token before the span whose rstrip swallows the span's first whitespace.
        """
        start_T, end_T = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        mask_T = np.zeros(len(start_T), bool)
        for start, end in spans:
            inside_T = (start_T < end) & (end_T > start)
            first = inside_T.argmax()
            if start_T[first] < start and self._is_special(encoding.ids[first]):
                inside_T[first] = False
            mask_T |= inside_T
        return mask_T

    def _is_special(self, token_id):
        return self.raw.id_to_token(token_id) in self.special

    # ------------------------------------------------------------------------------------ identity
    def warnings(self) -> list[str]:
        """What looks wrong with tokenizer and template, whatever the rows: one sentence each."""
        warnings = self.template.warnings()
        if not self.stop_ids:
            warnings.insert(0, "no end-of-sequence token is declared: nothing can learn to stop.")
        return warnings

    @cached_property
    def hash(self) -> str:
        """A hash of what decides ids, whoever wrote the files and in whatever form."""
        what = [_deciding_ids(json.loads(self.raw.to_str())), self.prefix]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def check_same(
        self, folder, flag: str, way_out: str = "use one that was trained from the policy's model"
    ):
        """InputError if the checkpoint in `folder`, given by `flag`, has another tokenizer."""
        if Tokenizer.load(folder).hash != self.hash:
            raise InputError(
                f"{flag}{folder}: its tokenizer is not the policy's, so it reads different text: "
                f"{way_out}."
            )


class Pieces:
    """Token ids, one after another -> the text that each of them completes.

    A character of several tokens is the text of its last one: a part of it would be shown as
    U+FFFD. What stays U+FFFD, broken or the letter itself, comes as many tokens later as a
    character has bytes. The pieces and the rest, joined, are the text of all tokens, as far as that
    is UTF-8.
    """

    BYTES = 4  # of a character, at most; each of its tokens has one or more of them

    def __init__(self, decode):
        """decode: ids to text."""
        self.decode = decode
        self.before = []  # decoded with the ones after them: some decoders trim the first token
        self.ids = []  # whose text is not complete
        self.given = 0  # characters of it

    def push(self, token_id: int) -> str:
        self.ids.append(token_id)
        text = self._text()
        complete = text.rstrip("\ufffd")
        piece = complete[self.given :]
        self.given = max(self.given, len(complete))
        if text and complete == text:
            self.before, self.ids, self.given = self.ids, [], 0
        elif len(self.ids) >= self.BYTES:
            piece += self._release()
        return piece

    def _release(self):
        """The text of tokens too old to be part of a character that is not complete."""
        past, self.ids = self.ids[: 1 - self.BYTES], self.ids[1 - self.BYTES :]
        text, start = self.decode(self.before + past + self.ids), len(self.decode(self.before))
        end = len(self.decode(self.before + past))
        piece = text[start + self.given : end]
        self.given = max(0, self.given - max(0, end - start))
        if end > start or self.decode(past) or not self.before:  # or else they say nothing
            self.before += past
        # Its last tokens do as context: a character cut at their start is cut in both decodings.
        if self.decode(self.before[-self.BYTES :]):
            self.before = self.before[-self.BYTES :]
        return piece

    def rest(self) -> str:
        """What was held back for a character that never came."""
        return self._text()[self.given :]

    def _text(self):
        return self.decode(self.before + self.ids)[len(self.decode(self.before)) :]


def _prefix(raw):
    """The ids that the tokenizer puts before any text: BOS, if it adds one."""
    plain = raw.encode("a", add_special_tokens=False).ids
    if not plain:
        return []
    ids = raw.encode("a").ids
    return ids[: ids.index(plain[0])]


# Parts of tokenizer.json that change no id of a text.
NO_ID = ("version", "truncation", "padding", "post_processor", "decoder", "trim_offsets", "special")


def _deciding_ids(part):
    """A part of tokenizer.json without what changes no id, and without keys that say nothing."""
    if isinstance(part, list):
        return [_deciding_ids(inner) for inner in part]
    if not isinstance(part, dict):
        return part
    if "vocab" in part:  # of a model, where a key without a value means what its absence does
        return {k: v for k, v in part.items() if v is not None and v is not False and v != ""}
    steps = part.get("pretokenizers", part.get("normalizers"))
    if steps is not None and len(steps) < 2:  # a sequence of one step, or of none
        return _deciding_ids(steps[0]) if steps else None
    return {name: _deciding_ids(inner) for name, inner in part.items() if name not in NO_ID}


def variables(row: dict) -> dict:
    """What a row gives the template besides its messages."""
    return {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}


def _check_room(length, max_new, tokens, positions, sides):
    """InputError if a prompt of this length plus max_new tokens is too long."""
    if length + max_new <= min(tokens // sides, positions):
        return
    given = f"a prompt of {length} tokens and {max_new} new ones exceed"
    shorter = "drop long prompts (--max_prompt, in training), lower --max_new_tokens"
    if positions <= tokens // sides:
        raise InputError(f"{given} the {positions} positions that there are: {shorter}.")
    half = " / 2 (one side of a pair)" if sides == 2 else ""
    raise InputError(f"{given} --tokens {tokens}{half}: {shorter} or raise --tokens.")


def _trained_turns(row, messages, train_on):
    """Indices of the assistant messages that train_on selects."""
    first = 0
    if "messages" not in row:
        first = len(row["prompt"])
    elif train_on == "completion":
        questions = [k for k, message in enumerate(messages) if message["role"] == "user"]
        first = max(questions, default=0)
    turns = [k for k, m in enumerate(messages) if m["role"] == "assistant" and k >= first]
    return turns[-1:] if train_on == "last" else turns


# ----------------------------------------------------------------------- files next to a checkpoint
def tokenizer_files(folder, tokenizer: Tokenizer) -> dict[str, str | bytes | None]:
    """Files to save next to a model trained from `folder`; None: the model must have no such file.

    They are the folder's tokenizer files, the template in use and a fingerprint for check_stage. A
    stop token that the folder does not know (another template's) joins generation_config.json's
    eos_token_id: transformers and vLLM, which know nothing of the template's end of turn, would
    otherwise generate past it.
    """
    own = _own_folder(folder)
    files = dict.fromkeys(FILES)
    for name in FILES:
        path = own / name
        if name == "generation_config.json":
            path = _path(folder, name)
        if path.is_file() and name not in _foreign(path.parent):
            files[name] = path.read_bytes()
    files["chat_template.jinja"] = tokenizer.template.source
    generation = read_optional_json(_path(folder, "generation_config.json"))
    known = listed(generation.get("eos_token_id"))
    if not known:
        model = read_optional_json(_path(folder, "config.json"))
        declared = listed((model.get("text_config", {}) | model).get("eos_token_id"))
        known = [i for i in declared if i in tokenizer.stop_ids]
    if new := sorted(tokenizer.stop_ids - {*known}):
        generation["eos_token_id"] = known + new
        files["generation_config.json"] = json.dumps(generation, indent=2) + "\n"
    files["nanopost.json"] = json.dumps(fingerprint(tokenizer), indent=1) + "\n"
    return files


def _own_folder(folder) -> Path:
    """Where the tokenizer is: for an adapter's folder without one, in that of its base."""
    folder = Path(folder)
    return folder if (folder / "tokenizer.json").is_file() else lora.base_folder(folder)


def _path(folder, name) -> Path:
    """A file beside the weights; for an adapter's folder without it, that of its base."""
    path = Path(folder, name)
    return path if path.is_file() else lora.base_folder(folder) / name


def _foreign(folder) -> list[str]:
    """Links to elsewhere, which are not copied, since they may lead to anything: all but
    tokenizer.json, which has been read as a tokenizer."""
    there = [name for name in FILES[1:] if (folder / name).is_file()]
    return [name for name in there if not is_own(folder / name)]


def fingerprint(tokenizer: Tokenizer) -> dict:
    return {
        "template_hash": tokenizer.template.hash,
        "tokenizer_hash": tokenizer.hash,
        "versions": {"tokenizers": tokenizers.__version__, "jinja2": jinja2.__version__},
    }


def check_stage(folder, tokenizer: Tokenizer) -> str:
    """A warning if the model in `folder` was trained with another template or tokenizer, or has
    files that will not be copied; else ""."""
    own = _own_folder(folder)
    trained = read_optional_json(own / "nanopost.json")
    now = fingerprint(tokenizer)
    changed = [
        name
        for name in ("template", "tokenizer")
        if trained and trained[f"{name}_hash"] != now[f"{name}_hash"]
    ]
    warnings = []
    if changed:
        warnings.append(
            f"WARNING: {folder} was trained with another {' and '.join(changed)} than this run "
            "uses, so prompts will not look like those it was trained on: was --chat_template "
            "intended?"
        )
    if foreign := _foreign(own):
        warnings.append(
            f"WARNING: {folder}: {', '.join(foreign)}: links to elsewhere, which are not copied to "
            "the trained model: put the files there instead."
        )
    return "\n".join(warnings)
