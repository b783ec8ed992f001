"""Runs a training script in float64: rounding is then far below any fault that a twin looks for.

The library is imported anew from its source, with float64 written wherever it says float32.
"""

import os
import re
import runpy
import sys
from contextlib import contextmanager
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path

import forked
import torch


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


# ------------------------------------------------------------------------------------------ ranks
def run_ranks(ranks, script, arguments, log, stop=0, timeout=300, run=run_script):
    """Run a script on `ranks` processes. log: the file for what they print. RuntimeError if one
    fails, or if not all have ended after so many seconds: ranks that wait for each other.

    run: run(script, arguments, stop), with which a process runs it.
    """
    arguments = [str(x) for x in arguments]
    processes = [
        forked.start(_rank, log, log, environment, str(script), arguments, stop, run)
        for environment in forked.ranks_of(ranks)
    ]
    if forked.finished(processes, timeout) != 0:
        raise RuntimeError(Path(log).read_text()[-6000:])


def _rank(environment, script, arguments, stop, run):
    os.environ |= environment
    torch.set_num_threads(1)
    try:
        run(script, arguments, stop)  # several ranks exit with 0 where it ends
    except Stopped:
        pass
