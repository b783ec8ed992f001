"""Runs a training script in float64: rounding is then far below any fault that a twin looks for.

The library is imported anew from its source, with float64 written wherever it says float32.

    python tests/twins/double.py RANKS STOP SCRIPT FLAGS...

STOP: stop after the checkpoint of this step, then resume in new processes; 0: run through.
"""

import os
import re
import runpy
import signal
import socket
import sys
import traceback
from contextlib import contextmanager
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path

import torch
import torch.distributed.checkpoint  # noqa: F401  before forks, so that it is imported once
import torch.distributed.fsdp  # noqa: F401


class Stopped(BaseException):
    """The run was stopped after a step, as by a kill."""


class Loader(SourceFileLoader):
    """Compiles a module's source with every float32 made a float64."""

    def get_code(self, fullname):
        source = self.get_source(fullname)
        source = re.sub(r"\b(torch|np)\.float(32)?\b", r"\1.float64", source)
        source = source.replace(".float()", ".double()")
        return compile(source, self.path, "exec", dont_inherit=True)


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] != "nanopost":
            return None
        spec = PathFinder.find_spec(name, path)
        spec.loader = Loader(name, spec.origin)
        return spec


def own(name):
    return name.split(".")[0] in ("nanopost", "kernels")


@contextmanager
def float64(folder):
    """Inside, nanopost is the one of `folder`, in float64. Outside, all is as before."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if own(name)}
    sys.meta_path.insert(0, Finder)
    sys.path.insert(0, str(folder))
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        sys.path.remove(str(folder))
        sys.meta_path.remove(Finder)
        for name in [name for name in sys.modules if own(name)]:
            del sys.modules[name]
        sys.modules.update(kept)


def run_script(script, arguments, stop=0):
    """Run a script in this process. stop: raise Stopped once the checkpoint of this step is there.
    Its InputErrors are of its own copy of the library."""
    hook, argv = sys.excepthook, sys.argv
    sys.argv = [str(script), *map(str, arguments)]
    try:
        with float64(Path(script).resolve().parent):
            if stop:
                _stop_after(stop)
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.excepthook, sys.argv = hook, argv
        torch.set_flush_denormal(False)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _stop_after(stop):
    from nanopost import checkpoint

    save = checkpoint.save

    def save_and_stop(out, step, *rest, **others):
        save(out, step, *rest, **others)
        if step == stop:
            raise Stopped

    checkpoint.save = save_and_stop


def run_ranks(ranks, script, arguments, stop) -> int:
    """Run a script in `ranks` forks of this process -> 0, or the first exit status that is not."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    running = set()
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            status = 1
            try:
                run_script(script, arguments, stop)  # exits with 0 if it ends
            except Stopped:
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        running.add(child)
    first = 0
    while running:
        child, status = os.wait()
        running.discard(child)
        if status and not first:
            first = os.waitstatus_to_exitcode(status)
            for other in running:
                os.kill(other, signal.SIGKILL)
    return first


if __name__ == "__main__":
    ranks, stop, script, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    status = run_ranks(int(ranks), script, arguments, int(stop))
    if int(stop) and not status:
        status = run_ranks(int(ranks), script, [*arguments, "--resume"], 0)
    sys.exit(status)
