"""What all measurements share: command lines, runs of the scripts, and where a result comes from.

It imports the standard library alone: side_by_side.py measures the memory of its children, which
begin with their parent's.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
# The model of benches on a CPU, as a config.json.
SMALL = {
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def parser(doc: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def flags(**values) -> list[str]:
    """lr=1e-3, clip=(0.2, 0.3), packing=True -> ["--lr", "0.001", "--clip", "0.2", "0.3",
    "--packing"]. None and False leave a flag out."""
    words = []
    for name, value in values.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if isinstance(value, (list, tuple)):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words


def run(command, **options) -> subprocess.CompletedProcess:
    """Run python with this command line, from the root of the repository unless options say more.

    options: of subprocess.run. An exit status other than 0 raises.
    """
    defaults = {"cwd": ROOT, "env": os.environ | OFFLINE, "check": True}
    return subprocess.run([sys.executable, *map(str, command)], **(defaults | options))


def metrics(out) -> list[dict]:
    """The lines that a run logged in its folder; the first is of step 0."""
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def origin(*packages: str) -> dict:
    """Versions of python and of packages, the date and the commit, to be stored with a result."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    date = time.strftime("%Y-%m-%d")
    return {"versions": versions, "date": date, "commit": done.stdout.strip()}


def save(path, result: dict):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(result, indent=1) + "\n")
