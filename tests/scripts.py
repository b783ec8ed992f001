"""Running the training scripts as a person does, by their command lines, in forks (forked.py)."""

import json
import os
import runpy
import sys
from pathlib import Path

import forked

from nanopost import cli

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.name for path in ROOT.glob("train_*.py"))
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def command(script, *arguments, ranks=0):
    start = [*TORCHRUN, str(ranks)] if ranks else [sys.executable]
    return [*start, str(ROOT / script), *map(str, arguments)]


def run(script, *arguments, ranks=0, ok=True, timeout=300):
    """-> CompletedProcess; with ok, its success is asserted."""
    done = forked.run([ROOT / script, *arguments], ENVIRONMENT, ranks=ranks, timeout=timeout)
    assert not ok or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def metrics(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def weights(out) -> bytes:
    return (Path(out) / "model.safetensors").read_bytes()


def parser_of(script) -> cli.Parser:
    """The parser that a script builds. Nothing after its arguments runs."""
    found = []

    def stop(parser, *_):
        found.append(parser)
        raise SystemExit

    parse_args, cli.Parser.parse_args = cli.Parser.parse_args, stop
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit:
        pass
    finally:
        cli.Parser.parse_args = parse_args
    (parser,) = found
    return parser
