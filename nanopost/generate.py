r"""python -m nanopost.generate: what a model answers, in a chat or to a file of prompts.

    --model DIR                                       a chat: each answer appears as it is sampled
    --model DIR --data prompts.jsonl --out FILE       JSONL: rows of prompts, each with its answers

In a chat, Ctrl-C ends an answer, /clear forgets the earlier turns, which are part of each prompt,
/quit or Ctrl-D leaves. --data takes the rows of the RL scripts; what it writes are rows of
train_sft.py.
"""

import contextlib
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from nanopost import InputError, cli, dist, hf
from nanopost.cli import Parser, at_least
from nanopost.engine import Engine, Sampling, prompt_seed
from nanopost.manifest import named_files
from nanopost.rollout import completion_text
from nanopost.rows import check_out, prompt, read_rows
from nanopost.terminal import printable, progress, say
from nanopost.tokenizer import Pieces, Tokenizer, check_stage

REPLACED = ("completion", "finish", "tokens", "messages")  # columns of an answer, or read before it
COMMANDS = "Ctrl-C ends an answer, /clear forgets earlier turns, /quit or Ctrl-D leaves"
READ = ("data", "model", "chat_template")  # flags of files that are read


# --------------------------------------------------------------------------------------------- chat
class Chat:
    """A conversation with a model. messages: its turns so far, the system's first."""

    def __init__(self, engine, tokenizer: Tokenizer, sampling: Sampling, positions: int, seed=0):
        """positions: maximum tokens of a conversation."""
        self.engine, self.tokenizer, self.sampling = engine, tokenizer, sampling
        self.positions, self.seed = positions, seed
        self.messages = []
        self.turn = 0

    def answer(self, question: str, write) -> str:
        """Ask, and call write with each piece of the answer -> how it ended: stop, length, or
        interrupt for a Ctrl-C, which keeps what was said. InputError leaves the messages as they
        were."""
        messages = [*self.messages, {"role": "user", "content": question}]
        ids = self.tokenizer.prompt_ids(messages)
        sampling = self._fitting(len(ids))
        pieces, said = Pieces(self.tokenizer.decode), []

        def tell(new_ids):
            for token_id in new_ids:
                if token_id not in self.tokenizer.stop_ids:
                    said.append(pieces.push(token_id))
                    write(said[-1])

        seeds = [prompt_seed(self.seed, self.turn)]
        try:
            if isinstance(self.engine, Engine):
                ((rollout,),) = self.engine.generate([ids], 1, sampling, seeds, tell)
            else:  # vLLM's answers come whole
                ((rollout,),) = self.engine.generate([ids], 1, sampling, seeds)
                tell(rollout.ids)
            said.append(pieces.rest())
            write(said[-1])
            finish = rollout.finish
        except KeyboardInterrupt:
            finish = "interrupt"
        self.turn += 1
        if finish != "interrupt" or any(said):
            self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]
        return finish

    def _fitting(self, length):
        """The sampling, of no more tokens than the model has positions left."""
        room = self.positions - length
        if room < 1:
            raise InputError(
                f"the conversation has {length:,} tokens, and the model {self.positions:,} "
                "positions: /clear starts over."
            )
        most = min(self.sampling.max_tokens, room)
        return replace(self.sampling, max_tokens=most)


def chat(args, engine, tokenizer, positions):
    """Read questions and write answers until the questions end."""
    tokenizer.prompt_ids([{"role": "user", "content": "Hi"}])  # InputError now if it cannot chat
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input then has a history and arrow keys)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if isinstance(engine, Engine):
        engine.check_every = 1  # one token at a time
    system = [{"role": "system", "content": args.system}] if args.system else []
    talk = Chat(engine, tokenizer, cli.sampling(args, kept=False), positions, args.seed)
    talk.messages = system
    say(COMMANDS)
    how = "greedy"
    if args.temperature:
        how = f"sampled at temperature {args.temperature:g} (--temperature 0: greedy)"
    say(f"answers are {how}; earlier turns are part of the prompt")
    while True:
        try:
            question = input("> ")
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if question.rstrip() == "/quit":
            return
        if question.rstrip() == "/clear":
            talk.messages = system
            say("(cleared)")
        elif question.startswith("/"):
            say(f"no such command: {COMMANDS}; to send such a line, put a space before it")
        elif question.strip():
            question = question[1:] if question.startswith(" /") else question
            try:
                finish = talk.answer(question, write)
            except InputError as error:
                say(f"error: {error}")
                continue
            print("" if finish == "stop" else f" [{finish}]")


def write(piece):
    print(printable(piece), end="", flush=True)


# ------------------------------------------------------------------------------------------- a file
def answer_file(args, engine, tokenizer, positions, write):
    """Call write with a line of JSON for each answer, prompt by prompt -> how many."""
    rows = read_rows(args.data, args.rename, prompt, args.to_messages)
    (rows,), _ = tokenizer.with_prompts((rows,), None, args.max_new_tokens, positions, positions)
    say(tokenizer.doubts(rows))
    for name in REPLACED:
        if own := sum(row.get(name) is not None for row in rows):
            say(f"{own:,} rows have a column {name}: it is not kept (--rename {name}=... keeps it)")
    sampling, count = cli.sampling(args, kept=False), 0
    at_once = max(1, args.engine_rows // args.n)
    for first in progress(range(0, len(rows), at_once), "batches of prompts answered"):
        some = rows[first : first + at_once]
        seeds = [prompt_seed(args.seed, first + i) for i in range(len(some))]
        prompts = [row["prompt_ids"] for row in some]
        groups = engine.generate(prompts, args.n, sampling, seeds)
        for row, group in zip(some, groups):
            for rollout in group:
                line = record(row, rollout, tokenizer)
                # In a terminal nothing is left for printable to write out, which is no JSON.
                write(json.dumps(line, ensure_ascii=not args.out) + "\n")
                count += 1
    return count


def record(row, rollout, tokenizer) -> dict:
    """A row's columns with an answer: a message where the prompt is messages, else text."""
    text = completion_text(rollout, tokenizer)
    is_chat = isinstance(row["prompt"], list)
    left_out = ("prompt_ids", "__line__", *REPLACED)
    columns = {k: v for k, v in row.items() if v is not None and k not in left_out}
    return {
        **columns,
        "completion": [{"role": "assistant", "content": text}] if is_chat else text,
        "finish": rollout.finish,
        "tokens": rollout.length,
    }


# ------------------------------------------------------------------------------------- command line
def parsed(arguments=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", metavar="DIR", required=True, help="folder of a model or an adapter")
    add("--data", nargs="+", help="prompts, as the RL scripts read them; default: a chat")
    add("--out", metavar="FILE", help="JSONL of the answers to --data; default: the terminal")
    add("--overwrite", action="store_true", help="replace --out")
    add("--n", type=at_least(1), default=1, help="answers to each prompt of --data")
    add("--system", help="the system message of a chat")
    add("--rename", nargs="*", default=[], metavar="THEIRS=OURS", help="question=prompt")
    add(
        "--to_messages",
        action="store_true",
        help="put plain-text prompts into the chat template, as messages",
    )
    add("--chat_template", help="a Jinja file that replaces the model's own template")
    add("--temperature", type=at_least(0.0), default=1.0, help="0: greedy")
    cli.add_cut_flags(parser)
    add("--stop", nargs="*", default=[], help="strings that end an answer")
    add("--max_new_tokens", type=at_least(1), default=512, help="maximum tokens of an answer")
    add("--seed", type=at_least(0), default=0)
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 on CUDA")
    cli.add_engine_flags(parser)
    return parser.parse_args(arguments)


def check(args):
    """InputError for flags that do not go together."""
    if not args.data:
        for name in ("out", "overwrite", "rename", "to_messages"):
            if getattr(args, name):
                raise InputError(f"--{name} is about a file of prompts: give --data.")
        if args.n > 1:
            raise InputError("--n is about a file of prompts: give --data.")
        return
    if args.system:
        raise InputError("--system is of a chat: write it into the prompts of --data.")
    if args.n > 1 and not args.temperature:
        raise InputError(f"--n {args.n} answers would all be equal at --temperature 0.")
    if not args.out:
        if args.overwrite:
            raise InputError("--overwrite is about --out: give it too.")
        return
    for read in named_files({name: getattr(args, name) for name in READ}):
        if Path(args.out).resolve().is_relative_to(Path(read).resolve()):
            raise InputError(
                f"--out {args.out} would replace what is read, {read}: choose another."
            )
    check_out(Path(args.out), args.overwrite, zips=False)
    part = part_of(args.out)
    if part.exists() and not args.overwrite:
        raise InputError(
            f"{part} holds the answers of a run that ended early: rename it, or --overwrite it."
        )


def part_of(out) -> Path:
    """Where the answers are until all prompts have theirs; it becomes --out then."""
    return Path(f"{out}.part")


def main(arguments=None):
    args = parsed(arguments)
    world = dist.init(args.device, args.dtype)
    check(args)
    tokenizer = Tokenizer.load(args.model, args.chat_template)
    say(check_stage(args.model, tokenizer))
    model = hf.load_model(args.model, world.device, world.dtype)
    engine = cli.engine(args, args.model, model, world, tokenizer)
    engine.sync_weights(model.state_dict().items(), 0)
    positions = model.config.max_positions
    if not args.data:
        chat(args, engine, tokenizer, positions)
    elif not args.out:
        answer_file(args, engine, tokenizer, positions, write)
    else:
        part = part_of(args.out)
        with open(part, "w", encoding="utf-8", buffering=1) as file:  # line by line
            try:
                count = answer_file(args, engine, tokenizer, positions, file.write)
            except BaseException:
                if file.tell():
                    say(f"{part} holds the answers so far")
                else:
                    part.unlink()
                raise
        os.replace(part, args.out)
        say(f"{args.out}: {count:,} answers written")
    dist.finish()


if __name__ == "__main__":
    main()
