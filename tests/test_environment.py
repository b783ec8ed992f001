"""Episodes of several turns: ids and masks spelled out, TRL's own loop as an oracle, what goes
wrong in environments, and what surrounds them: seeds, rewards, records, rollouts ahead."""

import json
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chats import make, user
from small import small_model

from nanopost import InputError, advantages, cli, dist, rewards, tools
from nanopost.ahead import Ahead
from nanopost.batch import padded
from nanopost.engine import Engine, Sampling
from nanopost.environment import Environments, answer_once, doubts
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

import time


class Vault:
    """A number is hidden; a guess is told whether it is too low or too high."""

    made = 0

    def __init__(self):
        Vault.made += 1
        self.tries = -1

    def reset(self, secret=7, **kwargs) -> str | None:
        self.secret, self.tries, self.open = secret, 0, False
        self.columns = sorted(kwargs)
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
        time.sleep(seconds)
        return "done"

    def _hidden(self):
        pass

    async def get_reward(self):
        return 1.0 / self.tries if self.open else 0.0


class Bare:
    def reset(self, **kwargs):
        self.said = []

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


def test_failing_environments_end_their_episodes_and_it_is_said(folder, capsys):
    texts = [[f"{word}<|end|>", "x<|end|>"] for word in ("boom", "sleep", "exit", "none", "fine")]
    began = time.monotonic()
    group, engine, found = played(
        folder / "own.py", "Countdown", toy_tokenizer(), texts, {"turns": 2}, timeout=0.3
    )
    assert time.monotonic() - began < 3
    assert [r.episode.reward for r in group] == [None, None, None, 1.0, 5.0]
    errors = [r.episode.error for r in group]
    assert "KeyError: 'boom' (" in errors[0] and "own.py:" in errors[0]
    assert "it takes more than 0.3 s" in errors[1] and "it called exit" in errors[2]
    said = capsys.readouterr().out
    assert (
        "own.py:Countdown: 3 of 5 episodes failed, and have no reward of it; the first: Key" in said
    )
    assert [r.finish for r in group] == ["stop"] * 5 and len(found.idle) == 4
    with pytest.raises(
        InputError, match="all 2 episodes failed: TypeError: step returned '.', not"
    ):
        played(folder / "own.py", "Wrong", toy_tokenizer(), [["a<|end|>"]] * 2)


def test_what_is_no_environment_gets_one_sentence(folder):
    tokenizer, own = toy_tokenizer(), folder / "own.py"
    for name, said in (
        ("function", "give a class that has a method reset"),
        ("Nothing", "has no function or class 'Nothing'; it has Countdown, Broken"),
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
    """What TRL's trainer makes of one prompt and of these answers, turn by turn: its own methods, on
    what they read of a trainer."""
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
TAGS = "<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>"
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
