"""The flags that scripts share. Bounds are declared with the flag; the library reads no flags.

A script declares its own beside them:

    parser = cli.parser(__doc__, out="out/grpo", lr=1e-6, warmup=10)
    cli.add_rollout_flags(parser)
    parser.add_argument("--steps", type=at_least(1), default=100, help="rollout batches")
"""

import argparse
import difflib
import io
import math
import re
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from nanopost import InputError, dist, hf, lora, packing, rewards
from nanopost.ahead import Ahead
from nanopost.audit import Audit
from nanopost.boards import Boards
from nanopost.colocate import Colocated
from nanopost.engine import Engine, Sampling, prompt_seed
from nanopost.environment import Environments, answer_once, doubts
from nanopost.recording import Recording, Replay
from nanopost.rows import place
from nanopost.run import Run, changed_arguments, starts_of
from nanopost.teacher import ServedTeacher, Teacher
from nanopost.terminal import say
from nanopost.vllm import Servers

FREE = re.compile("(out|record|replay|save|keep|vllm|engine|audit|max_staleness)")  # in a replay


def at_least(least: float, most: float = math.inf):
    """An argparse type: a finite number within bounds, an int if `least` is one, else a float."""
    kind = type(least)

    def number(text):
        value = _finite(kind(text), text)
        if not least <= value <= most:
            limit = "" if most == math.inf else f", and at most {most}"
            raise argparse.ArgumentTypeError(f"{text}: give {least} or more{limit}")
        return value

    number.__name__ = kind.__name__  # argparse says "invalid int value"
    return number


def above(bound: float, most: float = math.inf):
    """An argparse type: a finite float above a bound."""

    def number(text):
        value = _finite(float(text), text)
        if not bound < value <= most:
            limit = "" if most == math.inf else f", and at most {most:g}"
            raise argparse.ArgumentTypeError(f"{text}: give more than {bound:g}{limit}")
        return value

    number.__name__ = "float"
    return number


def finite(text: str) -> float:
    """An argparse type: a float that is neither infinite nor NaN."""
    return _finite(float(text), text)


def _finite(value, text):
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: give a finite number")
    return value


class Parser(argparse.ArgumentParser):
    """--help shows each flag's default unless its text does; a bad flag gets a one-line error.

    Flags are not abbreviated: --step would be --steps, and another flag once there is a --step.
    """

    def __init__(self, doc: str):
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_argument(self, *names, **options):
        action = super().add_argument(*names, **options)
        shown = action.default
        if isinstance(shown, (list, tuple)):
            shown = " ".join(map(str, shown))
        has_default = shown not in (None, "", argparse.SUPPRESS) and shown is not False
        if has_default and "default" not in (action.help or ""):
            action.help = f"{action.help}; default {shown}" if action.help else f"default {shown}"
        return action

    def parse_known_args(self, args=None, namespace=None):
        self.given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self.given, namespace)

    def error(self, message):
        if message.startswith(("unrecognized", "the following")):
            message += self._misspelt()
        self.exit(2, f"error: {message.removeprefix('argument ')} (--help lists all flags)\n")

    def _misspelt(self) -> str:
        """What flags that do not exist may have meant."""
        hints = []
        for text in self.given:
            name = text.partition("=")[0]
            if name.startswith("-") and name not in self._option_string_actions:
                meant = difflib.get_close_matches(name, self._option_string_actions, n=1)
                hints += [f"; for {name}, did you mean {flag}?" for flag in meant]
        return "".join(hints)


def command(main):
    """Run a command that is no training script: a mistake is one sentence, and `| head` ends it
    without one. A letter that the terminal lacks is written as an escape."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")


def parser(
    doc: str,
    out: str,
    lr: float,
    warmup: int = 20,
    eval_every: int = 100,
    save_every: int = 100,
    weight_decay: float = 0.0,
    model: str | None = "out/sft",
) -> Parser:
    """The flags of every script. doc: the script's docstring. The rest: its defaults."""
    parser = Parser(doc)
    add = parser.add_argument
    add("--model", default=model, required=model is None, help="folder of a Hugging Face model")
    add("--data", nargs="+", required=True, help="rows: JSONL, .jsonl.gz, .json lists or Parquet")
    add("--eval_data", nargs="+", help="held-out rows; default: --holdout rows of --data")
    add(
        "--holdout",
        type=at_least(0),
        default=100,
        help="rows of --data to hold out if --eval_data is not given",
    )
    add("--eval_rows", type=at_least(1), help="evaluate on the first held-out rows; default: all")
    add(
        "--rename",
        nargs="*",
        default=[],
        metavar="THEIRS=OURS",
        help="rename columns: question=prompt",
    )
    add(
        "--to_messages",
        action="store_true",
        help="put plain-text prompts and answers into the chat template, as messages",
    )
    add("--out", default=out, help="folder of the run, where the trained model is written")
    add("--chat_template", help="a Jinja file that replaces the model's own template")
    add("--seed", type=at_least(0), default=0)
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add(
        "--dry_run",
        action="store_true",
        help="check flags, data and model, say what memory and time a step takes, and stop before "
        "the first; --model needs no weights",
    )
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 on CUDA")
    add("--compile", action="store_true", help="torch.compile each block")
    add(
        "--checkpointing",
        default="none",
        choices=["none", "selective", "full"],
        help="recompute a block's activations in the backward pass: none of them, all but products "
        "of matrices, or all",
    )
    add(
        "--replicas",
        type=at_least(1),
        default=1,
        help="of the model, each sharded over its part of the ranks (HSDP): say, the nodes",
    )
    add("--offload", action="store_true", help="keep shards and moments in the CPU's memory")
    add(
        "--reduce",
        default="micro_batch",
        choices=["micro_batch", "step"],
        help="when ranks add up gradients; once a step is faster, and holds whole gradients",
    )
    add(
        "--reproducible",
        action="store_true",
        help="the same bytes on any number of ranks: see nanopost/reproducible.py",
    )
    add("--kernels", default="auto", choices=["auto", "torch"], help="auto: Triton on CUDA in bf16")
    add("--tokens", type=at_least(2), default=8192, help="maximum tokens per micro-batch")
    add("--lr", type=at_least(0.0), default=lr, help="peak learning rate")
    add(
        "--warmup",
        type=at_least(0),
        default=warmup,
        help="optimizer steps (PPO: rollout batches), at most half the run",
    )
    add("--weight_decay", type=at_least(0.0), default=weight_decay)
    add(
        "--lora",
        type=at_least(0),
        default=0,
        metavar="RANK",
        help="train adapters of this rank beside frozen weights, with about ten times the --lr; "
        "0: train all weights",
    )
    add("--lora_alpha", type=above(0.0), default=32.0, help="adapters are scaled by alpha / rank")
    add(
        "--lora_targets",
        nargs="+",
        metavar="LAYER",
        help="layers with adapters, such as q_proj v_proj; default: all linear ones of the blocks, "
        "which experts are not, but for a shared one",
    )
    add(
        "--quantize",
        default="none",
        choices=["none", "nf4"],
        help="nf4: with --lora, hold the matrices of the frozen blocks in 4 bits (QLoRA), but not "
        "their experts",
    )
    add("--rslora", action="store_true", help="scale by alpha / sqrt(rank), for large ranks")
    add("--grad_clip", type=at_least(0.0), default=1.0, help="maximum gradient norm; 0: no limit")
    add(
        "--eval_every",
        type=at_least(0),
        default=eval_every,
        help="steps between evaluations; 0: only before and after training",
    )
    add(
        "--save_every",
        type=at_least(0),
        default=save_every,
        help="steps between checkpoints; 0: by time alone",
    )
    add(
        "--save_minutes",
        type=at_least(0.0),
        default=15.0,
        help="minutes between checkpoints, where --save_every takes longer; 0: by steps alone",
    )
    add("--keep", type=at_least(1), default=2, help="checkpoints to keep")
    add(
        "--save_dtype",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="of the trained model's folder; auto: that of --model",
    )
    add("--record", action="store_true", help="write what each step was made of to --out/records")
    add(
        "--alarms",
        default="warn",
        choices=["warn", "stop", "off"],
        help="what a sick run does (nanopost/alarms.py): say it, or also save and stop",
    )
    add("--tensorboard", action="store_true", help="write the metrics to --out/tensorboard too")
    add(
        "--wandb",
        metavar="PROJECT",
        help="send the metrics to Weights & Biases too; WANDB_MODE=offline: write --out/wandb",
    )
    add("--resume", action="store_true", help="continue from the newest checkpoint in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    return parser


def run(args, world, show: list[str]) -> Run:
    """The run in --out. show: metrics for the printed line, the most important first."""
    boards = Boards(args.out, args.tensorboard, args.wandb)
    return Run(args.out, world, args.steps, vars(args), show, args.keep, args.alarms, boards)


def shard(args, world):
    """What hf.load_model applies to a model that will train: adapters, then dist.shard."""
    if args.reproducible and args.reduce == "step":
        raise InputError(
            "--reproducible adds up gradients by micro-batch: leave out --reduce step."
        )
    if args.reproducible and (world.dtype != torch.float32 or world.device.type != "cpu"):
        say("warning: --reproducible is tested with --device cpu --dtype fp32 alone")
    if args.reproducible and args.replicas > 1:
        raise InputError("--reproducible adds up shards, not replicas: leave out --replicas.")
    if world.size % args.replicas:
        raise InputError(
            f"--replicas {args.replicas} does not divide {world.size} ranks: give one that does."
        )
    if not args.lora:
        for name, given in [
            ("lora_alpha", args.lora_alpha != 32.0),
            ("lora_targets", args.lora_targets is not None),
            ("rslora", args.rslora),
            ("quantize", args.quantize != "none"),
        ]:
            if given:
                raise InputError(f"--{name} is about adapters: give their rank too, --lora RANK.")

    if args.lora and lora.is_adapter_folder(args.model):
        say(
            f"{args.model} is an adapter: new ones train on its merged model, which is no folder, "
            "so --out gets no adapter/: to have one, give the --out of the run that wrote this one"
        )

    def prepare(model):
        if args.lora:
            lora.apply(model, args.lora, args.lora_alpha, args.rslora, args.lora_targets, args.seed)
            if args.quantize == "nf4":
                lora.quantize(model)
            if world.dtype != torch.float32:
                lora.hold_in_stored_dtype(model)
        return _shard(args, world)(model)

    return prepare


def _shard(args, world):
    return partial(
        dist.shard,
        world=world,
        checkpointing=args.checkpointing,
        compile=args.compile,
        kernels=args.kernels,
        reduce=args.reduce,
        replicas=args.replicas,
        offload=args.offload,
    )


def reference(args, folder, model, world):
    """The frozen model in `folder`, with which `model` is compared. With --lora, where both are
    --model's, that is `model` itself with its adapters off."""
    if args.lora and Path(folder).resolve() == Path(args.model).resolve():
        return lora.Reference(model)
    found = hf.load_model(folder, world.device, shard=_shard(args, world))
    return found.requires_grad_(False)


def is_address(text: str) -> bool:
    """Whether it is a server's, and no folder."""
    return "//" in text or bool(re.fullmatch(r"[\w.-]+:\d+", text))


def teacher(args, model, world, tokenizer) -> Teacher | ServedTeacher:
    """The teacher that --teacher names, for the student `model`."""
    vocabulary, top_k = model.config.vocab_size, args.teacher_top_k
    if top_k >= vocabulary:
        raise InputError(
            f"--teacher_top_k {top_k} of {vocabulary:,} tokens leaves no rest: give less, or 0 for "
            "all of them."
        )
    if is_address(args.teacher[0]):
        if args.reproducible:
            raise InputError(
                "--reproducible needs a teacher in a folder: the numbers of a server depend on "
                "what it computes at the same time."
            )
        if not top_k:
            raise InputError(
                "--teacher URL needs --teacher_top_k: a server names its likeliest tokens alone."
            )
        if args.temperature != 1:
            raise InputError(
                f"--teacher URL needs --temperature 1, not {args.temperature:g}: a server gives "
                "log-probs at 1."
            )
        how = args.vllm_timeout, args.beta, top_k
        return ServedTeacher(args.teacher, tokenizer, vocabulary, *how)
    if len(args.teacher) > 1:
        raise InputError("--teacher takes one folder, or the addresses of servers.")
    (folder,) = args.teacher
    tokenizer.check_same(folder, "--teacher ", "take a teacher that has the same")
    found = hf.load_model(folder, world.device, shard=_shard(args, world))
    return Teacher(found, vocabulary, world.dtype, args.beta, top_k)


def engine(args, folder, model, world, tokenizer):
    """The engine that the flags ask for. model: the policy, loaded from `folder`, or an ActorCritic
    that holds it."""
    policy = getattr(model, "policy", model)
    policy.model.replays = True  # the experts that the engine names
    if args.replay:
        for start in starts_of(args.replay)[-1:]:
            changed = changed_arguments(start["args"], vars(args))
            if changed := [change for change in changed if not FREE.match(change)]:
                say(f"warning: --replay of a run with other flags: {'; '.join(changed)}")
        return Replay(args.replay, world)
    if dist.reproducible and (args.vllm or args.engine != "native" or args.max_staleness):
        raise InputError(
            "--reproducible samples with nanopost's own engine and the newest weights: leave out "
            "--vllm, --engine and --max_staleness, or --replay what they gave."
        )
    if args.vllm and args.engine != "native":
        raise InputError("--vllm and --engine colocate are two engines: give one of them.")
    if args.dry_run:
        return Engine.of(policy, tokenizer, shared=True)
    if args.vllm:
        audit = Audit(model, tokenizer, world, args.audit_every)
        return Servers(args.vllm, tokenizer, world, model.config, args.vllm_timeout, audit)
    if args.engine == "colocate":
        if args.max_staleness:
            raise InputError(
                "--engine colocate sleeps while the model trains: with --max_staleness above 0 "
                "sample on servers (--vllm), or with nanopost's own engine."
            )
        if policy.config.experts is not None:
            say(
                "warning: --engine colocate does not name the experts that its tokens took, so the "
                "trainer chooses its own (no router replay)"
            )
        folder = lora.base_folder(folder)  # of an adapter; the first sync brings the merged weights
        return Colocated(folder, tokenizer, world, model.config, args.vllm_memory, args.tokens)
    rows, tokens, ahead = args.engine_rows, args.engine_tokens, args.max_staleness > 0
    return Engine.beside(policy, folder, world, tokenizer, rows, tokens, ahead)


def ahead(args, engine, world, rows: list[dict], sampling, step: int) -> Ahead:
    """An engine as the loop uses it. rows: to train on. step: the one after which the run begins. A
    collective."""

    def request(indices, serials):
        prompts = [rows[i]["prompt_ids"] for i in indices]
        seeds = [prompt_seed(args.seed, serial) for serial in serials]
        return prompts, args.group, sampling, seeds

    return Ahead(
        engine,
        partial(packing.share, len(rows), args.seed, world=world),
        request,
        args.steps,
        args.prompts,
        staleness=0 if args.replay else args.max_staleness,
        recording=Recording(args.out, world, step) if args.record and not args.dry_run else None,
    )


def environment(
    args, tokenizer, positions: int, rows: list[dict], sides: int = 1, needs_reward: bool = True
) -> Callable:
    """How rollouts are made: f(engine, rows, n, sampling, seeds) -> groups of them, each with one
    answer, or with an episode of --env.

    Where --env has tools, `rows` get the column tools, and where it has a reward and there is no
    --reward, that is the reward. positions: of the model. sides: 2 if pairs are trained.
    needs_reward: without one there is nothing to learn.
    """
    if not args.env:
        if "environment" in args.reward:
            raise InputError("--reward environment needs an environment: --env file.py:Class.")
        for name, given in [
            ("max_turns", args.max_turns != 10),
            ("env_timeout", args.env_timeout != 60),
        ]:
            if given:
                raise InputError(f"--{name} is about an environment: give --env file.py:Class too.")
        return answer_once
    if args.stop:
        raise InputError(
            "--env needs answers that end with the token of the chat template: leave out --stop."
        )
    room = min(args.tokens // sides, args.engine_tokens, positions)
    found = Environments(args.env, tokenizer, args.max_turns, args.env_timeout, room)
    if "environment" in args.reward and not found.has_reward:
        raise InputError(f"--reward environment: {args.env} has no get_reward(): give another one.")
    if not args.reward and found.has_reward:
        say(f"the reward is that of --env {args.env} (--reward environment)")
        args.reward = ["environment"]
    if found.has_reward and "environment" not in args.reward:
        say(f"the reward of --env {args.env} is not used: --reward environment would add it")
    if needs_reward and not args.reward and not getattr(args, "judge", None):
        raise InputError(f"--env {args.env} has no get_reward(): give a --reward too.")
    for row in rows:
        if not isinstance(row["prompt"], list):
            raise InputError(
                f"{place(row)}: --env needs prompts that are messages: --to_messages makes them."
            )
        if found.schemas and row.get("tools"):
            raise InputError(
                f"{place(row)}: the row has tools, and so has --env, which knows only its own: "
                "remove the column."
            )
        if found.schemas:
            row["tools"] = found.schemas
    say(doubts(tokenizer.template, found.parse, found.schemas))
    return found.play


def sampling(args, kept: bool = True) -> Sampling:
    """How its flags say to sample in training. kept: the trainer renormalises over what the cut
    kept (see logprob.py), and so the engine has to name it."""
    cut = args.top_k, args.top_p, args.min_p
    return Sampling(args.max_new_tokens, args.temperature, *cut, tuple(args.stop), kept)


def add_cut_flags(parser: Parser):
    """The flags that cut the distribution to sample from: k, then p, then min-p of what is left
    (vLLM: min-p first)."""
    add = parser.add_argument
    add("--top_k", type=at_least(0), default=0, help="sample from the k likeliest; 0: all")
    add("--top_p", type=above(0.0, 1.0), default=1.0, help="sample from this share of the mass")
    add("--min_p", type=at_least(0.0, 1.0), default=0.0, help="least share of the likeliest's mass")


def add_rollout_flags(parser: Parser):
    """The flags of every script that samples completions and rewards them."""
    add = parser.add_argument
    add("--max_new_tokens", type=at_least(1), default=512, help="maximum completion length")
    add("--max_prompt", type=at_least(1), help="drop longer prompts (tokens); default: an error")
    add("--temperature", type=above(0.0), default=1.0, help="sampling temperature in training")
    add_cut_flags(parser)
    add("--stop", nargs="*", default=[], help="strings that end a completion")
    add(
        "--reward",
        nargs="+",
        default=[],
        help="exact, gsm8k, boxed, math_verify, code, format, environment, regex:PATTERN, "
        "length:MAX:BUFFER, model:FOLDER or file.py:function",
    )
    add("--reward_weights", type=finite, nargs="+", help="one per --reward; default: all 1")
    add(
        "--reward_timeout",
        type=at_least(0.0),
        default=0.0,
        help="seconds per call of a reward or judge; 0: no limit",
    )
    add(
        "--unsafe_code",
        action="store_true",
        help="--reward code without a sandbox: programs run with your rights, under limits alone",
    )
    add(
        "--env",
        metavar="file.py:Class",
        help="an environment, or tools: what replies to answers (nanopost/environment.py); "
        "--max_new_tokens is then for each answer",
    )
    add("--max_turns", type=at_least(1), default=10, help="maximum answers in an episode of --env")
    add(
        "--env_timeout",
        type=above(0.0),
        default=60.0,
        help="seconds that a call of a method of --env may take",
    )
    add(
        "--max_staleness",
        type=at_least(0),
        default=0,
        help="steps by which rollouts may run ahead, in a thread; 0: none do. GRPO: advised with "
        "--old_logp trainer --correct token-truncate (or token-mask), or --old_logp engine; PPO: "
        "--old_logp engine",
    )
    add("--replay", metavar="OUT", help="take the rollouts of the run in OUT, one with --record")
    add_engine_flags(parser)


def add_engine_flags(parser: Parser):
    """What samples: see `engine`."""
    parser.set_defaults(replay=None, max_staleness=0, dry_run=False)  # flags of a run alone
    add = parser.add_argument
    add(
        "--engine",
        default="native",
        choices=["native", "colocate"],
        help="what samples: nanopost's own engine, or vLLM inside each process of the run",
    )
    add("--engine_rows", type=at_least(1), default=512, help="completions sampled at once per rank")
    add(
        "--engine_tokens",
        type=at_least(1),
        default=2**18,
        help="tokens in the cache at once per rank: lower it if sampling runs out of memory",
    )
    add("--vllm", nargs="+", metavar="URL", help="vLLM servers that sample: nanopost/vllm.py")
    add(
        "--vllm_timeout",
        type=above(0.0),
        default=600.0,
        help="seconds that a request to a server may take",
    )
    add(
        "--vllm_memory",
        type=above(0.0, 1.0),
        default=0.3,
        help="share of the GPU's memory for vLLM under --engine colocate",
    )
    add(
        "--audit_every",
        type=at_least(0),
        default=1,
        help="syncs between audits of the servers (nanopost/audit.py); 0: none",
    )


def add_pair_flags(parser: Parser):
    """The flags of every script that trains on stored pairs of answers."""
    add = parser.add_argument
    add("--epochs", type=above(0.0), default=1.0, help="passes over the data")
    add("--steps", type=at_least(1), help="optimizer steps; overrides --epochs")
    add("--rows", type=at_least(1), default=64, help="pairs per optimizer step, over all ranks")
    add(
        "--max_length",
        type=at_least(2),
        help="maximum tokens of prompt and answer; default: half --tokens",
    )
    add(
        "--overlong",
        default="truncate",
        choices=["truncate", "drop"],
        help="what to do with longer answers",
    )


def add_reference_flags(parser: Parser):
    """The flags of scripts that compare stored answers with a reference model."""
    add = parser.add_argument
    add(
        "--reference",
        default="frozen",
        choices=["frozen", "precomputed"],
        help="its log-probs: computed for each step, or for all pairs at once and cached",
    )
    add("--reference_model", help="folder of the reference; default: --model")
    add("--cache", default="out/cache", help="folder of precomputed log-probs")


def load_rewards(args, tokenizer, world):
    """The rewards that the flags ask for, and their weights: rewards.load."""
    return rewards.load(
        args.reward,
        args.reward_weights,
        tokenizer,
        world,
        args.tokens,
        args.reward_timeout,
        isolated=not args.unsafe_code,
    )


def check_one_each(flag: str, given: list | None, of: str, expected: list):
    """InputError unless --flag has one value for each value of the flag --`of`."""
    if given is not None and len(given) != len(expected):
        raise InputError(
            f"--{flag} has {len(given)} values for {len(expected)} --{of}: give one each."
        )


def check_divides(name: str, value: int, **parts: int):
    """InputError if --name does not divide into, say, 2 ranks x 3 minibatches; it names the nearest
    numbers that would."""
    unit = math.prod(parts.values())
    if value % unit:
        below = value // unit * unit
        fits = " or ".join(str(n) for n in (below, below + unit) if n)
        into = " x ".join(f"{n} {part}" for part, n in parts.items())
        raise InputError(f"--{name} {value} does not divide into {into}: {fits} would.")
