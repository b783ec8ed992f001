"""Episodes of several turns: ids and masks spelled out, TRL's own loop as an oracle, what goes
wrong in environments, and what surrounds them: seeds, rewards, records, rollouts ahead."""

import inspect
import json
import time
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chats import make, user
from small import small_model

from nanopost import InputError, advantages, cli, dist, packing, rewards, sandbox, tools
from nanopost.ahead import Ahead
from nanopost.batch import padded
from nanopost.engine import Engine, Sampling
from nanopost.environment import Environments, Episode, answer_once, doubts
from nanopost.forward import logprobs
from nanopost.recording import Recording, Replay
from nanopost.rollout import Rollout, length_metrics, sample_records
from nanopost.template import Template
from nanopost.tokenizer import Tokenizer
from runs import toy

# --------------------------------------------------------------------- environments of the tests
OWN = '''
import time


class Countdown:
    """Wants as many answers as its row says, and rewards each by its length."""

    def reset(self, row):
        self.left = row["turns"]
        return row.get("more")

    def step(self, completion):
        self.left -= 1
        if "boom" in completion:
            raise KeyError("boom")
        if "sleep" in completion:
            time.sleep(30)
        if "exit" in completion:
            raise SystemExit(3)
        reward = None if "none" in completion else float(len(completion))
        return [{"role": "user", "content": f"{self.left} more"}], reward, self.left == 0


class Broken:
    def reset(self, row):
        return [][0]

    def step(self, completion):
        return "?"


class Wrong(Broken):
    def reset(self, row):
        return None


class Stepless:
    def reset(self, row):
        return None


class Unmade(Stepless):
    step = None.__class__

    def __init__(self):
        raise OSError("no server")


def function():
    pass
'''
# Of the shape that TRL documents, with a text of its own.
THEIRS = '''
import asyncio
import threading
import time


class Vault:
    """A number is hidden; a guess is told whether it is too low or too high."""

    made = 0

    def __init__(self):
        Vault.made += 1
        self.tries = -1
        self.threads = [threading.get_ident()]

    def reset(self, secret=7, **kwargs) -> str | None:
        self.secret, self.tries, self.open = secret, 0, False
        self.columns = sorted(kwargs)
        self.threads.append(threading.get_ident())
        return kwargs.get("hint")

    def guess(self, number: int) -> str:
        """Guesses the number.

        Args:
            number: The guess
        """
        if self.open:
            raise ValueError("It is open.")
        self.tries += 1
        self.open = number == self.secret
        return "open" if self.open else "too low" if number < self.secret else "too high"

    async def rest(self, seconds: float) -> str:
        """Waits.

        Args:
            seconds: How long
        """
        await asyncio.sleep(seconds)
        return "rested"

    def hang(self, seconds: float) -> str:
        """Hangs.

        Args:
            seconds: How long
        """
        self.threads.append(threading.get_ident())
        time.sleep(seconds)
        return "done"

    def _hidden(self):
        pass

    async def get_reward(self):
        return 1.0 / self.tries if self.open else 0.0


class Bare:
    def reset(self, **kwargs):
        self.said, self.columns = [], kwargs

    def name(self, method: str, function: str) -> str:
        """Joins.

        Args:
            method: How
            function: What
        """
        return method + function

    def say(self, text: str):
        """Says a text.

        Args:
            text: It
        """
        self.said.append(text)


def opened(environments, **kwargs):
    return [float(environment.open) for environment in environments]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("environments")
    (path / "own.py").write_text(OWN)
    (path / "theirs.py").write_text(THEIRS)
    return path


class Says:
    """An engine that gives the n-th of the listed texts, with its log-probs, to the n-th call of an
    episode: `texts` holds a list for each seed. A text with its end; without, it is cut off."""

    staleness = 0

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts, self.calls = tokenizer, texts, []

    def generate(self, prompts, n, sampling, seeds):
        self.calls.append((prompts, n, seeds))
        groups = []
        for prompt, seed in zip(prompts, seeds):
            group = []
            for i in range(n):
                turn, episode = divmod(seed + i, len(self.texts))
                ids = self.tokenizer.encode(self.texts[episode][turn])
                logp = np.array([-0.25 * (turn + 1)] * len(ids), np.float32)
                finish = "stop" if ids[-1] in self.tokenizer.stop_ids else "length"
                group.append(Rollout(prompt, ids, logp, finish, 10 + turn))
            groups.append(group)
        return groups


def toy_tokenizer():
    """Hermes's calls in the toy's template: every byte is a token."""
    special = [*toy.SPECIAL, "<|tool|>"]
    return make(toy.TOOLS_TEMPLATE, special, eos="<|end|>")


def played(
    path, name, tokenizer, texts, row=None, n=None, turns=10, timeout=5.0, room=4000, new=200
):
    """The rollouts of a row whose n samples say these texts, turn by turn."""
    found = Environments(f"{path}:{name}", tokenizer, turns, timeout, room)
    row = {"prompt": [user("Q")], **(row or {})}
    if found.schemas:
        row["tools"] = found.schemas
    row["prompt_ids"] = tokenizer.prompt_ids(row["prompt"], row.get("tools"))
    engine = Says(tokenizer, texts)
    (group,) = found.play(engine, [row], n or len(texts), Sampling(new), [0])
    return group, engine, found


def call_of(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call><|end|>"


# ------------------------------------------------------------------------------- ids, masks, turns
def test_three_turns_spelled_out(folder):
    tokenizer = toy_tokenizer()
    ((r,), engine, _) = played(
        folder / "own.py",
        "Countdown",
        tokenizer,
        [["a<|end|>", "bc<|end|>", "d<|end|>"]],
        {"turns": 3},
    )
    text = "<|user|>Q<|assistant|>", "a<|end|><|user|>2 more<|assistant|>bc<|end|>"
    text += ("<|user|>1 more<|assistant|>d<|end|>",)
    assert tokenizer.decode(r.prompt) == text[0] and tokenizer.decode(r.ids) == text[1] + text[2]
    # a and its end; <|user|>, "2 more" and <|assistant|>, which are 8 tokens; bc and its end; ...
    assert r.sampled.tolist() == [True] * 2 + [False] * 8 + [True] * 3 + [False] * 8 + [True] * 2
    assert r.logp.tolist() == [-0.25] * 2 + [0] * 8 + [-0.5] * 3 + [0] * 8 + [-0.75] * 2
    assert r.versions[r.sampled].tolist() == [10, 10, 11, 11, 11, 12, 12]
    assert r.finish == "stop" and r.length == 7
    e = r.example()
    assert e.mask.tolist() == [False] * 3 + r.sampled.tolist() and e.num_targets == 7
    assert e.ids.tolist() == tokenizer.encode("".join(text))
    # Each call goes on from what was there, token for token; each answer has a seed of its own.
    prompts = [prompts[0] for prompts, _, _ in engine.calls]
    assert prompts == [r.prompt, r.prompt + r.ids[:10], r.prompt + r.ids[:21]]
    assert [seeds for _, _, seeds in engine.calls] == [[0], [1], [2]]
    assert r.episode.reward == 1 + 2 + 1
    assert [m["content"] for m in r.episode.messages] == ["a", "2 more", "bc", "1 more", "d"]
    (record,) = sample_records(tokenizer.decode, [r])
    assert record["prompt"] + record["completion"] == "".join(text)


def test_gae_goes_from_an_answers_last_token_to_the_next_ones_first(folder):
    """By the definition, in plain loops over the tokens that were sampled."""
    ((r,), _, _) = played(
        folder / "own.py", "Countdown", toy_tokenizer(), [["ab<|end|>", "c<|end|>"]], {"turns": 2}
    )
    e = r.example()
    draw = np.random.default_rng(0)
    e.columns["value"] = draw.standard_normal(len(e)).astype(np.float32) * e.mask
    value_BT = padded([e], "value")
    reward_BT = torch.zeros_like(value_BT)
    reward_BT[0, r.length - 1] = 2.5
    adv_BT, _ = advantages.gae(reward_BT, value_BT, 0.9, 0.8)
    at = [t for t in range(len(e)) if e.mask[t]]
    assert at == [3, 4, 5, 14, 15] and value_BT.shape[1] == 5
    for k in range(5):
        expected = 0.0
        for j in range(k, 5):
            following = e.columns["value"][at[j + 1]] if j < 4 else 0.0
            delta = 2.5 * (j == 4) + 0.9 * following - e.columns["value"][at[j]]
            expected += 0.72 ** (j - k) * delta
        assert float(adv_BT[0, k]) == pytest.approx(expected, rel=1e-6)


def test_an_episode_ends_when_an_answer_is_cut_off_or_too_long_or_the_last(folder):
    """The environment sees the cut answer, and rewards it, but does not reply."""
    given = folder / "own.py", "Countdown", toy_tokenizer()
    texts = ["a<|end|>", "bc<|end|>", "d<|end|>"]
    ((r,), engine, _) = played(*given, [["a<|end|>", "bc"]], {"turns": 3})
    assert r.finish == "length" and r.episode.reward == 3 and len(engine.calls) == 2
    assert r.episode.messages[-1]["content"] == "bc"
    ((r,), engine, _) = played(*given, [texts], {"turns": 3}, turns=2)
    assert r.finish == "length" and r.episode.reward == 3 and len(r.ids) == 13
    # 3 of the prompt, 2 of the answer, 8 of the turn, 5 new ones: 18 fit into 18, and not into 17.
    for room, answers in ((17, 1), (18, 2)):
        ((r,), engine, _) = played(*given, [texts], {"turns": 3}, room=room, new=5)
        assert len(engine.calls) == answers and r.finish == "length"
    ((r,), _, _) = played(*given, [texts[:1]], {"turns": 1}, turns=1)
    assert r.finish == "stop"


def test_reset_adds_text_or_messages_to_the_prompt(folder):
    tokenizer = toy_tokenizer()
    given = folder / "own.py", "Countdown", tokenizer, [["a<|end|>"], ["b<|end|>"]]
    for more, expected in (
        (" and", "<|user|>Q and<|assistant|>"),
        ([{"role": "user", "content": "R"}], "<|user|>Q<|user|>R<|assistant|>"),
        (None, "<|user|>Q<|assistant|>"),
    ):
        row = {"turns": 1, "more": more}
        group, engine, found = played(*given, row)
        assert [tokenizer.decode(r.prompt) for r in group] == [expected] * 2
        assert [tokenizer.decode(r.ids) for r in group] == ["a<|end|>", "b<|end|>"]
        engine.staleness = 1
        row |= {"prompt": [user("Q")], "prompt_ids": tokenizer.prompt_ids([user("Q")])}
        if more is None:
            found.play(engine, [row], 2, Sampling(20), [0])
        else:
            with pytest.raises(InputError, match="cannot run ahead of it: leave out --max_stalene"):
                found.play(engine, [row], 2, Sampling(20), [0])
    with pytest.raises(
        InputError, match="a prompt of 7 tokens and 20 new ones exceed the room of 9"
    ):
        played(*given, {"turns": 1, "more": " and"}, room=9, new=20)


# ----------------------------------------------------------------------------- TRL's environments
def test_a_class_of_trls_environment_factory_runs_unchanged(folder):
    """reset with columns and a text, typed methods as tools, async ones, and get_reward."""
    tokenizer = toy_tokenizer()
    texts = [
        [
            call_of("guess", number=3),
            call_of("guess", number=8),
            call_of("guess", number=7),
            "7<|end|>",
        ],
        [call_of("rest", seconds=0.01), "No.<|end|>", "", ""],
        ["7<|end|>", "", "", ""],
    ]
    row = {"secret": 7, "hint": " (1-9)", "level": 2}
    group, _, found = played(folder / "theirs.py", "Vault", tokenizer, texts, row)
    assert [schema["function"]["name"] for schema in found.schemas] == ["guess", "hang", "rest"]
    results = [
        "".join(m["content"] for m in r.episode.messages if m["role"] == "tool") for r in group
    ]
    assert results == ["too lowtoo highopen", "rested", ""]
    assert [r.episode.reward for r in group] == [1 / 3, 0.0, 0.0]
    assert [r.episode.environment.columns for r in group] == [["hint", "level", "prompt"]] * 3
    assert tokenizer.decode(group[0].prompt) == (
        "<|tool|>guess<|tool|>hang<|tool|>rest<|user|>Q (1-9)<|assistant|>"
    )
    first, *_, last = group[0].episode.messages
    assert first["content"] == "" and first["tool_calls"][0]["function"]["arguments"] == {
        "number": 3
    }
    assert last == {"role": "assistant", "content": "7"}
    assert tokenizer.decode(group[0].ids).endswith("<|tool|>open<|assistant|>7<|end|>")
    assert {r.finish for r in group} == {"stop"}
    # Their instances play again, as TRL has it: made once, reset often.
    made = group[0].episode.environment.made
    engine = Says(tokenizer, [["x<|end|>"]] * 3)
    row |= {"prompt": [user("Q")], "tools": found.schemas}
    row["prompt_ids"] = tokenizer.prompt_ids(row["prompt"], found.schemas)
    (again,) = found.play(engine, [row], 3, Sampling(9), [0])
    assert {id(r.episode.environment) for r in again} == {id(r.episode.environment) for r in group}
    assert again[0].episode.environment.made == made and again[0].episode.environment.tries == 0


def test_errors_of_calls_are_told_to_the_model_and_counted(folder, alone):
    """And an earlier call that has not returned lets no other one begin, get_reward neither."""
    texts = [
        [call_of("guess", number=7), call_of("guess", number=7), "<|end|>"],
        [call_of("guesses", number=7), "<tool_call>{<|end|>", "<|end|>"],
        [call_of("guess", value=7), call_of("guess", number=[]), "<|end|>"],
        [call_of("_hidden"), call_of("reset"), "<|end|>"],
        [call_of("hang", seconds=5), call_of("guess", number=1), "<|end|>"],
    ]
    began = time.monotonic()
    group, _, found = played(folder / "theirs.py", "Vault", toy_tokenizer(), texts, timeout=0.3)
    assert time.monotonic() - began < 3
    results = [[m["content"] for m in r.episode.messages if m["role"] == "tool"] for r in group]
    assert results[0] == ["open", "{'error': 'It is open.'}"]  # as TRL words it
    assert (
        results[1][0] == "{'error': 'Tool guesses not found.'}" and "is not JSON" in results[1][1]
    )
    assert "unexpected keyword argument 'value'" in results[2][0] and "'<' not" in results[2][1]
    assert results[3] == [
        "{'error': 'Tool _hidden not found.'}",
        "{'error': 'Tool reset not found.'}",
    ]
    assert "it takes more than 0.3 s (--env_timeout)" in results[4][0]
    assert results[4][1] == "{'error': 'an earlier call has not returned'}"
    assert [r.episode.calls for r in group] == [2] * 5
    assert [r.episode.failures for r in group] == [1, 2, 2, 2, 2]
    assert [r.episode.reward for r in group] == [1.0, 0.0, 0.0, 0.0, None]
    assert len(found.idle) == 4  # the one that hangs is not played with again
    found = length_metrics([group])
    assert found["tools/call_frequency"] == 2 and found["tools/failure_frequency"] == 0.9


def test_that_all_calls_fail_is_said_once_with_the_first_of_them(folder, alone, capsys):
    texts = [[call_of("guess", number=7), call_of("guess", number=7), "<|end|>"]] * 2
    played(folder / "theirs.py", "Vault", toy_tokenizer(), texts)
    assert "warning" not in capsys.readouterr().out  # half of them
    texts = [[call_of("guess", number="a"), "<|end|>"], [call_of("open"), "<|end|>"]]
    found = played(folder / "theirs.py", "Vault", toy_tokenizer(), texts)[2]
    said = capsys.readouterr().out
    assert "each of the 2 calls of tools in a rollout batch failed, the first with guess: " in said
    assert "theirs.py:" in said
    engine = Says(toy_tokenizer(), [[call_of("open"), "<|end|>"]])
    row = {"prompt": [user("Q")], "tools": found.schemas}
    row["prompt_ids"] = toy_tokenizer().prompt_ids(row["prompt"], found.schemas)
    found.play(engine, [row], 1, Sampling(200), [0])
    assert "warning" not in capsys.readouterr().out


def test_environments_play_at_the_same_time_each_in_a_thread_of_its_own(folder):
    texts = [[call_of("hang", seconds=0.3), "<|end|>"]] * 8
    began = time.monotonic()
    group, _, _ = played(folder / "theirs.py", "Vault", toy_tokenizer(), texts)
    assert time.monotonic() - began < 8 * 0.3 / 2
    assert [r.episode.messages[1]["content"] for r in group] == ["done"] * 8
    threads = [r.episode.environment.threads for r in group]
    assert [len(set(x)) for x in threads] == [1] * 8 and len({x[0] for x in threads}) == 8
    assert [len(x) for x in threads] == [3] * 8  # made, reset, and the tool


def test_arguments_and_columns_may_have_any_name(folder):
    """Those of the library's own parameters too."""
    row = {"method": 1, "function": 2, "future": 3, "row": 4}
    texts = [[call_of("name", method="a", function="b"), "<|end|>"]]
    ((r,), _, _) = played(folder / "theirs.py", "Bare", toy_tokenizer(), texts, row)
    assert r.episode.messages[1]["content"] == "ab" and r.episode.failures == 0
    assert r.episode.environment.columns == {"prompt": [user("Q")], **row}


def test_failing_environments_end_their_episodes_and_it_is_said(folder, capsys):
    texts = [[f"{word}<|end|>", "x<|end|>"] for word in ("boom", "sleep", "exit", "none", "fine")]
    texts.append(["fine<|end|>", "boom<|end|>"])
    began = time.monotonic()
    group, engine, found = played(
        folder / "own.py", "Countdown", toy_tokenizer(), texts, {"turns": 2}, timeout=0.3
    )
    assert time.monotonic() - began < 3
    assert [r.episode.reward for r in group] == [None, None, None, 1.0, 5.0, None]
    errors = [r.episode.error for r in group]
    assert "KeyError: 'boom' (" in errors[0] and "own.py:" in errors[0]
    assert "it takes more than 0.3 s" in errors[1] and "it called exit" in errors[2]
    said = capsys.readouterr().out
    assert (
        "own.py:Countdown: 4 of 6 episodes failed, and have no reward of it; the first: Key" in said
    )
    assert [r.finish for r in group] == ["stop"] * 6 and len(found.idle) == 5
    with pytest.raises(
        InputError, match="all 2 episodes failed: TypeError: step returned '.', not"
    ):
        played(folder / "own.py", "Wrong", toy_tokenizer(), [["a<|end|>"]] * 2)


def test_what_is_no_environment_gets_one_sentence(folder):
    tokenizer, own = toy_tokenizer(), folder / "own.py"
    for name, said in (
        ("function", "give a class that has a method reset"),
        ("Nothing", "has no 'Nothing'; it has Countdown, Broken"),
        ("Stepless", "beside reset.self, row. it needs step.self, completion."),
        ("Unmade", "Unmade.. raised OSError: no server"),
        ("Broken", "row: --env .*: reset raised IndexError: list index out of range"),
    ):
        with pytest.raises(InputError, match=said):
            played(own, name, tokenizer, [["a<|end|>"]])
    with pytest.raises(InputError, match="there is no file .*none.py"):
        played(folder / "none.py", "X", tokenizer, [["a<|end|>"]])
    with pytest.raises(InputError, match="name it as file.py:name"):
        Environments("Countdown", tokenizer, 2, 1.0, 99)
    with pytest.raises(InputError, match="writes no tool calls in a form that nanopost reads"):
        Environments(f"{folder / 'theirs.py'}:Vault", make(toy.TEMPLATE, toy.SPECIAL), 2, 1.0, 99)
    with pytest.raises(InputError, match="needs a chat template that writes a token after each"):
        Environments(f"{own}:Countdown", make(None), 2, 1.0, 99)


def trls_loop(tokenizer, methods, prompt, texts) -> SimpleNamespace:
    """What TRL makes of one prompt and these answers, turn by turn: its methods, which get what
    they read of a trainer."""
    from trl.chat_template_utils import parse_response
    from trl.trainer.grpo_trainer import GRPOTrainer

    ids = [[tokenizer(text)["input_ids"] for text in turns] for turns in texts]
    begun = [prompt + turns[0] for turns in ids]

    def generate(prompts, *_, **__):
        answers = []
        for given in prompts:
            (k,) = [k for k, start in enumerate(begun) if given[: len(start)] == start]
            answers.append(ids[k][turn[k]])
            turn[k] += 1
        return answers, [[-0.5] * len(answer) for answer in answers]

    turn, count = [1] * len(texts), len(texts)
    trainer = SimpleNamespace(
        _tokenizer=tokenizer,
        processing_class=tokenizer,
        chat_template=None,
        chat_template_kwargs={},
        _is_vlm=False,
        max_tool_calling_iterations=10,
        max_completion_length=10**6,
        model=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=10**6)),
        use_vllm=False,
        environment_factories={None: None},
        _batch_environments=[None] * count,
        _env_tools={None: [*methods[0].values()]},
        _sync_tool_dicts=methods,
        _async_tool_dicts=[{}] * count,
        _generate_single_turn=generate,
    )
    trainer._get_tool_suffix_ids = partial(GRPOTrainer._get_tool_suffix_ids, trainer)
    tools_of_prompt = trainer._env_tools[None]
    first = [turns[0] for turns in ids]
    completions = [
        [parse_response(tokenizer, answer, prefix=prompt, tools=tools_of_prompt)]
        for answer in first
    ]
    mask, completions, new, logp, calls, failures, _ = GRPOTrainer._tool_call_loop(
        trainer,
        [[user("Q")] for _ in texts],
        [prompt] * count,
        first,
        completions,
        [[-0.5] * len(answer) for answer in first],
        None,
        {},
    )
    return SimpleNamespace(
        mask=mask, ids=new, logp=logp, calls=calls, failures=failures, completions=completions
    )


HERMES = '<tool_call>\n{"name": "NAME", "arguments": {"KEY": VALUE}}\n</tool_call>'
TAGS = (
    "<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>"
)
# Each with how it writes a call, and how an answer begins: one prompt opens the reasoning.
TRLS_TEMPLATES = {
    "qwen2_5": (HERMES, ""),
    "qwen3_training": (HERMES, "<think>\nHm.\n</think>\n\n"),
    "qwen3_5_nothink": (TAGS, ""),
    "qwen3_8": (TAGS, "Hm.\n</think>\n\n"),
}


@pytest.mark.parametrize("name", TRLS_TEMPLATES)
def test_ids_masks_and_replies_are_those_of_trls_loop(real, auto, folder, name):
    """Over up to three turns, several calls in one, reasoning before them, and failing ones."""
    import trl
    from trl.chat_template_utils import add_response_schema

    templates = Path(trl.__file__).parent / "chat_templates"
    named = {"eos_token": "<|im_end|>"}
    source = (templates / f"{name}.jinja").read_text()
    tokenizer = Tokenizer(real("qwen3")[0].raw, named, source)
    theirs = auto("qwen3")
    theirs.chat_template = (templates / f"{name.removesuffix('_training')}.jinja").read_text()
    theirs = add_response_schema(theirs)  # it knows the template by its text
    theirs.chat_template = source
    form, begin = TRLS_TEMPLATES[name]

    def call(tool, key, value):
        return form.replace("NAME", tool).replace("KEY", key).replace("VALUE", value)

    end = "<|im_end|>"
    texts = [
        [
            call("guess", "number", "3") + end,
            "So:\n" + call("guess", "number", "7") + end,
            "It is 7." + end,
        ],
        [
            call("guess", "number", "9") + "\n" + call("guess", "number", "7") + end,
            " \nDone. " + end,
        ],
        [call("open", "number", "3") + end, call("guess", "digit", "3") + end, "No" + end],
        ["I do not know." + end],
    ]
    texts = [[begin + text for text in turns] for turns in texts]
    group, _, _ = played(folder / "theirs.py", "Vault", tokenizer, texts, {"secret": 7})
    module = rewards.from_file(f"{folder / 'theirs.py'}:Vault", "--env")
    methods = []
    for _ in texts:
        instance = module()
        instance.reset()
        methods.append({"guess": instance.guess})
    expected = trls_loop(theirs, methods, group[0].prompt, texts)
    for r, ids in zip(group, expected.ids):
        assert tokenizer.decode(r.ids) == tokenizer.decode(ids)
        assert r.ids == ids
    assert [r.sampled.astype(int).tolist() for r in group] == expected.mask
    assert sum(r.episode.calls for r in group) == expected.calls == 6
    assert sum(r.episode.failures for r in group) == expected.failures == 2
    for r, messages in zip(group, expected.completions):
        assert [m["role"] for m in r.episode.messages] == [m["role"] for m in messages]
        for mine, other in zip(r.episode.messages, messages):
            said = mine["content"].rpartition("</think>")[2].strip()
            assert said == (other.get("content") or "").strip()
            wanted = [c["function"] for c in other.get("tool_calls", [])]
            assert [c["function"] for c in mine.get("tool_calls", [])] == wanted


ENDS = {"llama": "<|eot_id|>", "mistral": "</s>"}  # elsewhere <|im_end|>


@pytest.mark.parametrize(
    "name",
    ["llama3_1", "llama3_2", "qwen3_instruct_2507", "qwen3_6", "mistral"],
)
def test_a_conversation_is_what_transformers_renders_of_its_messages(
    request, folder, frozen_clock, name
):
    """Up to the last answer, which some templates write otherwise."""
    import trl
    from transformers.utils.chat_template_utils import render_jinja_template

    path = Path(trl.__file__).parent / f"chat_templates/{name}.jinja"
    if name == "mistral":
        path = request.getfixturevalue("shared") / "chat_templates/mistral_nemo_2407.jinja"
    source = path.read_text()
    end = next((end for start, end in ENDS.items() if name.startswith(start)), "<|im_end|>")
    special = ["<s>", end, "<|im_start|>", "[TOOL_CALLS]", "<|start_header_id|>"]
    tokenizer = make(source, special, bos="<s>", eos=end)
    calls = []
    for number in (3, 7):
        written = tools.written(
            tokenizer.template, [tools.call("guess", {"number": number}, 0)], SCHEMAS
        )
        calls.append(written[max(0, written.find("<tool_call>")) :] + end)
    thought = "T\n</think>\n\n" if name == "qwen3_6" else ""
    texts = [[thought + text for text in [*calls, f"It is 7.{end}"]]]
    ((r,), _, found) = played(folder / "theirs.py", "Vault", tokenizer, texts, {"secret": 7})
    assert [m["role"] for m in r.episode.messages] == ["assistant", "tool"] * 2 + ["assistant"]
    ((whole,), _) = render_jinja_template(
        conversations=[[user("Q"), *r.episode.messages]],
        tools=found.schemas,
        chat_template=source,
        bos_token="<s>",
        eos_token=end,
    )
    last = len(tokenizer.encode(texts[0][-1]))
    ours = tokenizer.decode(r.prompt + r.ids[: len(r.ids) - last])
    assert whole.startswith(ours)


PYTHON = '''
from nanopost import sandbox


class Interpreter:
    def reset(self, **columns):
        pass

    def python(self, code: str) -> str:
        """Runs a program.

        Args:
            code: It
        """
        return sandbox.run(code)[0]
'''


def test_a_tool_runs_programs_in_the_sandbox(tmp_path):
    try:
        sandbox.check()
    except InputError as error:
        pytest.skip(str(error))
    (tmp_path / "python.py").write_text(PYTHON)
    texts = [
        [call_of("python", code="print(6 * 7)"), "<|end|>"],
        [call_of("python", code="open('/home/x', 'w')"), "<|end|>"],
    ]
    group, _, _ = played(tmp_path / "python.py", "Interpreter", toy_tokenizer(), texts)
    replies = [r.episode.messages[1]["content"] for r in group]
    assert replies[0] == "42\n" and "Error" in replies[1]


# -------------------------------------------------------------------------------- prefix stability
def unstable(source, parse, schemas, called) -> list[str]:
    """What of answers a template would write otherwise in a later prompt: by transformers' own
    rendering, where that prompt does not begin with the one before it and the answer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def text_of(messages):
        given = {"tools": schemas or None, "chat_template": source, "add_generation_prompt": True}
        (texts, _) = render_jinja_template(
            conversations=[messages], bos_token="<s>", eos_token="</s>", **given
        )
        return texts[0]

    reply, found = user("R"), []
    if parse is not None:
        name = schemas[0]["function"]["name"]
        reply = {"role": "tool", "name": name, "tool_call_id": "call00000", "content": "R"}
    opened = text_of([user("Q")]).endswith("<think>\n")
    closed = "T\n</think>\n\n" if opened else ""
    thought = closed or "<think>\nT\n</think>\n\n"
    answers = {"answers": closed + called, "space around them": f" {closed}{called} \n"}
    answers["reasoning"] = thought + called
    for what, answer in answers.items():
        message = {"role": "assistant", "content": answer}
        if parse is not None:
            content, calls = parse(answer, schemas)
            if not calls:  # such an answer ends the episode
                continue
            message = {"role": "assistant", "content": content, "tool_calls": calls}
        messages = [user("Q"), message, reply, message, reply]
        whole = text_of(messages)
        before = [text_of(messages[:1]) + answer, text_of(messages[:3]) + answer]
        if not all(whole.startswith(text) for text in before):
            found.append(what)
    return found


SCHEMAS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "F.",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]
EMPTY_CALLS = {
    "_hermes": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    "_mistral": '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "call00000"}]',
    "_llama3": '{"name": "f", "parameters": {}}',
    "_tags": "<tool_call>\n<function=f>\n</function>\n</tool_call>",
}
HERMES_CALLS = next(iter(tools.FORMS.values()))
KINDS = ["answers", "space around them", "reasoning"]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"]
SPECIAL += ["<|return|>", "<｜end▁of▁sentence｜>", "<|call|>"]


def test_a_warning_says_what_templates_write_otherwise_in_later_prompts(shared, frozen_clock):
    import trl

    sources = {p.stem: p.read_text() for p in (shared / "chat_templates").glob("*.jinja")}
    for path in (Path(trl.__file__).parent / "chat_templates").glob("qwen3_*.jinja"):
        sources[path.stem] = path.read_text()
    seen = {}
    for name, source in sources.items():
        template = Template(source, {"bos_token": "<s>", "eos_token": "</s>"}, SPECIAL)
        schemas, parse, called = [], None, "A"
        try:
            parse = tools.parser_of(template)
        except InputError:
            pass
        else:
            schemas = SCHEMAS
            called = EMPTY_CALLS[parse.__name__]
        if not template.turn_end:
            continue
        said = doubts(template, parse, schemas)
        seen[name] = [what for what in KINDS if f"{what}: " in said]
        assert seen[name] == unstable(source, parse, schemas, called), name
        assert "which tools there are" not in said
    assert len(seen) > 20 and seen["phi3.5_mini"] == [] and seen["qwen3"] == ["space around them"]
    assert seen["llama3.1"] == ["space around them"] and seen["qwen3_training"] == KINDS[:2]


def test_reasoning_that_a_template_drops_once_a_user_replies_is_quoted():
    import trl

    source = (Path(trl.__file__).parent / "chat_templates/qwen3.jinja").read_text()
    said = doubts(Template(source, {"eos_token": "<|im_end|>"}, SPECIAL), None, [])
    assert said == (
        "warning: the chat template writes earlier turns otherwise than they were sampled; "
        "rollouts keep the sampled tokens (reasoning: 'assistant\\n<think>\\nT\\n</think>\\n\\n' "
        "becomes 'assistant\\nA<|im_end|>\\n<|im_sta')"
    )
    plain = Template(toy.TEMPLATE, {"eos_token": "<|end|>"}, toy.SPECIAL)
    assert doubts(plain, None, []) == ""
    hidden = toy.TOOLS_TEMPLATE.replace("for tool in tools or []", "for tool in []")
    said = doubts(Template(hidden, {"eos_token": "<|end|>"}, toy.SPECIAL), HERMES_CALLS, SCHEMAS)
    first, second = said.splitlines()
    assert first == "warning: the chat template does not tell the model which tools there are"
    assert "tokens (space around them: 'ssistant|> <tool_call>" in second


# -------------------------------------------------------------------------- with the engine itself
class Talk:
    """Replies with a digit, three times."""

    def reset(self, row):
        self.turn = 0

    def step(self, completion):
        self.turn += 1
        return [{"role": "user", "content": str(self.turn)}], len(completion), self.turn == 3


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """-> (model, tokenizer, Environments, rows): a random model whose answers often end."""
    path = tmp_path_factory.mktemp("talk") / "talk.py"
    path.write_text(f"class Talk:{inspect.getsource(Talk).partition(':')[2]}")
    tokenizer = toy_tokenizer()
    model = small_model(vocab_size=tokenizer.vocab_size, max_position_embeddings=512)
    with torch.no_grad():
        model.head_weight[1] *= 2  # <|end|>
    environments = Environments(f"{path}:Talk", tokenizer, 10, 5.0, 512)
    rows = [{"prompt": [user(f"{i}+{i}")]} for i in range(10)]
    rows = [{**row, "prompt_ids": tokenizer.prompt_ids(row["prompt"])} for row in rows]
    return model, tokenizer, environments, rows


def all_of(groups):
    return [rollout for group in groups for rollout in group]


def same(one, other):
    for a, b in zip(all_of(one), all_of(other), strict=True):
        assert a.ids == b.ids and a.finish == b.finish and a.episode.reward == b.episode.reward
        assert (a.sampled == b.sampled).all() and (a.versions == b.versions).all()
        assert abs(a.logp - b.logp).max() < 1e-5


SAMPLING = Sampling(40, 0.9)


def test_the_engines_log_probs_are_the_trainers_over_all_turns(talk, alone):
    model, tokenizer, environments, rows = talk
    engine = Engine.of(model, tokenizer, rows=16)
    groups = environments.play(engine, rows, 3, SAMPLING, list(range(0, 1000, 100)))
    rollouts = all_of(groups)
    assert sum(not r.sampled.all() for r in rollouts) > 5
    assert {r.finish for r in rollouts} == {"stop", "length"}
    examples = [r.example() for r in rollouts]
    for e, logp in zip(examples, logprobs(model, examples, 2000, 0.9, "cpu")):
        assert abs(logp - e.columns["engine_logp"]).max() < 1e-5
        assert not logp[~e.mask].any()
    turns = [tokenizer.encode(f"<|user|>{k}<|assistant|>") for k in (1, 2)]
    for r in rollouts:
        runs = [[i for i, _ in run] for drawn, run in groupby(zip(r.ids, r.sampled), itemgetter(1))]
        assert runs[1::2] == turns[: len(runs) // 2]
        assert all(run[-1] in tokenizer.stop_ids for run in runs[: len(runs) - 1 : 2])
        assert r.episode.reward > 0 and len(r.episode.messages) == len(runs)
    drawn = [tuple(r.ids) for r in rollouts]
    assert len(set(drawn)) == len(drawn)


def test_episodes_are_the_same_alone_ahead_and_replayed(talk, alone, tmp_path):
    model, tokenizer, environments, rows = talk
    seeds = [100 * i for i in range(10)]
    engine = Engine.of(model, tokenizer)
    groups = environments.play(engine, rows, 3, SAMPLING, seeds)
    for p in (2, 7):
        same(environments.play(engine, rows[p : p + 1], 3, SAMPLING, seeds[p : p + 1]), [groups[p]])
    world = SimpleNamespace(rank=0, size=1)

    def request(indices, serials):
        return [rows[i]["prompt_ids"] for i in indices], 3, SAMPLING, [100 * i for i in indices]

    share = partial(packing.share, 10, 0, world=world)
    recording = Recording(tmp_path, world, 0)
    ahead = Ahead(engine, share, request, 3, 5, staleness=1, recording=recording)
    taken, _ = ahead.share(0, 5)
    ran_ahead = environments.play(
        ahead, [rows[i] for i in taken], 3, SAMPLING, [100 * i for i in taken]
    )
    same(ran_ahead, [groups[i] for i in taken])
    replay = Replay(tmp_path, world)
    again = environments.play(
        replay, [rows[i] for i in taken], 3, SAMPLING, [100 * i for i in taken]
    )
    same(again, ran_ahead)
    ahead.close()


def test_with_reproducible_episodes_are_played_by_chunks(talk, monkeypatch):
    """The rollouts that the engine computes side by side are those of one chunk of prompts: the
    same on any number of ranks."""
    _, tokenizer, environments, rows = talk
    monkeypatch.setattr(dist, "reproducible", True)
    texts = [["a<|end|>", "b<|end|>", "c<|end|>"]] * 2
    engine = Says(tokenizer, texts)
    environments.play(engine, rows, 2, SAMPLING, [0] * 10)
    assert [len(prompts) for prompts, _, _ in engine.calls] == [8, 16, 16, 2, 4, 4]


def test_a_rank_without_prompts_plays_nothing(talk):
    model, tokenizer, environments, _ = talk
    assert environments.play(Engine.of(model, tokenizer), [], 3, SAMPLING, []) == []


# ---------------------------------------------------------------------------------------- rewards
def test_rewards_get_the_messages_and_the_environments(folder, alone):
    """As TRL's do; `exact` and its like read the last answer."""
    tokenizer = toy_tokenizer()
    texts = [[call_of("guess", number=7), "7<|end|>"], [call_of("guess", number=1), "7?<|end|>"]]
    row = {"secret": 7, "answer": "7"}
    group, _, _ = played(folder / "theirs.py", "Vault", tokenizer, texts, row)
    specs = ["environment", "exact", f"{folder / 'theirs.py'}:opened"]
    functions, weights = rewards.load(specs, None)
    assert rewards.check(functions, [{"prompt": [user("Q")], "answer": "7"}]) == ""
    row = {"prompt": [user("Q")], "answer": "7"}
    reward_FPG = rewards.score(functions, tokenizer, [row], [group])
    assert reward_FPG.tolist() == [[[1.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]]]
    assert [f.name for f in functions] == ["environment", "exact", "opened"]
    seen = []

    def look(completions, environments, environment_rewards, **columns):
        seen.extend(zip(completions, environments, environment_rewards))
        return [0.0] * len(completions)

    rewards.score([rewards.Reward("look", look)], tokenizer, [row], [group])
    for r, (messages, environment, reward) in zip(group, seen):
        assert messages == r.episode.messages and messages is not r.episode.messages
        assert environment is r.episode.environment and reward == r.episode.reward
    with pytest.raises(InputError, match="missing a required argument: 'environments'"):
        rewards.score(
            [rewards.Reward("look", look)],
            tokenizer,
            [row],
            [[Rollout([1], [2], np.zeros(1), "stop", 0)]],
        )


def test_an_environment_that_gave_no_reward_leaves_its_rollout_unrewarded(folder, alone):
    texts = [["boom<|end|>"], ["fine<|end|>"], ["none<|end|>"]]
    group, _, _ = played(folder / "own.py", "Countdown", toy_tokenizer(), texts, {"turns": 1})
    functions, _ = rewards.load(["environment"], None)
    scores = rewards.score(functions, toy_tokenizer(), [{"prompt": [user("Q")]}], [group])
    assert scores[0, 0].isnan().tolist() == [True, False, True] and scores[0, 0, 1] == 4


def test_without_tools_there_are_no_metrics_of_tools(alone):
    group = [Rollout([1], [2], np.zeros(1, np.float32), "stop", 0)]
    assert not [name for name in length_metrics([group]) if name.startswith("tools/")]
    group[0].episode = Episode(None, calls=0)
    found = length_metrics([group])
    assert found["tools/call_frequency"] == 0 and "tools/failure_frequency" not in found


# ------------------------------------------------------------------------------------------- flags
def flags(*given):
    parser = cli.parser("", out="out", lr=1.0)
    cli.add_rollout_flags(parser)
    return parser.parse_args(["--model", "m", "--data", "d", *map(str, given)])


def test_flags_say_which_environment(folder):
    tokenizer, theirs = toy_tokenizer(), folder / "theirs.py"
    rows = [{"prompt": [user("Q")], "__line__": "f:1"}]
    assert cli.environment(flags(), tokenizer, 512, rows) is answer_once
    args = flags("--env", f"{theirs}:Vault", "--tokens", 300, "--max_turns", 3, "--env_timeout", 2)
    found = cli.environment(args, tokenizer, 512, rows, sides=2).__self__
    assert args.reward == ["environment"] and rows[0]["tools"] == found.schemas
    assert (found.turns, found.timeout, found.room) == (3, 2.0, 150)
    assert [x["function"]["name"] for x in found.schemas] == ["guess", "hang", "rest"]
    (kept,), _ = tokenizer.with_prompts((rows,), None, 9, 512, 512)
    assert tokenizer.decode(kept[0]["prompt_ids"]).startswith("<|tool|>guess<|tool|>hang")
    args = flags("--env", f"{theirs}:Vault", "--reward", "exact", "--engine_tokens", 77)
    rows = [{"prompt": [user("Q")]}]
    assert cli.environment(args, tokenizer, 512, rows).__self__.room == 77
    assert args.reward == ["exact"]


@pytest.mark.parametrize(
    "given, row, said",
    [
        (["--reward", "environment"], {}, "needs an environment: --env file.py:Class"),
        (["--max_turns", "3"], {}, "--max_turns is about an environment"),
        (["--env_timeout", "3"], {}, "--env_timeout is about an environment"),
        (["--env", "Bare"], {}, "Bare has no get_reward..: give a --reward too"),
        (["--env", "Bare", "--reward", "environment"], {}, "has no get_reward..: give another"),
        (
            ["--env", "Vault"],
            {"prompt": "Q"},
            "f:1: --env needs prompts that are messages: --to_me",
        ),
        (["--env", "Vault"], {"tools": [{}]}, "f:1: the row has tools, and so has --env"),
    ],
)
def test_flags_that_do_not_fit_get_one_sentence(folder, given, row, said):
    given = [f"{folder / 'theirs.py'}:{x}" if x in ("Bare", "Vault") else x for x in given]
    rows = [{"prompt": [user("Q")], "__line__": "f:1", **row}]
    with pytest.raises(InputError, match=said):
        cli.environment(flags(*given), toy_tokenizer(), 512, rows)
