"""Running a training script in the test's own process: no imports to wait for, and its calls can be
watched. Ranks, kills and exit codes need scripts.py."""

import runpy
import sys

import torch
from scripts import ROOT


def run_here(script, *arguments):
    """A person's mistakes are InputErrors, or SystemExit where argparse finds them."""
    hook, argv = sys.excepthook, sys.argv
    sys.argv = [script, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.excepthook, sys.argv = hook, argv
        torch.set_flush_denormal(False)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
