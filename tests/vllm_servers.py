"""Real vLLM servers for tests: a CPU engine in an environment of its own.

NANOPOST_VLLM_PYTHON names the python of an environment that has vLLM; without it that of the tests
is taken if it has vLLM itself. Tests that need a server skip where there is none, saying so.
"""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from nanopost.config import Config
from nanopost.model import CausalLM
from nanopost.save import save_model
from runs import toy

ROOT = Path(__file__).resolve().parents[1]
INSIDE = importlib.util.find_spec("vllm") is not None
PYTHON = os.environ.get("NANOPOST_VLLM_PYTHON") or (sys.executable if INSIDE else None)
needed = pytest.mark.skipif(
    PYTHON is None, reason="no vLLM: NANOPOST_VLLM_PYTHON names no environment that has it"
)
SECONDS = 240  # to start, on a busy machine


def write_model(folder, seed: int = 0, tied: bool = True):
    """A small model whose heads a vLLM CPU kernel takes: Qwen3 (norms of q and k) with a tied head,
    or Qwen2 (biases) with a head of its own. The toy's tokenizer."""
    config = {
        "architectures": ["Qwen3ForCausalLM" if tied else "Qwen2ForCausalLM"],
        "model_type": "qwen3" if tied else "qwen2",
        "hidden_act": "silu",
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "attention_bias": not tied,
        "initializer_range": 0.15,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    if not tied:
        config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Config.of(config)
    model = CausalLM(config).init_weights(seed)
    save_model(folder, model.state_dict().items(), config, toy.tokenizer_files())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(folder, port: int, *flags, log) -> subprocess.Popen:
    """Start a server; it is not ready yet. It and its workers are one process group."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [PYTHON, "-m", "nanopost.vllm_worker", "--model", folder, "--port", port]
    command += ["--max-model-len", 256, *flags]
    with open(log, "w") as file:
        return subprocess.Popen(
            [str(x) for x in command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait(process: subprocess.Popen, port: int, log):
    """Until the server answers; an error with its last words if it ends."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended:\n{Path(log).read_text()[-3000:]}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/weight_info", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"no server after {SECONDS} s:\n{Path(log).read_text()[-3000:]}")


def stop(process: subprocess.Popen):
    """Kill it and its workers."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@contextmanager
def servers(folder, log_folder, count: int = 1, flags=()):
    """-> the addresses of that many servers of one model, started at once."""
    running = []
    try:
        for i in range(count):
            port, log = free_port(), Path(log_folder) / f"server{i}.log"
            running.append((launch(folder, port, *flags, log=log), port, log))
        for process, port, log in running:
            wait(process, port, log)
        yield [f"http://127.0.0.1:{port}" for _, port, _ in running]
    finally:
        for process, _, _ in running:
            stop(process)
