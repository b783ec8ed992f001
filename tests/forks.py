"""Forks applied to a copy of the scripts, and parts of a patched script that run by themselves."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import textwrap
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "forks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.diff"))


# ------------------------------------------------------------------------------ what a fork says
def text(name: str) -> str:
    return (FOLDER / f"{name}.diff").read_text()


def header(name: str) -> str:
    """What stands above the diff."""
    return text(name).split("\n--- a/")[0]


def files(name: str) -> list[str]:
    """The files that a fork changes."""
    return re.findall(r"^\+\+\+ b/(\S+)", text(name), re.MULTILINE)


def script_of(name: str) -> str:
    """The script that a fork changes, or that its header runs if it changes none."""
    found = [file for file in files(name) if file.startswith("train_")]
    found = found or re.findall(r"^ +python (train_\w+\.py)", header(name), re.MULTILINE)
    (script,) = found
    return script


def flags_of(name: str) -> list[str]:
    """The flags of the command line in a fork's header."""
    joined = header(name).replace("\\\n", " ")
    (command,) = re.findall(rf"^ +python {script_of(name)} (.*)", joined, re.MULTILINE)
    return shlex.split(command)


def rows_of(name: str) -> list[dict]:
    """The rows that a fork's header shows, each at the start of a line."""
    lines = [line.strip() for line in header(name).splitlines()]
    return [json.JSONDecoder().raw_decode(line)[0] for line in lines if line.startswith("{")]


# ---------------------------------------------------------------------------------- applying forks
def patched(tmp: Path, *names: str) -> Path:
    """Copy the scripts and the library to a new folder in `tmp`, and apply forks -> the folder."""
    folder = Path(tmp) / "+".join(["scripts", *names])
    for part in ("nanopost", "kernels"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("train_*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, folder)
    for name in names:
        done = apply(folder, name)
        assert done.returncode == 0, f"{names}: {done.stderr}"
    return folder


def apply(folder: Path, name: str) -> subprocess.CompletedProcess:
    """git apply, which has no fuzz; its stderr names hunks that it found at another line."""
    return subprocess.run(
        ["git", "apply", "--verbose", str(FOLDER / f"{name}.diff")],
        cwd=folder,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent), "LC_ALL": "C"},
        capture_output=True,
        text=True,
    )


# ------------------------------------------------------------------------- parts of patched scripts
@lru_cache
def patched_source(script: str, *names: str) -> str:
    """A script with forks applied, as text."""
    with tempfile.TemporaryDirectory() as tmp:
        return (patched(Path(tmp), *names) / script).read_text()


def function_of(name: str, script: str, function: str):
    """A function of a script with a fork applied; the script is not run.

    What else of the script the function reads goes into its __globals__.
    """
    tree = ast.parse(patched_source(script, name))
    (found,) = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == function]
    names = imports_of(tree)
    exec(compile(ast.Module([found], []), script, "exec"), names)
    return names[function]


def run_lines(source: str, first: str, last: str, **variables) -> dict:
    """Run the lines of a script from the one that holds `first` up to the one that holds `last`,
    without it -> the variables afterwards. Its imports are there; `variables` go first."""
    lines = source.splitlines(keepends=True)
    (start,) = [i for i, line in enumerate(lines) if first in line]
    stop = next(i for i, line in enumerate(lines) if i > start and last in line)
    names = imports_of(ast.parse(source)) | variables
    exec(textwrap.dedent("".join(lines[start:stop])), names)
    return names


def imports_of(tree: ast.Module) -> dict:
    names = {}
    imports = [x for x in tree.body if isinstance(x, (ast.Import, ast.ImportFrom))]
    exec(compile(ast.Module(imports, []), "imports", "exec"), names)
    return names
