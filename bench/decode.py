"""Where the time of a sampled token goes, in the native engine -> bench/results/decode.json.

    python -m bench.decode                      # tokens/s on a CPU, and the share of each part
    python -m bench.decode --trees . ../main    # two checkouts in turns, and the ratio of times
    python -m bench.decode --try                # one short round: does the script work?

toy      512 rollouts of up to 8 tokens of the toy's model (runs/toy.py), random
equal    64 rollouts of 128 tokens of side_by_side.py's model, 8 of each prompt
ragged   the same, of up to 128 tokens
queue    the same, 16 at once
smol     16 rollouts of 32 tokens of a SmolLM2-135M shape
large    on a GPU, in bf16, where it is the only one by default: 64 rollouts of 512 tokens of a
         Qwen2.5-1.5B shape; instead of shares, what CUDA graphs save. Writes gpu_decode.json

Each tree has a process for each work, and all take turns: one call to generate at a time, --rounds
times, because a machine's speed drifts. Shares are of another call, in which the parts are timed.
The ratio is the median of the rounds; on one thread there is also that of the least times of the
processor, which others on the machine disturb less.
"""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

WORK = ["toy", "equal", "ragged", "queue", "smol", "large"]


# -------------------------------------------------------------------------------- a tree's process
def shape(vocab, width, mlp, layers, heads, kv_heads, positions=2048) -> dict:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width // heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": True,
    }


def job(work: str, tiny: bool):
    """-> an engine, prompts, samples of each, tokens of each at most."""
    import torch

    from nanopost.config import Config
    from nanopost.engine import Engine
    from nanopost.model import CausalLM

    draw = random.Random(0)
    stops, rows, count, n = [], 512, 8, 8
    if work == "toy":
        sizes, lengths, count, tokens = (264, 128, 384, 4, 4, 2), (9, 9), 64, 8
        stops = draw.sample(range(264), 20)
    elif work == "smol":
        sizes, lengths, count, tokens = (49152, 576, 1536, 30, 9, 3), (30, 60), 2, 32
    elif work == "large":
        sizes, lengths, tokens = (151_936, 1536, 8960, 28, 12, 2), (256, 256), 512
    else:
        sizes, lengths, tokens = (4097, 256, 768, 4, 8, 4), (16, 80), 128
    if work in ("ragged", "queue"):
        stops = draw.sample(range(300, 4096), 48)
    if work == "queue":
        rows = 16
    if tiny:
        sizes, count, n, tokens = (sizes[0] // 8, 64, 96, 2, 4, 2), 2, 2, 4
    device, dtype = "cpu", torch.float32
    if torch.cuda.is_available():
        device, dtype = "cuda", torch.bfloat16
    with torch.device(device):
        model = CausalLM(Config.of(shape(*sizes))).init_weights(0).to(dtype)
    prompts = [draw.choices(range(3, sizes[0]), k=draw.randint(*lengths)) for _ in range(count)]
    return Engine(model, stops, rows=rows), prompts, n, tokens


def timed_parts(engine, call) -> dict[str, float]:
    """Share of the time of a call that passes in each part, without the parts inside it."""
    from torch import nn

    import nanopost.engine
    import nanopost.model
    from nanopost.attention import Cache

    places = [
        (nn.Linear, "forward", "matmuls"),
        (nanopost.model.CausalLM, "logits", "matmuls"),
        (nanopost.model, "cached_attention", "attention"),
        (Cache, "append", "cache"),
        (Cache, "keep", "cache"),
        (nanopost.engine, "sample", "sampling"),
        (engine.model, "prefill", "prompts"),
        (engine.model, "decode", "rest of the model"),
    ]
    seconds, inside = defaultdict(float), []

    def timed(function, part):
        def run(*args, **kwargs):
            began = time.perf_counter()
            inside.append(0.0)
            result = function(*args, **kwargs)
            lasted = time.perf_counter() - began
            seconds[part] += lasted - inside.pop()
            if inside:
                inside[-1] += lasted
            return result

        return run

    originals = [getattr(place, name) for place, name, _ in places]
    for (place, name, part), function in zip(places, originals):
        setattr(place, name, timed(function, part))
    timed(call, "host")()
    for (place, name, _), function in zip(places, originals):
        setattr(place, name, function)
    total = sum(seconds.values())
    return {part: round(lasted / total, 3) for part, lasted in seconds.items()}


def without_graphs(engine, call) -> dict[str, float]:
    """A call's time as a multiple of that with CUDA graphs."""
    seconds = []
    for engine.graphs in (False, True):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return {"without graphs": round(seconds[0] / seconds[1], 2)}


def serve(work: str, tiny: bool, threads: int):
    """For each line of stdin, a call to generate and a line of JSON."""
    import torch

    from nanopost.engine import Sampling

    torch.set_num_threads(threads)
    engine, prompts, n, tokens = job(work, tiny)
    seeds = [1000 * i for i in range(len(prompts))]

    def call():
        return engine.generate(prompts, n, Sampling(tokens), seeds)

    call()
    for line in sys.stdin:
        if line.strip() == "parts":
            of_call = without_graphs if engine.graphs else timed_parts
            print(json.dumps(of_call(engine, call)), flush=True)
            continue
        clocks = time.perf_counter, time.process_time
        began = [clock() for clock in clocks]
        drawn = sum(len(r.ids) for group in call() for r in group)
        lasted = [clock() - first for clock, first in zip(clocks, began)]
        print(json.dumps([drawn, *lasted]), flush=True)


# ------------------------------------------------------------------------------------- the parent
def main():
    from bench import common

    parser = common.parser(__doc__)
    parser.add_argument("--trees", nargs="+", type=Path, default=[common.ROOT], help="checkouts")
    parser.add_argument("--work", nargs="+", choices=WORK)
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--try", action="store_true", dest="tiny", help="write no results")
    args = parser.parse_args()
    rounds, gpu = 1 if args.tiny else args.rounds, shutil.which("nvidia-smi") is not None
    works = args.work or (["large"] if gpu else WORK[:-1])
    results = {}
    for work in works:
        children = []
        for tree in args.trees:
            command = [sys.executable, __file__, "serve", work, str(int(args.tiny))]
            children.append(
                subprocess.Popen(
                    [*command, str(args.threads)],
                    env=os.environ | common.OFFLINE | {"PYTHONPATH": str(tree.resolve())},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )

        def ask(child, what):
            print(what, file=child.stdin, flush=True)
            return json.loads(child.stdout.readline())

        seconds, busy, drawn = [[] for _ in children], [[] for _ in children], [0 for _ in children]
        for _ in range(rounds):
            for i, child in enumerate(children):
                drawn[i], *lasted = ask(child, "go")
                seconds[i].append(lasted[0])
                busy[i].append(lasted[1])
        parts = [ask(child, "parts") for child in children]
        for child in children:
            child.stdin.close()
            child.wait()
        for i, tree in enumerate(args.trees):
            ratio = statistics.median(a / b for a, b in zip(seconds[-1], seconds[i]))
            results[f"{work}, tree {i}"] = {
                "tokens": drawn[i],
                "tokens_per_second": round(drawn[i] / statistics.median(seconds[i])),
                "times_as_fast_as_the_last_tree": round(ratio, 2),
                "by_the_least_processor_time": round(min(busy[-1]) / min(busy[i]), 2),
                "least_processor_seconds": round(min(busy[i]), 3),
                "shares": parts[i],
            }
            print(f"{work}, {tree}: {results[f'{work}, tree {i}']}", flush=True)
    if not args.tiny:
        result = {"threads": args.threads, "rounds": rounds, **common.origin("torch")}
        name = "gpu_decode.json" if gpu else "decode.json"
        common.save(args.out / name, {**result, "works": results})


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], bool(int(sys.argv[3])), int(sys.argv[4]))
    else:
        main()
