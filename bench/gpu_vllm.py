"""GRPO on vLLM: are engine and trainer one policy, and what does it take? Writes
bench/results/vllm_*.json.

    python -m bench.gpu_vllm colocate         # GPUs: vLLM in each process, asleep while it trains
    python -m bench.gpu_vllm servers          # two GPUs or more: a server on the last, over NCCL
    python -m bench.gpu_vllm servers --try    # a CPU, a tiny model, writes nothing: does it work?

Three steps of a random Qwen2.5-1.5B, then the same by nanopost's own engine. Needs vLLM in the
environment that runs it.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch

from bench import common
from bench.train_step import REWARD, shape, write_inputs

GAP = "sampling/sampling_logp_difference"
TIMES = ("time/rollout", "time/train", "time/sync", "time/step")
PORT = 8437


def serve(folder: Path, gpu: str | None, log: Path) -> subprocess.Popen:
    """A server on one GPU (None: a CPU), ready."""
    visible = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    command = [sys.executable, "-m", "nanopost.vllm_worker", "--model", folder, "--port", PORT]
    command += ["--max-model-len", 4096 if gpu else 512]
    with open(log, "w") as file:
        process = subprocess.Popen(
            [str(x) for x in command],
            cwd=common.ROOT,
            env=os.environ | common.OFFLINE | visible,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5).close()
            return process
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"the server ended:\n{log.read_text()[-3000:]}")


def train(folder: Path, gpus: int, tiny: bool, *engine) -> list[dict]:
    """The metrics of three steps of GRPO."""
    flags = common.flags(
        model=folder / "model",
        data=folder / "prompts.jsonl",
        reward=REWARD,
        out=folder / "out",
        overwrite=True,
        steps=3,
        prompts=4 if tiny else 32,
        group=8,
        max_new_tokens=16 if tiny else 512,
        max_prompt=200 if tiny else 2000,
        tokens=512 if tiny else 8192,
        lr=1e-4,
        warmup=0,
        holdout=2,
        eval_every=0,
        device="cpu" if tiny else "cuda",
        max_logp_gap=1.0,
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", max(1, gpus)]
    done = common.run(
        [*launch, "train_grpo.py", *flags, *engine],
        env=os.environ | common.OFFLINE,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-3000:])
    return common.metrics(folder / "out")[1:]


def main():
    parser = common.parser(__doc__)
    parser.add_argument("part", choices=["colocate", "servers"])
    parser.add_argument("--try", action="store_true", dest="tiny", help="write no results")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder")
    args = parser.parse_args()
    gpus = 0 if args.tiny else torch.cuda.device_count()
    device = "cpu" if args.tiny else torch.cuda.get_device_name()
    result = {"device": device, "gpus": gpus, **common.origin("torch", "triton", "vllm")}
    with tempfile.TemporaryDirectory() as temporary:
        folder, server, engine = Path(temporary), None, ("--engine", "colocate")
        write_inputs(folder, shape(args.tiny), 200 if args.tiny else 4000)
        if args.part == "servers":
            gpus -= not args.tiny
            server = serve(folder / "model", str(gpus) if gpus else None, folder / "server.log")
            engine = ("--vllm", f"http://127.0.0.1:{PORT}")
        try:
            for name, flags in ((args.part, engine), ("native", ())):
                lines = train(folder, gpus, args.tiny, *flags)
                found = {f"{GAP}/max": max(line[f"{GAP}/max"] for line in lines)}
                found |= {key: lines[-1][key] for key in (f"{GAP}/mean", *TIMES)}
                result[name] = found
                print(name, found, flush=True)
        except RuntimeError:
            if server is not None:
                print((folder / "server.log").read_text()[-3000:])
            raise
        finally:
            if server is not None:
                os.killpg(server.pid, signal.SIGKILL)
    if not args.tiny:
        common.save(args.out / f"vllm_{args.part}.json", result)


if __name__ == "__main__":
    main()
