"""Running a training script in the test's own process: no imports to wait for, and its calls can be
watched. Ranks, kills and exit codes need scripts.py."""

import runpy
import signal
import sys

import torch
from scripts import ROOT

from nanopost import dist


def run_here(script, *arguments):
    """A person's mistakes are InputErrors, or SystemExit where argparse finds them."""
    hook, argv = sys.excepthook, sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [script, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.excepthook, sys.argv = hook, argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
        dist.last_words = None
        dist.reproducible = False
        torch.set_flush_denormal(False)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
