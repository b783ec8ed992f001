"""The scripts on real vLLM servers, by their command lines."""

import json
import re
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
import vllm_servers
from scripts import ENVIRONMENT, ROOT, metrics, run
from test_recording import remains

from nanopost import InputError, cli, hf
from nanopost.batch import Example, batch_of
from nanopost.dist import World
from nanopost.tokenizer import Tokenizer
from runs import toy

pytestmark = pytest.mark.slow
GAP = "sampling/sampling_logp_difference/max"
REWARD = """
def ids(completions, completion_ids, **columns):
    return [sum(ids) % 10 / 10 for ids in completion_ids]
"""
SHARED = ("--steps", 3, "--prompts", 8, "--max_new_tokens", 12, "--lr", 3e-3, "--device", "cpu")
OWN = {
    "train_grpo.py": ("--group", 4),
    "train_ppo.py": ("--group", 2, "--value_model", "head", "--beta", 0.05),
    "train_online_dpo.py": ("--group", 3),
    "train_distill.py": ("--teacher", "{place}/teacher", "--beta", 0.5),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a teacher, prompts and a reward."""
    folder = tmp_path_factory.mktemp("place")
    vllm_servers.write_model(folder / "model")
    vllm_servers.write_model(folder / "teacher", seed=1)
    rows = toy.prompt_rows(held_out=False)[:40]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="module")
def urls(place):
    if vllm_servers.PYTHON is None:
        pytest.skip(vllm_servers.needed.kwargs["reason"])
    with vllm_servers.servers(place / "model", place, 2) as found:
        yield found


def flags(place, out):
    data = "--data", place / "prompts.jsonl", "--holdout", 4, "--max_prompt", 64
    reward = "--reward", f"{place / 'reward.py'}:ids"
    return "--model", place / "model", "--out", out, *data, *reward, *SHARED


def own_flags(place, script):
    return [str(x).format(place=place) for x in OWN[script]]


@pytest.mark.parametrize(
    "script, ranks", [*((s, r) for s in OWN for r in (1, 2)), ("train_grpo.py", 4)]
)
def test_a_script_samples_on_servers(place, urls, tmp_path, script, ranks):
    own = own_flags(place, script)
    arguments = (*flags(place, tmp_path / "out"), *own, "--record", "--vllm", *urls)
    done = run(script, *arguments, ranks=ranks)
    assert "warning" not in done.stdout + done.stderr
    lines = metrics(tmp_path / "out")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    moved = [name for name in lines[-1] if name.startswith("eval/")]
    assert moved and all(name in lines[0] for name in moved)
    for line in lines[1:]:
        assert line.get(GAP, 0.0) < 1e-4  # train_online_dpo.py measures none
        assert line["completions/mean_length"] > 1
        path = tmp_path / f"out/records/{line['step']:06d}.jsonl"
        rollouts = [json.loads(text) for text in path.read_text().splitlines()][1:]
        assert len(rollouts) > 0 and {row["rank"] for row in rollouts} == set(range(ranks))
    # What the run has learnt is on the servers, and in the folder that it wrote.
    assert (tmp_path / "out/model.safetensors").stat().st_size > 0


def test_a_teacher_on_servers_is_the_one_in_the_folder(place, urls, tmp_path):
    """Two ranks; the servers get the teacher's weights by a sync of a run that trains nothing."""
    teach = (*flags(place, tmp_path / "teacher"), *OWN["train_grpo.py"], "--lr", 2e-2)
    run("train_grpo.py", *teach, "--vllm", *urls)
    lines = []
    for teacher in ([tmp_path / "teacher"], urls):
        out = tmp_path / f"student{len(lines)}"
        teach = "--teacher", *teacher, "--teacher_top_k", 5, "--beta", 0.3
        run("train_distill.py", *flags(place, out), *teach, ranks=2)
        lines.append(metrics(out))
    for native, served in zip(*lines):
        for name in native:
            if name in ("divergence", "eval/divergence", "loss", "entropy", "grad_norm"):
                assert native[name] == pytest.approx(served[name], rel=1e-3), name
    assert lines[0][1]["divergence"] > 1e-3
    for more, error in [
        ((), "needs --teacher_top_k"),
        (("--teacher_top_k", 5, "--temperature", 0.7), "needs --temperature 1, not 0.7"),
        (("--teacher_top_k", 50), "status 400.*start the server with --max-logprobs 50"),
    ]:
        command = *flags(place, tmp_path / "out"), "--teacher", urls[0], *more
        done = run("train_distill.py", *command, ok=False)
        assert done.returncode and re.search(error, done.stderr), done.stderr


def test_servers_get_merged_weights_of_a_run_with_adapters(place, urls, tmp_path):
    """The audit after each sync compares every tensor."""
    own = *OWN["train_grpo.py"], "--lora", 4, "--lr", 2e-2
    done = run("train_grpo.py", *flags(place, tmp_path / "out"), *own, "--vllm", *urls)
    assert "warning" not in done.stdout + done.stderr
    for line in metrics(tmp_path / "out")[1:]:
        assert line[GAP] < 1e-4


SCORE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

folder, adapter, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
more = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 1} if adapter else {}
llm = LLM(folder, dtype="float32", max_model_len=128, enforce_eager=True, **more)
params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
request = LoRARequest("adapter", 1, adapter) if adapter else None
(out,) = llm.generate([{"prompt_token_ids": ids}], [params], lora_request=request)
found = [out.prompt_logprobs[t][ids[t]].logprob for t in range(1, len(ids))]
print("SCORES", json.dumps(found))
"""


@vllm_servers.needed
@pytest.mark.parametrize("with_adapter", [True, False])
def test_vllm_loads_the_adapter_that_a_run_has_written_and_its_merged_model(
    place, tmp_path, with_adapter
):
    own = *OWN["train_grpo.py"], "--lora", 4, "--lr", 2e-2
    run("train_grpo.py", *flags(place, tmp_path / "out"), *own)
    ids = list(range(10, 50))
    folder, adapter = tmp_path / "out", ""
    if with_adapter:
        folder, adapter = place / "model", tmp_path / "out/adapter"
    done = subprocess.run(
        [vllm_servers.PYTHON, "-c", SCORE, str(folder), str(adapter), json.dumps(ids)],
        env=ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [text for text in done.stdout.splitlines() if text.startswith("SCORES")]
    e = Example(np.array(ids), np.arange(len(ids)) > 0)

    def score(path):
        with torch.no_grad():
            logp_N, _ = hf.load_model(path)(batch_of([e]))
        return logp_N[:-1].tolist()

    found = json.loads(line.removeprefix("SCORES"))
    assert found == pytest.approx(score(tmp_path / "out"), abs=1e-4)
    assert found != pytest.approx(score(place / "model"), abs=1e-2)


@pytest.mark.parametrize("script, staleness", [("train_grpo.py", 0), *((s, 2) for s in OWN)])
def test_a_recorded_run_on_servers_replays_to_the_same_bytes(
    place, urls, tmp_path, script, staleness
):
    """The replay has no thread and no server: it is the synchronous loop."""
    own = *own_flags(place, script), "--max_staleness", staleness
    own += ("--max_logp_gap", 9) if script != "train_online_dpo.py" else ()
    run(script, *flags(place, tmp_path / "out"), *own, "--record", "--vllm", *urls)
    run(script, *flags(place, tmp_path / "again"), *own, "--replay", tmp_path / "out")
    assert remains(tmp_path / "again") == remains(tmp_path / "out")


def test_a_resumed_run_pushes_its_weights_before_it_samples(place, urls, tmp_path):
    arguments = (*flags(place, tmp_path / "out"), *OWN["train_grpo.py"], "--vllm", urls[0])
    run("train_grpo.py", *arguments, "--save_every", 1)
    for path in (tmp_path / "out").glob("model.safetensors"):
        path.unlink()
    other = (*flags(place, tmp_path / "other"), *OWN["train_grpo.py"], "--vllm", urls[0])
    run("train_grpo.py", *other, "--seed", 5)  # leaves other weights on the server
    run("train_grpo.py", *arguments, "--save_every", 1, "--resume", "--steps", 5)
    lines = metrics(tmp_path / "out")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert max(line[GAP] for line in lines[1:]) < 1e-4


def test_eval_gives_on_a_server_what_it_gives_by_itself(place, urls, tmp_path):
    shared = "--model", place / "model", "--data", place / "prompts.jsonl", "--max_new_tokens", 12
    shared += "--reward", f"{place / 'reward.py'}:ids", "--device", "cpu", "--out"

    def evaluate(*arguments):
        command = [sys.executable, "-m", "nanopost.eval", *map(str, arguments)]
        subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, check=True)

    evaluate(*shared, tmp_path / "native.jsonl")
    evaluate(*shared, tmp_path / "vllm.jsonl", "--vllm", *urls)
    assert (tmp_path / "vllm.jsonl").read_text() == (tmp_path / "native.jsonl").read_text()


# --------------------------------------------------------------------------------- no server needed
def test_generate_answers_on_a_server_as_it_does_by_itself(place, urls, tmp_path):
    """Greedy answers to a file, and a chat, whose answers come whole."""

    def generate(*arguments, typed=""):
        command = [sys.executable, "-m", "nanopost.generate", "--model", place / "model"]
        command += ["--temperature", 0, "--max_new_tokens", 12, "--device", "cpu", *arguments]
        return subprocess.run(
            [*map(str, command)],
            cwd=ROOT,
            env=ENVIRONMENT,
            input=typed,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    data = "--data", place / "prompts.jsonl", "--out"
    generate(*data, tmp_path / "native.jsonl")
    generate(*data, tmp_path / "vllm.jsonl", "--vllm", *urls)
    assert (tmp_path / "native.jsonl").read_text() == (tmp_path / "vllm.jsonl").read_text()
    typed = "12+34=?\nand?\n"
    native, vllm = generate(typed=typed), generate("--vllm", *urls, typed=typed)
    assert native.startswith("Ctrl-C ends an answer") and vllm.endswith(native)


def test_flags_choose_the_engine(alone, tmp_path):
    vllm_servers.write_model(tmp_path)
    model, tokenizer = hf.load_model(tmp_path), Tokenizer.load(tmp_path)
    world = World(0, 1, torch.device("cpu"), torch.float32)
    parser = cli.Parser("")
    cli.add_engine_flags(parser)
    parser.add_argument("--tokens", default=8192)

    def engine(*given) -> Namespace:
        return cli.engine(parser.parse_args(given), tmp_path, model, world, tokenizer)

    native = engine("--engine_rows", "7")
    assert native.model is model and native.rows == 7
    with pytest.raises(InputError, match="two engines: give one of them"):
        engine("--engine", "colocate", "--vllm", "http://a")
    with pytest.raises(InputError, match="is it up .*, and reachable from here"):
        engine("--vllm", f"http://127.0.0.1:{vllm_servers.free_port()}", "--vllm_timeout", "2")
    if not vllm_servers.INSIDE:
        with pytest.raises(InputError, match="--engine colocate needs vLLM"):
            engine("--engine", "colocate", "--vllm_memory", "0.5")
