"""Rollouts that run ahead of the loop, in a thread.

The thread takes prompts in the order of the data, and a step trains on the prompts that it would
train on without the thread: what finishes first changes nothing, so there is no bias towards short
completions. Only the weights that sample are older, by admission: a prompt begins when the step
that will train on it is at most `staleness` steps away. There are no collectives in the thread,
since those of two threads would mix.
"""

import threading
from collections import deque
from collections.abc import Callable

import torch

from nanopost.engine import Sampling
from nanopost.recording import Recording
from nanopost.rollout import Rollout

LEAVE_WITHIN = 10.0  # seconds for the thread to end


class Ahead:
    """The engine as a loop uses it: share says which prompts come next, generate answers them."""

    def __init__(
        self,
        engine,
        share: Callable,
        request: Callable,
        steps: int,
        prompts: int,
        staleness: int = 0,
        recording: Recording | None = None,
    ):
        """share(first, count): packing.share, -> this rank's row indices and serials. request(row
        indices, serials): what engine.generate is asked for them. prompts: of a step, over all
        ranks, at least. staleness: by how many steps weights that sample may be older than those
        that train; 0: no thread. recording: of what the loop gets.
        """
        self.engine, self.staleness, self.recording = engine, staleness, recording
        self._share, self.request = share, request
        self.steps, self.prompts = steps, prompts
        self.version = self.step = 0  # of the weights; what is sampled now belongs to this step
        self.started = 0  # the serial before which all prompts have begun
        self.changed = threading.Condition()  # guards what follows
        self.thread = self.error = None
        self.calls = deque()  # (prompts, n, sampling, seeds), to come
        self.begun = {}  # _keys of what is in calls, running or finished -> serial
        self.finished = {}  # of these, what is finished
        self.arrived = 0  # groups that have finished
        if staleness:
            # Before the workers of a ThreadPoolExecutor are waited for, which atexit is not.
            threading._register_atexit(self.close)

    def share(self, first: int, count: int) -> tuple[list[int], list[int]]:
        """This rank's share of the `count` prompts after the first `first`, for this step: (row
        indices, serials). They begin, and so do those of the next `staleness` steps."""
        self.step = self.version + 1
        if self.staleness:
            self._begin(first, count)
        return self._share(first, count)

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int]
    ) -> list[list[Rollout]]:
        """As the engine. What has not begun, such as an evaluation, comes next."""
        if self.staleness:
            groups = self._wait_for(prompts, n, sampling, seeds)
        else:
            groups = self.engine.generate(prompts, n, sampling, seeds)
        if self.recording is not None:
            self.recording.add(self.step, self.version, n, sampling, seeds, groups)
        return groups

    def sync_weights(self, named_tensors, version: int):
        """As the engine, in which the thread may be generating."""
        self.engine.sync_weights(named_tensors, version)
        self.version = self.step = version

    def sleep(self):
        """As the engine."""
        self.engine.sleep()

    def close(self):
        """End the thread and close the engine. An exit does this too."""
        with self.changed:
            self.calls.clear()
            thread = self.thread
        self.engine.close()
        if thread is not None:
            thread.join(LEAVE_WITHIN)

    # ------------------------------------------------------------------------------------- thread
    def _begin(self, first, count):
        steps_ahead = min(self.staleness, self.steps - self.step)
        end = first + count + steps_ahead * self.prompts
        with self.changed:
            self._check()
            for key in [key for key, serial in self.begun.items() if serial < first]:
                del self.begun[key]  # a loop that asks for other prompts has not taken it
                self.finished.pop(key, None)
            begin = max(self.started, first)
            until = max(begin, first + count)
            while begin < end:
                if until > begin:
                    indices, serials = self._share(begin, until - begin)
                    call = self.request(indices, serials)
                    self.begun |= zip(_keys(*call), serials)
                    self._call(call)
                begin, until = until, min(until + self.prompts, end)
            self.started = max(self.started, end)

    def _wait_for(self, prompts, n, sampling, seeds):
        keys = _keys(prompts, n, sampling, seeds)
        with self.changed:
            new = [i for i, key in enumerate(keys) if key not in self.begun]
            self.begun |= {keys[i]: float("inf") for i in new}
            self._call(([prompts[i] for i in new], n, sampling, [seeds[i] for i in new]), next=True)
            self._check()
            while not all(key in self.finished for key in keys):
                self.changed.wait()
                self._check()
            for key in keys:
                del self.begun[key]
            return [self.finished.pop(key) for key in keys]

    def _call(self, call, next=False):
        """Hand a call to the thread, which lives as long as there are any. Holds `changed`."""
        if not call[0]:
            return
        if next:
            self.calls.appendleft(call)
        else:
            self.calls.append(call)
        if self.thread is None:
            device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            self.thread = threading.Thread(target=self._work, args=(device,), daemon=True)
            self.thread.start()

    def _check(self):
        if self.error is not None:
            raise self.error

    def _work(self, device):
        if device is not None:
            torch.cuda.set_device(device)  # a new thread has the first one
        while True:
            with self.changed:
                if not self.calls:
                    self.thread = None
                    return
                call = self.calls.popleft()
            try:
                groups = self.engine.generate(*call)
            except BaseException as error:  # the loop raises it
                with self.changed:
                    self.error = error
                    self.calls.clear()
                    self.thread = None
                    self.changed.notify_all()
                return
            with self.changed:
                for key, group in zip(_keys(*call), groups):
                    self.arrived += 1
                    for rollout in group:
                        rollout.arrived = self.arrived
                    if key in self.begun:
                        self.finished[key] = group
                self.changed.notify_all()


def _keys(prompts, n, sampling, seeds) -> list[tuple]:
    """What tells the groups of a call from others."""
    return [(tuple(prompt), n, sampling, seed) for prompt, seed in zip(prompts, seeds)]
