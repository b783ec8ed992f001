"""Environments: what replies to the policy's answers, so that a rollout has several turns.

An environment is a class without arguments whose instances have

    reset(row) -> what the prompt gains: None, text after its last message, or more messages
    step(completion) -> (messages, reward, done): the reply to the text of an answer

or, unchanged, a class of TRL's environment_factory: reset(**columns) -> None or text; its other
public methods are tools, told to the model by their types and docstrings, and an answer without a
call ends the episode. The reward of an episode is the sum of its steps' (which may be None), plus
that of get_reward(), if there is such a method. Methods may be async.

An instance lives in a thread of its own, and plays one episode after another. All rollouts of a
batch play at the same time.

Shapes: P prompts, G completions per prompt.
"""

import asyncio
import copy
import inspect
import os
import queue
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from nanopost import InputError, dist, tools
from nanopost.engine import Sampling
from nanopost.packing import CHUNK
from nanopost.rewards import from_file, guarded
from nanopost.rollout import Rollout, completion_text
from nanopost.rows import place
from nanopost.template import Template
from nanopost.terminal import say
from nanopost.tokenizer import variables

HIDDEN = ("__line__", "prompt_ids", "tools")  # columns of a row that are not for reset


@dataclass
class Episode:
    """What an environment made of a rollout."""

    environment: object  # the instance
    reward: float | None = None  # None: the environment gave none, or failed
    messages: list[dict] = field(default_factory=list)  # after the prompt: answers and replies
    calls: int | None = None  # of tools; None: the environment has none
    failures: int = 0  # of these: malformed, of an unknown tool, with wrong arguments or an error
    failure: str = ""  # the first of them
    error: str = ""  # of the environment itself, which ended the episode


# ----------------------------------------------------------------------------------------- threads
class Worker:
    """A thread that makes one call after another. No exit waits for it."""

    def __init__(self):
        self.calls = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def begin(self, function: Callable, /, *args, **named) -> Future:
        future = Future()
        self.calls.put((future, function, args, named))
        return future

    def close(self):
        """End the thread, once it has made the calls that were begun."""
        self.calls.put(None)

    def _work(self):
        loop = None
        while (call := self.calls.get()) is not None:
            future, function, args, named = call
            try:
                value = function(*args, **named)
                if inspect.isawaitable(value):
                    loop = loop or asyncio.new_event_loop()
                    value = loop.run_until_complete(value)
                future.set_result(value)
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:  # exit() must not end the run
                future.set_exception(RuntimeError(f"it called exit ({error!r})"))


def at_once(players: list["Player"], method: Callable, *columns) -> list:
    """method(player, ...) of all players at the same time -> their results."""
    with guarded():
        futures = [p.waiting.begin(method, p, *args) for p, *args in zip(players, *columns)]
        return [future.result() for future in futures]


class Player:
    """An instance of an environment, and the episode that it plays.

    The instance's methods run in a thread of their own, one at a time, for `timeout` seconds at
    most. What takes longer is left alone, and until it has returned no other method is called.
    """

    def __init__(self, kind: type, timeout: float):
        self.kind, self.timeout = kind, timeout
        self.thread, self.waiting = Worker(), Worker()  # waiting: for what runs in thread
        self.last = None  # Future
        self.environment = None

    def run(self, method: Callable, /, *args, **named):
        """Call a method of the instance. TimeoutError if it does not return in time."""
        if self.is_busy:
            raise TimeoutError("an earlier call has not returned")
        self.last = self.thread.begin(method, *args, **named)
        try:
            return self.last.result(self.timeout)
        except TimeoutError:
            if self.last.done():  # it is the method's own
                raise
            raise TimeoutError(f"it takes more than {self.timeout:g} s (--env_timeout)") from None

    @property
    def is_busy(self) -> bool:
        return self.last is not None and not self.last.done()

    def safely(self, method: Callable, *args):
        """method(*args), or None if it raises: then the episode has failed, and has no reward."""
        if self.episode.error:
            return None
        try:
            return method(*args)
        except Exception as error:  # the user's code may raise anything
            self.episode.reward, self.episode.error = None, told(error)
            return None

    def make(self):
        self.environment = self.run(self.kind)

    def reset(self, row: dict):
        """Begin an episode -> what the prompt gains."""
        self.episode = Episode(self.environment)
        columns = {name: value for name, value in row.items() if name not in HIDDEN}
        return self.safely(self._reset, copy.deepcopy(columns))

    def step(self, text: str) -> list[dict] | None:
        """The reply to an answer; None if the episode is over."""
        return self.safely(self._step, text)

    def end(self):
        """Add get_reward to the reward of the episode."""
        if hasattr(self.environment, "get_reward"):
            self.safely(lambda: self._add(self.run(self.environment.get_reward)))

    def _reset(self, columns):
        return self.run(self.environment.reset, columns)

    def _step(self, text):
        self.episode.messages.append({"role": "assistant", "content": text})
        reply = self.run(self.environment.step, text)
        if not isinstance(reply, tuple) or len(reply) != 3:
            raise TypeError(f"step returned {reply!r:.80}, not (messages, reward, done)")
        messages, reward, done = reply
        self._add(reward)
        return None if done else [dict(message) for message in messages]

    def _add(self, reward):
        if reward is not None:
            self.episode.reward = (self.episode.reward or 0.0) + float(reward)


class ToolPlayer(Player):
    """A class of TRL's environment_factory as an environment that replies with tools' results."""

    def __init__(self, kind: type, timeout: float, parse: Callable):
        """parse: see tools.parser_of."""
        super().__init__(kind, timeout)
        self.parse = parse

    def make(self):
        super().make()
        self.tools = {}
        for name, _ in inspect.getmembers(type(self.environment), inspect.isfunction):
            if name not in ("reset", "get_reward") and not name.startswith("_"):
                self.tools[name] = getattr(self.environment, name)
        self.schemas = [tools.schema(tool) for tool in self.tools.values()]

    def _reset(self, columns):
        self.episode.calls = 0
        return self.run(self.environment.reset, **columns)

    def _step(self, text):
        content, calls = self.parse(text, self.schemas)
        answer = {"role": "assistant", "content": content}
        if well_formed := [call for call in calls if isinstance(call, dict)]:
            answer["tool_calls"] = well_formed
        self.episode.messages.append(answer)
        return [self._result(call, i) for i, call in enumerate(calls)] or None

    def _result(self, call, number) -> dict:
        """The message that replies to a call. The model reads its error, in TRL's words."""
        self.episode.calls += 1
        problem = call if isinstance(call, str) else ""
        if problem:
            call = tools.call("unknown", {}, number)
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        if not problem and name not in self.tools:
            problem = f"Tool {name} not found."
        try:
            if problem:
                raise ValueError(problem)
            content = self.run(self.tools[name], **copy.deepcopy(arguments))
        except Exception as error:  # of the model's call, or of the user's code
            self.episode.failures += 1
            self.episode.failure = self.episode.failure or f"{name}: {told(error)}"
            content = {"error": str(error)}
        return {"role": "tool", "name": name, "tool_call_id": call["id"], "content": str(content)}


def told(error: Exception) -> str:
    """An error of the user's code, with its line."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    at = "" if last.filename == __file__ else f" ({last.filename}:{last.lineno})"
    return f"{type(error).__name__}: {error}{at}"


# ------------------------------------------------------------------------------------------ playing
class Environments:
    """The environments of a run. `play` makes rollouts of their episodes."""

    def __init__(self, spec: str, tokenizer, turns: int, timeout: float, room: int):
        """spec: file.py:Class. turns: answers in an episode, at most. timeout: seconds for a call
        of a method. room: tokens of a conversation, at most. InputError if the class is no
        environment, or if the chat template cannot write its turns.
        """
        self.name, self.tokenizer = f"--env {spec}", tokenizer
        self.turns, self.timeout, self.room = turns, timeout, room
        self.kind = from_file(spec, "--env")
        if not inspect.isclass(self.kind) or not callable(getattr(self.kind, "reset", None)):
            raise InputError(f"{self.name}: give a class that has a method reset.")
        self.is_own = "row" in inspect.signature(self.kind.reset).parameters
        if self.is_own and not callable(getattr(self.kind, "step", None)):
            raise InputError(
                f"{self.name}: beside reset(self, row) it needs step(self, completion)."
            )
        if not tokenizer.template.turn_end:
            raise InputError(
                f"{self.name} needs a chat template that writes a token after each answer: give "
                "one (--chat_template FILE)."
            )
        self.has_reward = self.is_own or hasattr(self.kind, "get_reward")
        self.parse = None if self.is_own else tools.parser_of(tokenizer.template)
        self.warned = False  # that all calls fail
        self.idle = []  # players between two episodes
        self.idle = self._players(1)
        self.schemas = [] if self.is_own else self.idle[0].schemas

    def play(
        self, engine, rows_P: list[dict], n: int, sampling: Sampling, seeds: list[int]
    ) -> list[list[Rollout]]:
        """n rollouts of each row's prompt, each with its episode. Answer k of sample i of prompt p,
        counted from 0, draws from seed seeds[p] + n k + i.

        With finish "length" end also episodes that are not over after `turns` answers, or where a
        further turn and answer might not fit into `room`. With --reproducible, prompts are played
        chunk by chunk (packing.part).
        """
        if dist.reproducible and len(rows_P) > CHUNK:
            groups = []
            for i in range(0, len(rows_P), CHUNK):
                some = slice(i, i + CHUNK)
                groups += self.play(engine, rows_P[some], n, sampling, seeds[some])
            return groups
        players = self._players(len(rows_P) * n)
        self._reset(players, [row for row in rows_P for _ in range(n)], sampling)
        for i, p in enumerate(players):
            p.seed = seeds[i // n] + i % n
        groups = self._first_answers(engine, players, n, sampling, seeds)
        live = players
        for turn in range(1, self.turns + 1):
            texts = [completion_text(p.answer, self.tokenizer) for p in live]
            replies = at_once(live, Player.step, texts)
            live = [p for p, reply in zip(live, replies) if self._goes_on(p, reply, turn, sampling)]
            if not live:
                break
            prompts = [p.rollout.prompt + p.rollout.ids + p.turn_ids for p in live]
            answers = engine.generate(prompts, 1, sampling, [p.seed + n * turn for p in live])
            for p, (answer,) in zip(live, answers):
                p.rollout.extend(p.turn_ids, answer)
                p.answer = answer
        at_once(players, Player.end)
        for p in players:
            p.rollout.episode = p.episode
        self._let_go(players)
        return groups

    def _players(self, count) -> list[Player]:
        """Idle ones, and new ones as far as they do not suffice."""
        new = []
        try:
            while len(self.idle) + len(new) < count:
                if self.is_own:
                    new.append(Player(self.kind, self.timeout))
                else:
                    new.append(ToolPlayer(self.kind, self.timeout, self.parse))
        except RuntimeError as error:  # no new thread
            raise InputError(
                f"{self.name}: {error} for {count} environments, each of which takes two: lower "
                "--prompts, --group or --eval_rows, or raise the limit (ulimit -u)."
            ) from error
        try:
            at_once(new, lambda player: player.make())
        except InputError:  # of a tool's schema
            raise
        except Exception as error:  # of the user's code
            raise InputError(
                f"{self.name}: {self.kind.__name__}() raised {told(error)}."
            ) from error
        players = self.idle + new
        self.idle = players[count:]
        return players[:count]

    def _reset(self, players, rows, sampling):
        """Begin an episode of each row: the player gets the row, its prompt's messages and ids."""
        said = at_once(players, Player.reset, rows)
        for p, row, more in zip(players, rows, said):
            if p.episode.error:
                raise InputError(f"{place(row)}: {self.name}: reset raised {p.episode.error}.")
            p.row, p.prompt, p.prompt_ids = row, row["prompt"], row["prompt_ids"]
            if not more:
                continue
            if isinstance(more, str):
                last = p.prompt[-1]
                more = [{**last, "content": (last["content"] or "") + more}]
                p.prompt = p.prompt[: len(p.prompt) - 1]
            p.prompt = [*p.prompt, *more]
            p.prompt_ids = self.tokenizer.prompt_ids(p.prompt, **variables(row))
            if len(p.prompt_ids) + sampling.max_tokens > self.room:
                raise InputError(
                    f"{place(row)}: with what {self.name} adds, a prompt of {len(p.prompt_ids)} "
                    f"tokens and {sampling.max_tokens} new ones exceed the room of {self.room} "
                    "(--tokens, the model's positions): raise it, or lower --max_new_tokens."
                )

    def _first_answers(self, engine, players, n, sampling, seeds) -> list[list[Rollout]]:
        prompts = [p.prompt_ids for p in players]
        if any(p.prompt_ids != p.row["prompt_ids"] for p in players):
            if getattr(engine, "staleness", 0):
                raise InputError(
                    f"{self.name}: its reset adds to prompts, so rollouts cannot run ahead of it: "
                    "leave out --max_staleness."
                )
            found = engine.generate(prompts, 1, sampling, [p.seed for p in players])
            rollouts = [rollout for (rollout,) in found]
            groups = [rollouts[i : i + n] for i in range(0, len(rollouts), n)]
        else:
            groups = engine.generate(prompts[::n], n, sampling, seeds)
        for p, rollout in zip(players, [rollout for group in groups for rollout in group]):
            p.rollout = p.answer = rollout
        return groups

    def _goes_on(self, p, reply, turn, sampling) -> bool:
        """Whether an episode has another turn, which its player then gets."""
        if reply is None or p.answer.ids[-1] not in self.tokenizer.stop_ids:
            return False
        p.turn_ids = p.safely(self._turn_ids, p, reply)
        if p.turn_ids is None:
            return False
        length = len(p.rollout.prompt) + len(p.rollout.ids) + len(p.turn_ids) + sampling.max_tokens
        if turn == self.turns or length > self.room:
            p.rollout.finish = "length"
            return False
        p.episode.messages += reply
        return True

    def _turn_ids(self, p, reply):
        return self.tokenizer.turn_ids(p.prompt, reply, **variables(p.row))

    def _let_go(self, players):
        """The players may begin other episodes, but for those whose thread hangs."""
        for p in players:
            if p.is_busy:
                p.thread.close()
                p.waiting.close()
            else:
                self.idle.append(p)
        calls = sum(p.episode.calls or 0 for p in players)
        if calls == sum(p.episode.failures for p in players) and calls and not self.warned:
            self.warned = True
            first = next(p.episode.failure for p in players if p.episode.failure)
            say(
                f"warning: {self.name}: each of the {calls} calls of tools in a rollout batch "
                f"failed, the first with {first}; see samples.jsonl, and tools/failure_frequency"
            )
        errors = [p.episode.error for p in players if p.episode.error]
        if len(errors) == len(players) > 1:
            raise InputError(f"{self.name}: all {len(players)} episodes failed: {errors[0]}.")
        if errors:
            say(
                f"warning: {self.name}: {len(errors)} of {len(players)} episodes failed, and have "
                f"no reward of it; the first: {errors[0]}"
            )


def answer_once(engine, rows_P, n: int, sampling: Sampling, seeds) -> list[list[Rollout]]:
    """What Environments.play is without an environment: one answer, and no reply."""
    return engine.generate([row["prompt_ids"] for row in rows_P], n, sampling, seeds)


# ---------------------------------------------------------------------------------- before step 1
def doubts(template: Template, parse: Callable | None, schemas: list[dict]) -> str:
    """Warnings if the template does not show the tools, and if it would write earlier turns of a
    conversation otherwise than they were sampled; or "".

    parse: of tool calls; None: the environment has no tools, and replies as a user.
    """
    question, said = {"role": "user", "content": "Q"}, []
    bare = template.try_render([question], add_generation_prompt=True)
    prompt = template.try_render([question], schemas or None, add_generation_prompt=True)
    if schemas and prompt == bare:
        said.append("warning: the chat template does not tell the model which tools there are")
    text, reply = "A", [{"role": "user", "content": "R"}]
    if parse is not None:
        call = tools.call(schemas[0]["function"]["name"] if schemas else "f", {}, 0)
        written = tools.written(template, [call], schemas)
        before, _ = parse(written, schemas)
        text = written.partition(before)[2].strip() if before else written
        name = call["function"]["name"]
        reply = [{"role": "tool", "name": name, "tool_call_id": call["id"], "content": "R"}]
    thought = "<think>\nT\n</think>\n\n"
    begun = ""
    if prompt.endswith("<think>\n"):
        begun = thought = thought.removeprefix("<think>\n")
    turn = template.turn([question], reply, tools=schemas or None)
    changed = []
    for what, answer in [
        ("answers", begun + text),
        ("space around them", f" {begun + text} \n"),
        ("reasoning", thought + text),
    ]:
        message = {"role": "assistant", "content": answer}
        if parse is not None:
            content, calls = parse(answer, schemas)
            if not calls:  # such an answer ends the episode
                continue
            message |= {"content": content, "tool_calls": calls}
        messages = [question, message, *reply, message, *reply]
        anew = template.try_render(messages, schemas or None, add_generation_prompt=True)
        sampled = prompt + 2 * (answer + template.turn_end + turn)
        if anew != sampled:
            at = len(os.path.commonprefix([anew, sampled]))
            start = max(0, at - 10)
            end = at + 20
            changed.append(f"{what}: {sampled[start:end]!r} becomes {anew[start:end]!r}")
    if changed:
        said.append(
            "warning: the chat template writes earlier turns otherwise than they were sampled; "
            f"rollouts keep the sampled tokens ({'; '.join(changed)})"
        )
    return "\n".join(said)
