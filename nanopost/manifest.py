"""What run.json says about a start of a run: enough to start the same run again, and to see what
was different if it ends differently."""

import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from nanopost import InputError, hf, lora

PACKAGES = ("numpy", "safetensors", "tokenizers", "triton", "vllm")
LARGEST_DIFF = 2**20  # bytes; a larger one is more than changes to code
# A patch for git apply, whatever the user's settings.
DIFF = ("-c", "color.ui=false", "diff", "--binary", "--no-ext-diff", "--no-textconv")
DIFF += ("--src-prefix=a/", "--dst-prefix=b/")


def manifest(arguments: dict) -> dict:
    """The command, the code, versions and hardware of this process. arguments: all flags."""
    return {
        "command": " ".join(sys.argv),
        "again": launch_command(),
        "git": _git("describe", "--always", "--dirty").strip() or None,
        "diff": code_changes(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "versions": versions(),
        "hardware": hardware(),
        "ranks": torch.distributed.get_world_size(),
        "threads": torch.get_num_threads(),  # of each rank: the last digits depend on it
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "args": arguments,
    }


def launch_command() -> str:
    """A line for a shell that starts this process and its ranks again, with as many threads."""
    words = [sys.executable]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        nodes = os.environ.get("GROUP_WORLD_SIZE", "1")
        where = ["--standalone"]
        if nodes != "1":
            where = ["--nnodes", nodes, "--rdzv_endpoint", "HOST:PORT"]
        words = ["torchrun", *where, "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"]]
    words += sys.argv
    threads = f"OMP_NUM_THREADS={torch.get_num_threads()}"
    return f"cd {shlex.quote(os.getcwd())} && {threads} {shlex.join(words)}"


def code_changes() -> str:
    """What is in the working tree beyond the commit, as a patch for git apply: changed files, and
    the script that runs, if git does not know it. "" without git. Bytes that are not UTF-8 are
    surrogates (errors="surrogateescape")."""
    diff = _git(*DIFF, "HEAD")
    script = Path(sys.argv[0])
    if script.suffix == ".py" and not _git("ls-files", "--", str(script.resolve())):
        diff += _git(*DIFF, "--no-index", os.devnull, str(script.resolve()))
    if len(diff) > LARGEST_DIFF:
        return f"left out: {len(diff):,} characters"
    return diff


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict:
    found = {"node": platform.node(), "cpus": os.cpu_count(), "machine": platform.machine()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpus"] = torch.cuda.device_count()
    return found


def named_files(arguments: dict) -> list[str]:
    """The files and folders that flags name, whatever the flag."""
    return [text for text in texts(arguments.values()) if os.path.exists(text)]


def texts(values) -> list[str]:
    """Strings and paths among the values of flags, those in lists too, without "model:" and, after
    a file, ":function"."""
    flat = []
    for value in values:
        flat += value if isinstance(value, (list, tuple)) else [value]
    named = [str(value) for value in flat if isinstance(value, (str, Path))]
    named = [text.removeprefix("model:") for text in named if text]
    return [text.partition(".py:")[0] + ".py" if ".py:" in text else text for text in named]


def file_hashes(arguments: dict) -> dict[str, str]:
    """{file that a flag names: SHA-256 of its content}."""
    hashes = {}
    for text in named_files(arguments):
        if os.path.isfile(text):
            with open(text, "rb") as file:
                hashes[text] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def model_hashes(arguments: dict, out, known: dict[str, str]) -> dict[str, str]:
    """{folder of a model that a flag names: hash of its config and weights}. Takes about a second
    per GB. out: the run's own folder, which it writes. known: such hashes."""
    hashes = {}
    for text in named_files(arguments):
        is_model = any(Path(text, name).is_file() for name in ("config.json", lora.CONFIG))
        if not is_model or Path(text).resolve() == Path(out).resolve():
            continue
        try:
            hashes[text] = known.get(text) or hf.content_hash(text)
        except (InputError, OSError) as error:
            hashes[text] = f"unknown: {error}"
    return hashes


def _git(*words) -> str:
    try:
        done = subprocess.run(
            ["git", *words],
            cwd=Path(__file__).parent,
            capture_output=True,
        )
    except OSError:  # no git here
        return ""
    return done.stdout.decode(errors="surrogateescape")  # bytes: text would change line ends
