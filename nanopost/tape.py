"""What the trainer computed for each example while it was trained, for the records of a run.

Shapes: N packed tokens of a micro-batch, T tokens of one sequence.
"""

import torch

from nanopost.batch import Batch, Example
from nanopost.dist import gather
from nanopost.forward import digest_of


class Tape:
    """Of one step at a time. While it is off it does nothing, so that a loop need not ask."""

    def __init__(self, on: bool):
        self.on = on
        self._clear()

    def _clear(self):
        self.passes = []  # of the optimizer step that goes on: (batch, numbers)
        self.updates = []  # an entry per optimizer step
        # (optimizer step, digest of an example) -> ([rank, pass, place in it], columns)
        self.found = {}
        # id of an example's ids -> (these ids, its digest, the optimizer steps that train it)
        self.home = {}

    def add(self, batch: Batch, **numbers: torch.Tensor):
        """A micro-batch has been through the model: x_N, 0 where masked, or sums over it. They stay
        on their device until `update`."""
        if self.on and not batch.dummy:
            self.passes.append((batch, {name: x.detach() for name, x in numbers.items()}))

    def update(self, examples: list[Example], grad_norm: float, lr: float):
        """An optimizer step ends, in which this rank's `examples` were trained, on any rank."""
        if not self.on:
            return
        number, sums = len(self.updates), {}
        rank = torch.distributed.get_rank()
        for i, (batch, numbers) in enumerate(self.passes):
            columns_S = [{} for _ in batch.examples]
            for name, x in numbers.items():
                if not x.ndim:
                    sums[name] = sums.get(name, 0.0) + float(x)
                    continue
                for columns, x_T in zip(columns_S, batch.split(x)):
                    columns[name] = x_T
            for place, (e, columns) in enumerate(zip(batch.examples, columns_S)):
                self.found[number, digest_of((e,))] = [rank, i, place], columns
        for e in examples:
            new = e.ids, digest_of((e,)), []
            *_, steps = self.home.setdefault(id(e.ids), new)
            if number not in steps:  # a row may be twice in a step
                steps.append(number)
        self.updates.append(({"grad_norm": grad_norm, "lr": lr}, sums))
        self.passes = []

    def take(self, examples: list[Example]) -> tuple[list[dict], list[dict]]:
        """The step ends -> (an entry per optimizer step: grad_norm, lr and the sums over all ranks;
        the columns of each of this rank's examples, which are found by their array of ids). A
        collective.

        minibatch: the numbers of the optimizer steps in which it was trained. micro_batch: in each
        of them [rank, number of the pass, place in it], None if there was none. logp and the like:
        [T], of the first pass, left out if there was none.
        """
        if not self.on:
            return [], [{} for _ in examples]
        found = dict(gather(list(self.found.items())))
        every_rank = gather([self.updates])
        updates = []
        for parts in zip(*every_rank):
            entry = dict(parts[0][0])
            for _, sums in parts:
                for name, x in sums.items():
                    entry[name] = entry.get(name, 0.0) + x
            updates.append(entry)
        lines = []
        for e in examples:
            _, digest, steps = self.home.get(id(e.ids), (None, None, []))
            passes = [found.get((number, digest)) for number in steps]
            line = {"minibatch": steps, "micro_batch": [p and p[0] for p in passes]}
            first = next((p for p in passes if p), (None, {}))
            lines.append(line | first[1])
        self._clear()
        return updates, lines
