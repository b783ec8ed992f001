"""Servers that die, hang, fail, lie or lose answers: real vLLM servers behind a proxy."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import vllm_kills
import vllm_servers
from test_engine import trainer_logp
from vllm_proxy import Proxy

from nanopost import InputError, StepError, hf, vllm
from nanopost.dist import World
from nanopost.engine import Sampling, prompt_seed
from nanopost.rollout import Rollout
from nanopost.server import Server, ServerError
from nanopost.tokenizer import Tokenizer
from nanopost.vllm import Servers

ALONE = World(0, 1, torch.device("cpu"), torch.float32)
PROMPTS = [[3, 60 + i, 61, 62 + i, 4] for i in range(12)]
SEEDS = [prompt_seed(0, i) for i in range(len(PROMPTS))]
GENERATE = "/inference/v1/generate"
PATIENCE = 4.0  # --vllm_timeout of these tests, seconds
pytestmark = [pytest.mark.slow, vllm_servers.needed]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a model and what train_grpo.py needs."""
    place = tmp_path_factory.mktemp("faults")
    vllm_kills.write_data(place)
    return place


@pytest.fixture(scope="session")
def folder(place):
    return place / "model"


@pytest.fixture(scope="session")
def real(place):
    pair = vllm_kills.Pair(place / "model", place)
    yield pair
    pair.stop()


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
def ctrl_c():
    """ctrl_c(): as if it were pressed a second later."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    signal.signal(signal.SIGINT, before)


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
    engine, only = start(proxies[1:] + proxies[:1]), start(proxies[:1], sync=False)
    proxies[0].fault(GENERATE, 500)
    generate(engine, policy)
    assert proxies[0].count(GENERATE) >= 3
    only.sync_weights(policy.state_dict().items(), 0)
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
    with pytest.raises(StepError, match="no server of --vllm .* is left .*refused.*--resume"):
        engine.generate(PROMPTS, 2, Sampling(6), SEEDS)
    # The next sync says it too, and ends nothing: the step is saved first.
    engine.sync_weights([("a", torch.zeros(1))], 1)
    with pytest.raises(StepError, match="no server of --vllm .* is left .*refused.*--resume"):
        engine.generate(PROMPTS, 2, Sampling(6), SEEDS)


@pytest.mark.parametrize("when", ["hang", 6.0])
def test_ctrl_c_while_it_generates_ends_within_seconds(proxies, start, monkeypatch, when, ctrl_c):
    monkeypatch.setattr("test_vllm_faults.PATIENCE", 600.0)
    engine = start(proxies)
    for proxy in proxies:
        proxy.fault(GENERATE, when)
    ctrl_c()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, 2, Sampling(6), SEEDS)
    assert time.monotonic() - began < 3
    assert not [t for t in threading.enumerate() if "ThreadPool" in t.name]


def test_a_refused_prompt_ends_no_sync_of_another_thread(proxies, start, policy, clock):
    """A prompt that ran ahead, say, while the loop syncs."""
    engine = start(proxies)
    change(policy)
    for proxy in proxies:
        proxy.fault("/update_weights", 1.0)
    named = policy.state_dict().items()
    before = [proxy.count("/update_weights") for proxy in proxies]
    sync = threading.Thread(target=engine.sync_weights, args=(named, 1))
    sync.start()
    while any(proxy.count("/update_weights") == n for proxy, n in zip(proxies, before)):
        time.sleep(0.01)
    with pytest.raises(InputError, match="status 400"):
        engine.generate([[10**6]], 2, Sampling(6), [0])
    assert sync.is_alive()
    sync.join()
    assert len(alive(engine)) == 2
    generate(engine, policy)


def test_ctrl_c_in_a_sync_ends_within_seconds(proxies, start, policy, monkeypatch, ctrl_c):
    monkeypatch.setattr("test_vllm_faults.PATIENCE", 600.0)
    engine = start(proxies)
    proxies[1].fault("/update_weights", "hang")
    ctrl_c()
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


@pytest.mark.parametrize("what", [500, "hang", "lose"])
@pytest.mark.parametrize("path", ROUTES)
def test_a_sync_that_fails_anywhere_leaves_a_server_out_until_a_whole_one(
    proxies, start, policy, monkeypatch, path, what, clock
):
    monkeypatch.setattr(vllm, "BUCKET", 2**17)  # several buckets
    engine = start(proxies)
    change(policy)
    after = 1 if path == "/update_weights" else 0
    proxies[1].fault(path, what, times=1, after=after)
    before = proxies[1].count(path)
    engine.sync_weights(policy.state_dict().items(), 1)
    assert alive(engine) == [proxies[0].url]
    assert proxies[1].count(path) == before + after + 1  # what was lost may have been read
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
    monkeypatch.setattr(vllm, "BUCKET", 2**17)
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
    monkeypatch.setattr(vllm, "BUCKET", 2**17)
    first, second = start(proxies[:1]), start(proxies[1:], sync=False)
    proxies[1].target = proxies[0].target  # both on one server
    other = {name: w * 0.5 for name, w in policy.state_dict().items()}

    def both():
        second.sync_weights(other.items(), 1)

    proxies[0].fault("/weight_info", both, times=1, after=1)  # before the second bucket
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


# -------------------------------------------------------------------------------------------- start
def test_a_server_of_another_model_is_one_sentence(proxies, start, policy, folder, alone):
    other = hf.load_model(folder).config
    other.hf["vocab_size"] = 300
    with pytest.raises(InputError, match="another model: its vocab_size is 264, not 300"):
        Servers([proxies[0].url], Tokenizer.load(folder), ALONE, other)


@pytest.mark.parametrize("what", [500, 503, "hang", "reset", "garbage", "form"])
def test_a_server_that_does_not_answer_at_the_start_is_one_sentence(proxies, start, what, clock):
    proxies[1].fault("/", what)
    with pytest.raises(InputError, match=f"--vllm: {proxies[1].url}.*: is it up .*, and reachable"):
        start(proxies)


def test_a_server_without_our_worker_is_one_sentence(proxies, start, clock):
    proxies[1].fault("/collective_rpc", 404)
    with pytest.raises(InputError, match="no routes for training: start it with python -m"):
        start(proxies)


# ------------------------------------------------------------------------------------------ trainer
@pytest.fixture(scope="session")
def prompts(place):
    return vllm_kills.expected(place)


def train(place, out, proxies, ranks=1, *more):
    urls = ("--vllm", *(proxy.url for proxy in proxies), "--vllm_timeout", 5)
    return vllm_kills.start(place, ranks, out, *urls, *more)


def log_of(out):
    return Path(f"{out}.log").read_text()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_through_all_faults_has_each_prompt_once(proxies, place, prompts, tmp_path, ranks):
    for i, what in enumerate((500, "hang", "lose", "truncate", 503, "garbage")):
        proxies[i % 2].fault(GENERATE, what, times=2, after=7 * (i + 1))
    proxies[0].fault("/update_weights", 500, times=1, after=3)
    proxies[1].fault("/finish", "lose", times=1, after=4)
    proxies[1].fault("/resume", "hang", times=1, after=5)
    out = tmp_path / "out"
    assert train(place, out, proxies, ranks).wait(120) == 0, log_of(out)[-3000:]
    vllm_kills.check(out, prompts, log_of(out)[-3000:])
    assert log_of(out).count("warning: ") >= 4


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("where", [GENERATE, "/update_weights"])
def test_all_dead_ends_with_a_checkpoint_that_is_resumed(
    proxies, place, prompts, tmp_path, ranks, where
):
    out = tmp_path / "out"
    for proxy in proxies:  # in the third step or so: a step asks each for 4 prompts, an audit for 7
        proxy.fault(where, 500, after=3 if where == "/update_weights" else 30)
    assert train(place, out, proxies, ranks, "--save_every", 0 if ranks == 1 else 1).wait(120) == 1
    log = log_of(out)
    assert "error: no server of --vllm" in log and "status 500: planned" in log
    step = vllm_kills.metrics(out)[-1]["step"]
    assert f"--resume continues after step {step}" in log
    for proxy in proxies:
        proxy.heal()
        proxy.seen = []
    process = train(place, out, proxies, ranks, "--resume")
    assert process.wait(120) == 0, log_of(out)[-3000:]
    assert f"resumed at step {step}" in log_of(out)
    vllm_kills.check(out, prompts, log_of(out)[-3000:])
    # Weights before the first sample.
    asked = [path for path, _ in proxies[0].seen]
    sampled = [k for k, path in enumerate(asked) if path == GENERATE]
    assert asked.index("/finish_weight_update") < sampled[ranks]  # the first ones ask for the route


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_trainer_killed_in_an_update_leaves_a_server_for_the_next_run(
    proxies, place, prompts, real, tmp_path, ranks
):
    out, run = tmp_path / "out", []

    def kill():
        for pid in [run[0].pid, *vllm_kills.workers(out)]:
            os.kill(pid, signal.SIGKILL)

    proxies[0].fault("/update_weights", kill, times=1, after=2)
    run.append(train(place, out, proxies[:1], ranks))
    assert run[0].wait(120) == -signal.SIGKILL
    vllm_kills.wait_until_gone(run[0], out, "killed")
    vllm_kills.nothing_is_left()
    assert real.direct(0).get("/is_paused")["is_paused"]  # amid the update
    # Without waiting for --max_pause.
    assert train(place, out, proxies[:1], ranks, "--resume").wait(120) == 0, log_of(out)[-3000:]
    vllm_kills.check(out, prompts, log_of(out)[-3000:])


def test_a_server_that_its_trainer_left_paused_goes_on_by_itself(
    proxies, start, policy, real, capfd, clock
):
    engine = start(proxies[:1])
    engine._begin(engine.servers[0], fresh=False)
    assert real.direct(0).get("/is_paused")["is_paused"]
    real.wait_until_usable()
    assert real.direct(0).get("/weight_info")["weight_version"] == "restored"
    body = {"token_ids": PROMPTS[0], "sampling_params": {"max_tokens": 4, "logprobs": 0}}
    (choice,) = real.direct(0).post(GENERATE, body)["choices"]
    r = Rollout(PROMPTS[0], choice["token_ids"], None, "length", 0)
    found = [x["logprob"] for x in choice["logprobs"]["content"]]
    np.testing.assert_allclose(found, trainer_logp(policy, r, 1.0), atol=1e-4)
    # The engine that had begun the sync does not take it for its own.
    assert engine._each(engine.servers, {}, lambda s: engine._end(s, 1)) == []


def test_interrupts_of_a_run_that_hangs(proxies, place, tmp_path):
    out = tmp_path / "out"
    asked = threading.Event()
    # In the second step: 17 requests before the first one, and 8 in it.
    proxies[0].fault(GENERATE, asked.set, times=1, after=28)
    proxies[0].fault(GENERATE, "hang", after=28)
    process = train(place, out, proxies[:1], 1, "--vllm_timeout", 600, "--audit_every", 0)
    assert asked.wait(60)
    for _ in range(2):  # the first one waits for the step
        process.send_signal(signal.SIGINT)
        time.sleep(2.5)
    assert process.wait(10) == -signal.SIGINT
    assert "stopped" in log_of(out) and "--resume continues after step" in log_of(out)


def test_kills_at_random(place, real, capsys):
    vllm_kills.main(4, 1, place, real)
    assert "4 kills in" in capsys.readouterr().out
