"""Planted faults of a sync on a real vLLM server: each is found, and named rightly."""

import json

import pytest
import scripts
import torch
import vllm_servers
from small import small_config
from test_audit import changed

from nanopost import InputError, StepError, audit, hf, probe, server, vllm
from nanopost.audit import Audit
from nanopost.dist import World
from nanopost.hf import EMBEDDING
from nanopost.model import CausalLM
from nanopost.save import save_model
from nanopost.tokenizer import Tokenizer
from nanopost.vllm import Servers
from runs import toy

ALONE = World(0, 1, torch.device("cpu"), torch.float32)
pytestmark = [pytest.mark.slow, vllm_servers.needed]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def place(request, tmp_path_factory):
    """(folder, address of a server of it)."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, tied=request.param)
    with vllm_servers.servers(folder, tmp_path_factory.mktemp("log")) as (url,):
        yield folder, url


def write_model(folder, tied=True):
    """A small model with square matrices, and heads that a vLLM CPU kernel takes: Qwen3 (norms of q
    and k) with a tied head, or Qwen2 (biases) with a head of its own. The toy's tokenizer."""
    config = small_config(
        architectures=["Qwen3ForCausalLM" if tied else "Qwen2ForCausalLM"],
        model_type="qwen3" if tied else "qwen2",
        vocab_size=264,
        hidden_size=128,
        intermediate_size=96,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = CausalLM(config).init_weights(0)
    save_model(folder, model.state_dict().items(), config, toy.tokenizer_files())


class Synced:
    """A trainer's model whose weights a server has; the audit follows each sync."""

    def __init__(self, place, monkeypatch):
        self.folder, self.url = place
        self.model, tokenizer = hf.load_model(self.folder), Tokenizer.load(self.folder)
        auditor = Audit(self.model, tokenizer, ALONE, 1)
        self.engine = Servers([self.url], tokenizer, ALONE, self.model.config, 60, auditor)
        self.version, self.monkeypatch = 0, monkeypatch
        self.sync()

    def sync(self, fault=None):
        """fault(new, old) -> the tensors that are sent instead of the new ones."""
        self.version += 1
        with self.monkeypatch.context() as patch:
            if fault:
                buckets = vllm._buckets
                patch.setattr(
                    vllm,
                    "_buckets",
                    lambda named, dtype: buckets(fault(dict(named), self.old).items(), dtype),
                )
            self.engine.sync_weights(self.model.state_dict().items(), self.version)

    def train(self, seed=1):
        self.old = {name: x.clone() for name, x in self.model.state_dict().items()}
        changed(self.model, seed)


@pytest.fixture
def synced(place, alone, monkeypatch):
    return Synced(place, monkeypatch)


def test_a_faithful_sync_is_judged_faithful_three_times_over(synced):
    for seed in range(3):
        synced.train(seed)
        synced.sync()


Q, K, O = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "qko")
GATE, UP, DOWN = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
NORM = "model.layers.1.post_attention_layernorm.weight"


def without(*names):
    return lambda new, old: {name: x for name, x in new.items() if name not in names}


def with_(name, edit):
    return lambda new, old: new | {name: edit(new[name], old[name]).contiguous()}


def in_pairs(x, _):
    """Hugging Face's rotary order -> the original one, of 4 heads."""
    return x.view(4, 2, -1, x.shape[1]).transpose(1, 2).reshape(x.shape)


def late(new, old):
    """The second half of the tensors comes from the version before: a bucket was lost."""
    return {name: x if i < len(new) // 2 else old[name] for i, (name, x) in enumerate(new.items())}


FAULTS = {
    "nothing sent": (lambda new, old: old, "stale weights: every tensor is that of the version b"),
    "one norm left out": (without(NORM), f"a partial update: {NORM} of the version before"),
    "one matrix left out": (without(DOWN), f"a partial update: {DOWN} of the version before"),
    "a bucket lost": (late, "a partial update: a bucket of weights is missing, model.layers.*to"),
    "an old embedding": (with_(EMBEDDING, lambda x, old: old), f"{EMBEDDING}"),
    "transposed": (with_(O, lambda x, _: x.T), f"{O} is transposed"),
    "rotary order": (with_(Q, in_pairs), f"{Q} has its rows in the original rotary order"),
    "heads permuted": (
        with_(Q, lambda x, _: x.view(4, -1, x.shape[1])[[2, 0, 3, 1]].reshape(x.shape)),
        f"{Q} has its heads in the order 2 0 3 1",
    ),
    "rows reversed": (
        with_(K, lambda x, _: x.flip(0)),
        f"{K} has its rows in another order",
    ),
    "gate and up swapped": (
        lambda new, old: new | {GATE: new[UP], UP: new[GATE]},
        "gate and up are swapped in model.layers.0",
    ),
    "scaled": (with_(DOWN, lambda x, _: 1.25 * x), f"{DOWN} is scaled by 1.25"),
    "zeroed": (with_(UP, lambda x, _: 0 * x), f"{UP} is zero"),
    "another layer's": (
        lambda new, old: new | {DOWN: new[DOWN.replace("0", "1")].clone()},
        f"{DOWN} is {DOWN.replace('0', '1')}",
    ),
    "some rows old": (
        with_(DOWN, lambda x, old: torch.cat([x[:40], old[40:]])),
        f"{DOWN} has rows 40 to 127 of the version before",
    ),
    "rounded": (
        lambda new, old: {name: x.bfloat16().float() for name, x in new.items()},
        "low precision: all weights are rounded to bfloat16",
    ),
    "not finite": (with_(NORM, lambda x, _: x * torch.nan), f"{NORM} is not finite"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_and_a_faithful_sync_mends_it(synced, name):
    fault, message = FAULTS[name]
    synced.train()
    with pytest.raises(StepError, match=message) as found:
        synced.sync(fault)
    print(found.value)
    synced.sync()


def test_a_stale_tied_head_is_named(synced, tmp_path):
    """/collective_rpc reload_weights leaves it stale on a CPU."""
    if not synced.model.config.tied:
        pytest.skip("the head is not tied")
    synced.train()
    config, state = synced.model.config, synced.model.state_dict()
    save_model(tmp_path, state.items(), config, {})
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(tmp_path)}}
    synced.engine.servers[0].post("/collective_rpc", body)
    auditor = synced.engine.audit
    for _ in auditor.watch(state.items()):
        pass
    with pytest.raises(StepError, match="a stale tied head: the embedding is new"):
        auditor.check(synced.engine.servers, 2)
    synced.sync()


# --------------------------------------------------------------------------- by scores alone
@pytest.fixture
def foreign(monkeypatch):
    """A server of somebody else's: it gives no prints."""
    monkeypatch.setattr(probe, "prints_of", lambda server, config: (None, {}))


def run(capsys, *arguments):
    """-> (exit status, what was printed)."""
    torch.distributed.destroy_process_group()
    try:
        status = audit.main([str(x) for x in arguments])
    except SystemExit as end:
        status = end.code
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    return status, capsys.readouterr().out


BY_SCORES = {
    "nothing sent": "stale weights",
    "one norm left out": f"a partial update: {NORM} is that of the version before",
    "one matrix left out": f"a partial update: {DOWN} is that of the version before",
    "a bucket lost": "a partial update: a bucket of weights is missing",
    "transposed": f"{O} is transposed",
    "gate and up swapped": "gate and up are swapped in model.layers.0",
    "zeroed": f"{GATE} is zero or {UP} is zero",
}


@pytest.mark.parametrize("name", BY_SCORES)
def test_the_command_names_a_fault_of_a_server_of_somebody_else(
    synced, name, foreign, tmp_path, capsys
):
    synced.train()
    with pytest.raises(StepError):
        synced.sync(FAULTS[name][0])
    files = {path.name: path.read_text() for path in synced.folder.glob("token*")}
    for folder, state in (("new", synced.model.state_dict()), ("old", synced.old)):
        save_model(tmp_path / folder, state.items(), synced.model.config, files)
    flags = ("--model", tmp_path / "new", "--before", tmp_path / "old", "--vllm", synced.url)
    status, text = run(capsys, *flags)
    assert status == 1 and BY_SCORES[name] in text, text
    assert "one by one: not compared (no nanopost.vllm_worker)" in text
    synced.sync()
    status, text = run(capsys, *flags)
    assert status == 0 and "faithful" in text, text


# ------------------------------------------------------------------------------- another server
@pytest.fixture(scope="module")
def careless(tmp_path_factory):
    """A server with the defaults of vLLM, of a model with a generation_config.json."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 5, "do_sample": True}))
    flags = ("--logprobs-mode", "raw_logprobs", "--generation-config", "auto")
    with vllm_servers.servers(folder, tmp_path_factory.mktemp("log"), flags=flags) as (url,):
        yield folder, url


def test_log_probs_before_the_temperature_are_named(careless, alone, capsys):
    status, text = run(capsys, "--model", careless[0], "--vllm", careless[1])
    assert status == 1 and "start it with --logprobs-mode processed_logprobs" in text, text


def test_defaults_of_generation_config_are_named(careless, alone, capsys, monkeypatch):
    monkeypatch.setattr(audit, "compare", lambda *_: [("nothing", 0.0, 1.0)])
    status, text = run(capsys, "--model", careless[0], "--vllm", careless[1])
    assert status == 1 and "it samples with the defaults of generation_config.json" in text, text


def test_a_server_in_bf16_is_named(alone, capsys, tmp_path):
    write_model(tmp_path / "model")
    flags = ("--dtype", "bfloat16")
    with vllm_servers.servers(tmp_path / "model", tmp_path, flags=flags) as (url,):
        status, text = run(capsys, "--model", tmp_path / "model", "--vllm", url)
        assert status == 1 and "low precision: it computes in bfloat16" in text, text
        status, text = run(capsys, "--model", tmp_path / "model", "--vllm", url, "--dtype", "bf16")
        assert status == 0, text


def test_a_run_stops_with_the_cause(careless, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in toy.prompt_rows(False)[:40]))
    flags = ("--model", careless[0], "--data", data, "--holdout", 8, "--reward", "exact")
    flags += ("--steps", 1, "--prompts", 4, "--group", 2, "--max_new_tokens", 4, "--eval_every", 0)
    flags += ("--vllm", careless[1], "--out", tmp_path / "out")
    done = scripts.run("train_grpo.py", *flags, ok=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: step 0: http://127.0.0.1" in done.stderr
    assert "start it with --logprobs-mode processed_logprobs" in done.stderr
    done = scripts.run("train_grpo.py", *flags, "--audit_every", 0, "--max_logp_gap", 9)
    assert "step 1/1" in done.stdout


# ------------------------------------------------------------------------------- the command
def test_after_update_audits_before_and_after(synced, tmp_path, capsys):
    """The command trains and sends nothing: the server is stale."""
    config, state = synced.model.config, synced.model.state_dict()
    files = {path.name: path.read_text() for path in synced.folder.glob("token*")}
    save_model(tmp_path / "model", state.items(), config, files)
    synced.train()
    save_model(tmp_path / "next", synced.model.state_dict().items(), config, files)
    copy = f"cp {tmp_path}/next/model.safetensors {tmp_path}/model"
    status, text = run(
        capsys, "--model", tmp_path / "model", "--vllm", synced.url, "--after_update", copy
    )
    assert status == 1 and text.count("faithful") == 1, text
    assert "stale weights: every tensor is that of the version before" in text
    assert "the command has not changed the server's log-probs at all" in text


def test_another_tokenizer_and_another_model_are_named(synced, tmp_path, capsys):
    config, state = synced.model.config, synced.model.state_dict()
    files = {path.name: path.read_text() for path in synced.folder.glob("token*")}
    tokenizer = json.loads(files["tokenizer.json"])
    vocab = tokenizer["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    other = files | {"tokenizer.json": json.dumps(tokenizer)}
    save_model(tmp_path / "text", state.items(), config, other)
    status, text = run(capsys, "--model", tmp_path / "text", "--vllm", synced.url)
    assert status == 1 and "its tokenizer is another one than --model's" in text, text
    with pytest.raises(InputError, match="has another tokenizer than --model"):
        auditor = Audit(synced.model, Tokenizer.load(tmp_path / "text"), ALONE, 1)
        auditor._check_tokenizer(synced.engine.servers[0])

    template = tmp_path / "template.jinja"
    template.write_text(toy.TEMPLATE.replace("'<|assistant|>'", "'<|assistant|> '"))
    flags = ("--model", synced.folder, "--vllm", synced.url, "--chat_template", template)
    status, text = run(capsys, *flags)
    assert status == 1 and "its chat template is another one than --model's" in text, text

    write_model(tmp_path / "model", tied=not config.tied)
    with pytest.raises(InputError, match="serves another model"):
        run(capsys, "--model", tmp_path / "model", "--vllm", synced.url)


def test_keys_and_values_of_the_version_before_are_named(synced, monkeypatch):
    """A sync that forgets /reset_prefix_cache."""
    post = server.Server.post

    def forgetful(self, path, *args, **more):
        if "prefix_cache" in path:
            return {}
        if "/pause" in path:
            path += "&clear_cache=false"
        return post(self, path, *args, **more)

    monkeypatch.setattr(server.Server, "post", forgetful)
    synced.train()
    with pytest.raises(StepError, match="stale keys and values"):
        synced.sync()
    monkeypatch.undo()
    synced.sync()
