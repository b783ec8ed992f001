"""Run python command lines in forks of a process that has already imported torch, which takes
seconds. It has imported nothing of nanopost, so a script finds the library of its own folder. Each
run has its own environment, folder, streams and exit status, as a subprocess has. Forks share one
hash seed: the order of sets differs between ranks only where torchrun starts them (test_scripts.py,
kills.py).
"""

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")
IMPORTED = ["torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"]
IMPORTED += ["sympy", "safetensors.torch", "tokenizers", "jinja2"]
FORKS.set_forkserver_preload(IMPORTED)
STARTED = weakref.WeakSet()  # processes


@atexit.register
def kill_all():
    """Python would wait for what a failed test has left running."""
    for process in STARTED:
        if process.is_alive():
            process.kill()


def run(command, env, cwd=ROOT, ranks=0, timeout=300) -> subprocess.CompletedProcess:
    """command: what follows `python`: a script, or -m and a module, and arguments. ranks: as many
    processes as torchrun would start; 0: one, outside of torchrun.

    subprocess.TimeoutExpired after so many seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        environments = [{**env, **more} for more in (ranks_of(ranks) if ranks else [{}])]
        processes = [start(python, out, err, command, e, cwd) for e in environments]
        status = finished(processes, timeout)
        said = out.read_text(errors="replace"), err.read_text(errors="replace")
    if status is None:
        raise subprocess.TimeoutExpired(command, timeout, *said)
    return subprocess.CompletedProcess(command, status, *said)


def ranks_of(count) -> list[dict[str, str]]:
    """What torchrun adds to the environment of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    each = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    return [{key: str(value) for key, value in more.items()} for more in each]


def start(function, out, err, *arguments):
    """Call a function in a fork, whose streams are appended to two files -> the process."""
    for path in (out, err):
        Path(path).touch()
    process = FORKS.Process(target=_fork, args=(function, out, err, *arguments))
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):  # of the server
        process.start()
    STARTED.add(process)
    return process


def finished(processes, timeout) -> int | None:
    """The exit status of the first to fail, with which the others are killed, or 0; None if they
    have not ended after so many seconds, and are killed."""
    deadline, running = time.monotonic() + timeout, list(processes)
    while running:
        wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic()))
        running = [process for process in running if process.is_alive()]
        failed = [process.exitcode for process in processes if process.exitcode]
        late = running and time.monotonic() > deadline
        if failed or late:
            for process in running:  # they would wait for the one that failed
                process.kill()
                process.join()
            return failed[0] if failed else None
    return 0


def _fork(function, out, err, *arguments):
    """Ends as python does: with what SystemExit says, or after the excepthook with 1."""
    for number, path in enumerate((out, err), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    np.random.seed()  # random is seeded anew by itself
    try:
        function(*arguments)
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


def python(command, env, cwd=ROOT):
    """What `python` does with a command line, in a fork: see run."""
    command = [str(word) for word in command]
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    is_module = command[0] == "-m"
    first = str(cwd) if is_module else str(Path(command[0]).resolve().parent)
    added = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first, *added, *(path for path in sys.path if not _is_ours(path))]
    if is_module:
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


def _is_ours(path) -> bool:
    """Whether the tests added a folder to where modules are looked for."""
    inside = Path(path).resolve()
    return inside.is_relative_to(ROOT) and "site-packages" not in inside.parts
