"""Servers that die, hang, fail, lie or lose answers: real vLLM servers behind a proxy."""

import signal
import threading
import time

import numpy as np
import pytest
import torch
import vllm_servers
from test_engine import trainer_logp
from vllm_proxy import Proxy

from nanopost import InputError, StepError, hf, vllm
from nanopost.dist import World
from nanopost.engine import Sampling, prompt_seed
from nanopost.tokenizer import Tokenizer
from nanopost.vllm import Server, ServerError, Servers

ALONE = World(0, 1, torch.device("cpu"), torch.float32)
PROMPTS = [[3, 60 + i, 61, 62 + i, 4] for i in range(12)]
SEEDS = [prompt_seed(0, i) for i in range(len(PROMPTS))]
GENERATE = "/inference/v1/generate"
PATIENCE = 4.0  # --vllm_timeout of these tests, seconds
MAX_PAUSE = 5
pytestmark = [pytest.mark.slow, vllm_servers.needed]


class Real:
    """Two real servers, each on a port of its own."""

    def __init__(self, folder, logs):
        self.folder, self.logs = folder, logs
        self.ports = [vllm_servers.free_port() for _ in range(2)]
        self.running = [None, None]
        for i in range(2):
            self.launch(i)
        for i in range(2):
            self.wait(i)

    def launch(self, i):
        self.log = self.logs / f"server{i}.log"
        self.running[i] = vllm_servers.launch(
            self.folder, self.ports[i], "--max_pause", MAX_PAUSE, log=self.log
        )

    def wait(self, i):
        vllm_servers.wait(self.running[i], self.ports[i], self.logs / f"server{i}.log")

    def restart(self, i):
        vllm_servers.stop(self.running[i])
        self.launch(i)
        self.wait(i)

    def url(self, i):
        return f"http://127.0.0.1:{self.ports[i]}"

    def direct(self, i) -> Server:
        return Server(self.url(i), 60.0)

    def stop(self):
        for process in self.running:
            vllm_servers.stop(process)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    vllm_servers.write_model(folder)
    return folder


@pytest.fixture(scope="session")
def real(folder, tmp_path_factory):
    servers = Real(folder, tmp_path_factory.mktemp("logs"))
    yield servers
    servers.stop()


@pytest.fixture
def proxies(real):
    """In front of the two servers."""
    made = [Proxy(real.url(i)) for i in range(2)]
    yield made
    for proxy in made:
        proxy.close()


@pytest.fixture
def policy(folder):
    return hf.load_model(folder)


@pytest.fixture
def start(alone, folder, policy):
    """start(proxies) -> a synced engine."""
    made = []

    def start(proxies, version=0, sync=True):
        urls = [proxy.url for proxy in proxies]
        made.append(Servers(urls, Tokenizer.load(folder), ALONE, policy.config, PATIENCE))
        if sync:
            made[-1].sync_weights(policy.state_dict().items(), version)
        return made[-1]

    yield start
    for engine in made:
        engine.close()


def generate(engine, policy, prompts=PROMPTS, n=2):
    """Every prompt has its samples once, and they are the policy's."""
    groups = engine.generate(prompts, n, Sampling(6), SEEDS[: len(prompts)])
    assert [[r.prompt for r in group] for group in groups] == [[p] * n for p in prompts]
    for group in groups[::4]:
        for r in group:
            np.testing.assert_allclose(r.logp, trainer_logp(policy, r, 1.0), atol=1e-4)
    assert all((r.versions == engine.version).all() for group in groups for r in group)
    return groups


def change(policy):
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.1)


def alive(engine):
    return [server.url for server in engine.alive]


@pytest.fixture
def clock():
    """A test that takes longer than its faults may take has hung somewhere."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 60


# --------------------------------------------------------------------------------------- generation
@pytest.mark.parametrize("what", [500, 503, "hang", "reset", "lose", "truncate", "garbage", "form"])
def test_a_server_that_fails_is_left_out_and_its_prompts_go_to_the_other(
    proxies, start, policy, what, clock
):
    engine = start(proxies)
    proxies[1].fault("/", what)
    generate(engine, policy)
    assert alive(engine) == [proxies[0].url]
    asked = proxies[1].count(GENERATE)
    generate(engine, policy)
    assert proxies[1].count(GENERATE) == asked  # not asked again
    # It is back after the next sync that reaches it, not after one that does not.
    change(policy)
    engine.sync_weights(policy.state_dict().items(), 1)
    assert alive(engine) == [proxies[0].url]
    proxies[1].heal()
    generate(engine, policy)
    assert proxies[1].count(GENERATE) == asked
    change(policy)
    engine.sync_weights(policy.state_dict().items(), 2)
    assert alive(engine) == [proxy.url for proxy in proxies]
    generate(engine, policy)
    assert proxies[1].count(GENERATE) > asked


@pytest.mark.parametrize("what", [500, 503, "reset", "lose", "truncate", "garbage", "form"])
def test_what_fails_twice_is_asked_a_third_time(proxies, start, policy, what, clock):
    engine = start(proxies[:1])
    proxies[0].fault(GENERATE, what, times=2)
    generate(engine, policy, PROMPTS[:1])
    assert alive(engine) == [proxies[0].url]


def test_a_server_that_is_well_but_fails_all_prompts_costs_none(proxies, start, policy, clock):
    engine = start(proxies)
    proxies[0].fault(GENERATE, 500)
    generate(engine, policy)
    assert proxies[0].count(GENERATE) >= 3
    only = start(proxies[:1])
    with pytest.raises(StepError, match=r"status 500.*has failed 3 times\): restart them"):
        only.generate(PROMPTS[:2], 2, Sampling(6), SEEDS[:2])


def test_a_slow_server_is_waited_for(proxies, start, policy, clock):
    engine = start(proxies)
    for proxy in proxies:
        proxy.fault(GENERATE, PATIENCE / 2)
    generate(engine, policy)
    assert len(alive(engine)) == 2


def test_connections_that_the_server_closes_are_opened_again(proxies, start, policy, capsys):
    engine = start(proxies)
    for proxy in proxies:
        proxy.fault("/", "stale")
    for version in (1, 2):
        generate(engine, policy)
        change(policy)
        engine.sync_weights(policy.state_dict().items(), version)
    assert "warning" not in capsys.readouterr().out


def test_a_server_paused_by_somebody_else_is_left_out(proxies, start, policy, real, clock):
    engine = start(proxies)
    real.direct(1).post("/pause?mode=abort")
    generate(engine, policy)  # its answers time out, or are 503
    assert alive(engine) == [proxies[0].url]
    engine.sync_weights(policy.state_dict().items(), 1)
    assert len(alive(engine)) == 2
    generate(engine, policy)


def test_a_server_that_restarts_is_noticed_by_its_old_weights(proxies, start, policy, real, capsys):
    change(policy)
    engine = start(proxies)
    real.restart(1)
    generate(engine, policy)
    assert alive(engine) == [proxies[0].url]
    assert "its weights are 'default', not" in capsys.readouterr().out
    engine.sync_weights(policy.state_dict().items(), 1)
    assert len(alive(engine)) == 2
    generate(engine, policy)


def test_all_dead_is_one_sentence(proxies, start, clock):
    engine = start(proxies)
    for proxy in proxies:
        proxy.close()
    with pytest.raises(StepError, match="no server of --vllm .*refused.* is left .*--resume"):
        engine.generate(PROMPTS, 2, Sampling(6), SEEDS)
    # The next sync says it too, and ends nothing: the step is saved first.
    engine.sync_weights([("a", torch.zeros(1))], 1)
    with pytest.raises(StepError, match="no server of --vllm .*refused.* is left .*--resume"):
        engine.generate(PROMPTS, 2, Sampling(6), SEEDS)


@pytest.mark.parametrize("when", ["hang", 3.0])
def test_ctrl_c_while_it_generates_ends_within_seconds(proxies, start, monkeypatch, when, clock):
    monkeypatch.setattr("test_vllm_faults.PATIENCE", 600.0)
    engine = start(proxies)
    for proxy in proxies:
        proxy.fault(GENERATE, when)
    threading.Timer(1.0, signal.raise_signal, (signal.SIGINT,)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, 2, Sampling(6), SEEDS)
    assert time.monotonic() - began < 3
    assert not [t for t in threading.enumerate() if "ThreadPool" in t.name]


def test_ctrl_c_in_a_sync_ends_within_seconds(proxies, start, policy, monkeypatch, clock):
    monkeypatch.setattr("test_vllm_faults.PATIENCE", 600.0)
    engine = start(proxies)
    proxies[1].fault("/update_weights", "hang")
    threading.Timer(1.0, signal.raise_signal, (signal.SIGINT,)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        engine.sync_weights(policy.state_dict().items(), 1)
    assert time.monotonic() - began < 3
    assert not [t for t in threading.enumerate() if "ThreadPool" in t.name]


def test_a_refused_request_ends_the_others_at_once(proxies, start, policy, monkeypatch, clock):
    monkeypatch.setattr("test_vllm_faults.PATIENCE", 600.0)
    engine = start(proxies)
    proxies[0].fault(GENERATE, "hang")
    proxies[1].fault(GENERATE, 400)
    began = time.monotonic()
    with pytest.raises(InputError, match="status 400: planned"):
        engine.generate(PROMPTS, 2, Sampling(6), SEEDS)
    assert time.monotonic() - began < 3
    for proxy in proxies:
        proxy.heal()
    generate(engine, policy)  # the engine is as before


# --------------------------------------------------------------------------------------------- sync
ROUTES = [
    "/pause",
    "/update_weight_version",
    "/start_weight_update",
    "/update_weights",
    "/finish_weight_update",
    "/reset_prefix_cache",
    "/resume",
]


@pytest.mark.parametrize("what", [500, 503, "hang", "reset", "lose"])
@pytest.mark.parametrize("path", ROUTES)
def test_a_sync_that_fails_anywhere_leaves_a_server_out_until_a_whole_one(
    proxies, start, policy, monkeypatch, path, what, clock
):
    monkeypatch.setattr(vllm, "BUCKET", 2**15)  # several buckets
    engine = start(proxies)
    change(policy)
    after = 1 if path == "/update_weights" else 0
    proxies[1].fault(path, what, times=1, after=after)
    engine.sync_weights(policy.state_dict().items(), 1)
    assert alive(engine) == [proxies[0].url]
    asked = proxies[1].count(GENERATE)
    generate(engine, policy)
    assert proxies[1].count(GENERATE) == asked
    proxies[1].heal()
    change(policy)
    engine.sync_weights(policy.state_dict().items(), 2)
    assert len(alive(engine)) == 2
    generate(engine, policy)
    assert proxies[1].count(GENERATE) > asked


@pytest.mark.parametrize("path", ROUTES)
def test_the_only_server_is_synced_once_more(proxies, start, policy, monkeypatch, path, clock):
    monkeypatch.setattr(vllm, "BUCKET", 2**15)
    engine = start(proxies[:1])
    for i, what in enumerate((500, "lose")):
        change(policy)
        proxies[0].fault(path, what, times=1)
        engine.sync_weights(policy.state_dict().items(), i + 1)
        generate(engine, policy)


def test_an_update_that_fails_inside_the_server_leaves_nothing_in_the_next(
    proxies, start, policy, monkeypatch
):
    """vLLM keeps what it has loaded of a layer."""
    monkeypatch.setattr(vllm, "BUCKET", 1)  # a tensor each
    engine = start(proxies[:1])
    change(policy)
    names = [name for name, _ in policy.state_dict().items()]
    for k in (1, 2, 4, 5):  # among q, k, v and gate, up
        weights = dict(policy.state_dict().items())
        at = next(i for i, name in enumerate(names) if "layers.1." in name) + k
        broken = {names[at]: torch.zeros(3, 3)}
        engine._sync({**weights, **broken}.items(), 1)
        assert alive(engine) == []
        engine.sync_weights(policy.state_dict().items(), 2)
        generate(engine, policy, PROMPTS[:2])


def test_weights_of_two_runs_do_not_mix(proxies, start, policy, monkeypatch, clock):
    monkeypatch.setattr(vllm, "BUCKET", 2**15)
    first, second = start(proxies[:1]), start(proxies[1:], sync=False)
    proxies[1].target = proxies[0].target  # both on one server
    other = {name: w * 0.5 for name, w in policy.state_dict().items()}

    def both():
        second.sync_weights(other.items(), 1)

    proxies[0].fault("/update_weights", both, times=1, after=1)
    change(policy)
    first._sync(policy.state_dict().items(), 1)
    assert alive(first) == [] and "another run" in str(first.lost)
    policy.load_state_dict(other)
    generate(second, policy)


def test_a_late_update_does_not_reach_the_next_sync(proxies, start, policy, monkeypatch, clock):
    """The request of an update that was given up arrives while the next sync is on."""
    monkeypatch.setattr(vllm, "BUCKET", 1)
    engine = start(proxies[:1])
    bodies = []
    send = Server.post

    def spy(self, path, body=None, *args, **more):
        if path == "/update_weights":
            bodies.append(body)
        return send(self, path, body, *args, **more)

    monkeypatch.setattr(Server, "post", spy)
    engine.sync_weights(policy.state_dict().items(), 1)
    with pytest.raises(ServerError, match="is gone|No such file"):
        send(engine.servers[0], "/start_weight_update")
        send(engine.servers[0], "/update_weights", bodies[3])
    change(policy)
    engine.sync_weights(policy.state_dict().items(), 2)
    engine.sync_weights(policy.state_dict().items(), 2)
    generate(engine, policy)


# --------------------------------------------------------------------------------------------- start
def test_a_server_of_another_model_is_one_sentence(proxies, start, policy, folder, alone):
    other = hf.load_model(folder).config
    other.hf["vocab_size"] = 300
    with pytest.raises(InputError, match="another model: its vocab_size is 264, not 300"):
        Servers([proxies[0].url], Tokenizer.load(folder), ALONE, other)


@pytest.mark.parametrize("what", [500, 503, "hang", "reset", "garbage", "form"])
def test_a_server_that_does_not_answer_at_the_start_is_one_sentence(proxies, start, what, clock):
    proxies[1].fault("/", what)
    with pytest.raises(InputError, match=f"--vllm: {proxies[1].url}.*: is it up, and reachable"):
        start(proxies)


def test_a_server_without_our_worker_is_one_sentence(proxies, start, clock):
    proxies[1].fault("/collective_rpc", 404)
    with pytest.raises(InputError, match="no routes for training: start it with python -m"):
        start(proxies)
