"""Time and memory of a forward and backward pass with a shared prompt computed once, and with whole
sequences -> bench/results/DEVICE_prefixes.json.

    python -m bench.prefixes            # anywhere; on a GPU in bf16, a model of 1.5B shape
    python -m bench.prefixes --try      # tiny: does the script work?

Groups of eight completions and pairs of two, at prompt : completion 1 : 4, 1 : 1 and 4 : 1, in
micro-batches of as many tokens. Both ways take turns in one process, medians count; for memory each
way has a process of its own.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import common
from nanopost import batch, dist, forward
from nanopost.batch import Example
from nanopost.config import Config
from nanopost.model import CausalLM

CASES = [(size, ratio) for size in (8, 2) for ratio in ((1, 4), (1, 1), (4, 1))]
LARGE = {  # Qwen2.5-1.5B
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def examples(size: int, prompt: int, completion: int, count: int) -> list[Example]:
    """`count` groups of `size` random completions of one prompt."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        start = torch.randint(4096, (prompt,), generator=draw)
        for _ in range(size):
            ids = torch.cat([start, torch.randint(4096, (completion,), generator=draw)])
            made.append(Example(ids.numpy(), torch.arange(len(ids)).numpy() >= prompt))
    return made


def step(model, made, tokens, device) -> float:
    """-> seconds of a forward and backward pass over all examples."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for b in forward.batches(model, made, tokens, device):
        logp_N, _ = model(b)
        logp_N.sum().backward()
    model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(case: dict) -> dict:
    """One case in this process -> seconds of both ways; or with case["only"], the MiB that this way
    needs beside the weights."""
    world = dist.init("auto", "auto", 0)
    gpu = world.device.type == "cuda"
    config = Config.of(LARGE if gpu and not case["tiny"] else common.SMALL)
    model = CausalLM(config).init_weights(0).to(world.device, world.dtype)
    length = 2048 if gpu else 512
    if case["tiny"]:
        length = 40
    prompt = length * case["prompt"] // (case["prompt"] + case["completion"])
    made = examples(case["size"], prompt, length - prompt, 32 // case["size"])
    ways = {"whole": 2.0, "shared": batch.SHARED}  # a sequence never shares twice its length
    seconds = {way: [] for way in ways}
    before = memory(gpu)
    for _ in range(case["rounds"] + 1):
        for way in [case["only"]] if case["only"] else ways:
            batch.SHARED = ways[way]
            seconds[way].append(step(model, made, 8 * length, world.device))
    if case["only"]:
        return {"MiB": memory(gpu) - before}
    return {way: statistics.median(times[1:]) for way, times in seconds.items()}


def memory(gpu: bool) -> float:
    """The peak so far, in MiB."""
    if gpu:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main():
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--try", dest="tiny", action="store_true")
    parser.add_argument("--out", default=common.RESULTS, type=Path, help="folder")
    parser.add_argument("--case", type=json.loads, help="used by the script itself")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case)))
        return
    table = []
    for size, (prompt, completion) in CASES[:1] if args.tiny else CASES:
        case = {"size": size, "prompt": prompt, "completion": completion, "tiny": args.tiny}
        found = child({**case, "only": "", "rounds": args.rounds})
        for way in ("whole", "shared"):
            found[f"{way}_MiB"] = child({**case, "only": way, "rounds": 1})["MiB"]
        time_ratio = found["shared"] / found["whole"]
        memory_ratio = found["shared_MiB"] / found["whole_MiB"]
        print(
            f"{size} completions, {prompt} : {completion}: time {time_ratio:.2f}, memory "
            f"{memory_ratio:.2f} of whole sequences",
            flush=True,
        )
        table.append({**case, **found, "time": time_ratio, "memory": memory_ratio})
    if not args.tiny:
        device = "gpu" if torch.cuda.is_available() else "cpu"
        result = {**common.origin("torch"), "cases": table}
        common.save(args.out / f"{device}_prefixes.json", result)


def child(case: dict) -> dict:
    command = [sys.executable, "-m", "bench.prefixes", "--case", json.dumps(case)]
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=common.ROOT)
    return json.loads(found.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
