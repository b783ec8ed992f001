"""One contract for all engines: native, one real vLLM server, two of them, and vLLM in the process.
And the proof that a sync reaches every parameter."""

import re

import numpy as np
import pytest
import torch
import vllm_servers
from test_engine import trainer_logp

from nanopost import InputError, StepError, hf
from nanopost.dist import World
from nanopost.engine import Engine, Sampling, prompt_seed
from nanopost.server import Server, ServerError
from nanopost.tokenizer import Tokenizer
from nanopost.vllm import Servers

ALONE = World(0, 1, torch.device("cpu"), torch.float32)
PROMPTS = [[3, 60, 61, 62, 4], [3, 99, 4], [70] * 17, [3, 21, 10, 22, 4]]
SEEDS = [prompt_seed(0, i) for i in range(len(PROMPTS))]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """tied -> a model's folder."""
    found = {}
    for tied in (True, False):
        found[tied] = tmp_path_factory.mktemp("tied" if tied else "untied")
        vllm_servers.write_model(found[tied], tied=tied)
    return found


@pytest.fixture(scope="module")
def addresses(folders, tmp_path_factory):
    """Two servers of the tied model, and one of the other one."""
    if vllm_servers.PYTHON is None:
        pytest.skip(vllm_servers.needed.kwargs["reason"])
    logs = tmp_path_factory.mktemp("tied-logs"), tmp_path_factory.mktemp("untied-logs")
    with (
        vllm_servers.servers(folders[True], logs[0], 2) as tied,
        vllm_servers.servers(folders[False], logs[1]) as untied,
    ):
        yield {True: tied, False: untied}


@pytest.fixture(params=["native", "one server", "two servers", "in the process"])
def engine(request, alone, folders):
    """The engine of the tied model, with its weights."""
    folder, name = folders[True], request.param
    tokenizer, model = Tokenizer.load(folder), hf.load_model(folder)
    if name == "native":
        made = Engine.of(model, tokenizer)
    elif name == "in the process":
        if not vllm_servers.INSIDE:
            pytest.skip("this environment has no vLLM")
        made = request.getfixturevalue("inside")
    else:
        count = 1 if name == "one server" else 2
        urls = request.getfixturevalue("addresses")[True][:count]
        made = Servers(urls, tokenizer, ALONE, model.config, timeout=60)
    made.sync_weights(model.state_dict().items(), 3)
    yield made
    made.close()


@pytest.fixture(scope="module")
def inside(folders):
    """vLLM in this process: once, as it cannot be unloaded."""
    from nanopost.colocate import Colocated

    folder = folders[True]
    return Colocated(folder, Tokenizer.load(folder), ALONE, hf.load_model(folder).config, 0.5, 4096)


def policy(folders, tied=True):
    return hf.load_model(folders[tied])


# ----------------------------------------------------------------------------------------- contract
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_the_trainers(engine, folders, temperature):
    groups = engine.generate(PROMPTS, 4, Sampling(24, temperature), SEEDS)
    assert [len(group) for group in groups] == [4] * len(PROMPTS)
    for prompt, group in zip(PROMPTS, groups):
        for r in group:
            assert r.prompt == prompt and r.versions.tolist() == [3] * len(r.ids)
            exact = trainer_logp(policy(folders), r, temperature)
            np.testing.assert_allclose(r.logp, exact, atol=1e-4)
            assert r.logp.dtype == np.float32 and r.sampled.all()
            assert (r.finish == "stop") == (r.ids[-1] == 1) and 1 not in r.ids[:-1]
            assert r.finish == "stop" or len(r.ids) == 24
        assert len({tuple(r.ids) for r in group}) > 1  # each sample has its own seed


def test_greedy_tokens_are_those_of_the_native_engine(engine, folders):
    tokenizer = Tokenizer.load(folders[True])
    native = Engine.of(policy(folders), tokenizer)
    expected = native.generate(PROMPTS, 1, Sampling(32, 0.0), SEEDS)
    found = engine.generate(PROMPTS, 1, Sampling(32, 0.0), SEEDS)
    for (exact,), (r,) in zip(expected, found):
        assert r.ids == exact.ids and r.finish == exact.finish and not r.logp.any()


def test_a_seed_gives_the_same_samples_again_and_another_seed_others(engine):
    def ids(seeds):
        groups = engine.generate(PROMPTS, 2, Sampling(16), seeds)
        return [[r.ids for r in group] for group in groups]

    first = ids(SEEDS)
    assert ids(SEEDS) == first and ids([seed + 2 for seed in SEEDS]) != first
    # Sample i of a prompt draws from its seed + i, whatever the number of samples.
    shifted = engine.generate(PROMPTS, 1, Sampling(16), [seed + 1 for seed in SEEDS])
    assert [[r.ids for r in group] for group in shifted] == [[group[1]] for group in first]


def test_a_stop_string_ends_where_it_appears(engine, folders):
    tokenizer = Tokenizer.load(folders[True])
    whole = engine.generate(PROMPTS, 4, Sampling(40), SEEDS)
    texts = [tokenizer.decode(r.ids) for group in whole for r in group]
    # Bytes of half a character are no text yet, and engines differ on when they become one.
    stop = tuple(re.search("[!-~]", text[5:])[0] for text in (texts[0], texts[5]))
    cut = engine.generate(PROMPTS, 4, Sampling(40, stop=stop), SEEDS)
    hits = 0
    for full, r in zip((r for group in whole for r in group), (r for g in cut for r in g)):
        ends = [
            t
            for t in range(1, len(full.ids) + 1)
            if any(s in tokenizer.decode(full.ids[:t]) for s in stop)
        ]
        end = ends[0] if ends else len(full.ids)
        assert r.ids == full.ids[:end]
        assert r.finish == ("stop" if ends else full.finish)
        hits += bool(ends)
    assert hits >= 2


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}])
def test_log_probs_under_a_cut_are_renormalised(engine, folders, cut):
    from nanopost.engine import cut as cut_of

    (group,) = engine.generate(PROMPTS[:1], 4, Sampling(8, 0.8, **cut), SEEDS[:1])
    model = policy(folders)
    for r in group:
        for t, (token, logp) in enumerate(zip(r.ids, r.logp)):
            logits = next_logits(model, r.prompt + r.ids[:t])
            if isinstance(engine, Engine):  # it never draws an id that no token has
                logits[engine.unused_ids] = -torch.inf
            log_p = (logits / 0.8).log_softmax(-1)
            whole = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **cut}
            log_p = cut_of(log_p[None], **whole)[0]
            assert abs(float(log_p[token]) - logp) < 1e-4


def next_logits(model, ids):
    """The logits of the token after these."""
    token_N, position_N = torch.tensor(ids), torch.arange(len(ids))
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        hidden_PD = model.prefill(token_N, position_N, cu_seqlens, len(ids), lambda *_: None)
        return model.logits(hidden_PD)[0]


def test_what_cannot_be_sampled_is_refused(engine):
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        engine.generate([[1], []], 1, Sampling(4), [0, 0])
    with pytest.raises(InputError, match="an empty string would end"):
        engine.generate([[1]], 1, Sampling(4, stop=("",)), [0])
    with pytest.raises(InputError, match="a prompt of 250 tokens and 7 new ones exceed"):
        engine.generate([[5] * 250], 1, Sampling(7), [0])
    assert engine.generate([], 4, Sampling(4), []) == []


# --------------------------------------------------------------------------------------------- sync
@pytest.mark.parametrize("tied", [True, False])
def test_a_sync_reaches_every_parameter(alone, folders, addresses, tied):
    model, tokenizer = policy(folders, tied), Tokenizer.load(folders[tied])
    engine = Servers(addresses[tied][:1], tokenizer, ALONE, model.config, timeout=60)
    names = [name for name, _ in model.named_parameters()]
    assert any("bias" in name for name in names) == (not tied)
    version = 0
    engine.sync_weights(model.state_dict().items(), version)
    draw = torch.Generator().manual_seed(1234)

    def gap():
        groups = engine.generate(PROMPTS, 2, Sampling(12), SEEDS)
        return max(abs(r.logp - trainer_logp(model, r, 1.0)).max() for g in groups for r in g)

    for _ in range(3):
        for name in names:
            assert gap() < 1e-4
            with torch.no_grad():
                p = model.get_parameter(name)
                p += 0.15 * torch.randn(p.shape, generator=draw)
            assert gap() > 1e-3, name
            version += 1
            engine.sync_weights(model.state_dict().items(), version)
            assert gap() < 1e-4, name
    engine.close()


def test_a_server_that_was_not_synced_is_not_asked(alone, folders, addresses):
    engine = Servers(
        addresses[True], Tokenizer.load(folders[True]), ALONE, policy(folders).config, timeout=60
    )
    with pytest.raises(StepError, match="no server of --vllm .* is left"):
        engine.generate(PROMPTS, 1, Sampling(4), SEEDS)


def test_weights_of_another_run_are_noticed(alone, folders, addresses):
    tokenizer, model = Tokenizer.load(folders[True]), policy(folders)
    first = Servers(addresses[True][:1], tokenizer, ALONE, model.config, timeout=60)
    first.sync_weights(model.state_dict().items(), 0)
    second = Servers(addresses[True][:1], tokenizer, ALONE, model.config, timeout=60)
    second.sync_weights(model.state_dict().items(), 0)
    with pytest.raises(StepError, match="no server"):
        first.generate(PROMPTS, 1, Sampling(4), SEEDS)
    assert len(second.generate(PROMPTS, 1, Sampling(4), SEEDS)) == 4


# --------------------------------------------------------------------------------- no server needed
def test_addresses_are_checked():
    assert Server("http://a:8000/", 1.0).url == "http://a:8000"
    assert (Server("b:9", 1.0).host, Server("b:9", 1.0).port) == ("b", 9)
    with pytest.raises(InputError, match="--vllm ftp://a: give an address such as"):
        Server("ftp://a", 1.0)


def test_a_server_that_is_not_there_is_one_sentence(alone, tmp_path):
    vllm_servers.write_model(tmp_path)
    tokenizer, model = Tokenizer.load(tmp_path), hf.load_model(tmp_path)
    url = f"http://127.0.0.1:{vllm_servers.free_port()}"
    with pytest.raises(InputError, match=f"{url}/weight_info: .*refused: is it up"):
        Servers([url], tokenizer, ALONE, model.config)
    with pytest.raises(ServerError, match="refused"):
        Server(url, 1.0).get("/health")
