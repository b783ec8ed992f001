"""The native engine: sampling from the policy over a KV cache.

Shapes: P prompts, R rollouts (n per prompt), B rows of the cache, A some of these rows, T sampled
positions, V vocabulary, C blocks of it.

An engine has four calls: generate, sync_weights, sleep, close. Tokens in, tokens out. The log-prob
of each sampled token is that of the distribution it was drawn from, in fp32. Each rollout draws its
own random numbers, from its own seed. So it depends on weights, prompt, sampling and seed, and, but
for rounding, not on its neighbours, the number of ranks, or the order in which rollouts finish. One
thread may sync the weights, or close the engine, while another one generates. Of a model with
experts each rollout names those that its tokens took, so that the trainer takes the same (moe.py).

Batching is continuous: a rollout that ends gives its row of the cache to the next one. A step draws
one token for each row. It works in place, on shapes that stay the same, and the host reads nothing
from it, so a GPU can repeat it as a CUDA graph.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from nanopost import InputError, dist, hf, lora, moe
from nanopost.attention import ROUTES, Cache
from nanopost.packing import CHUNK
from nanopost.rollout import Rollout

PREFILL_TOKENS = 2**14  # of prompts in one pass: their activations are as large as a micro-batch's
BLOCK = 64  # entries of the vocabulary: a token is drawn from the sums of blocks, then from a block
FREE = -1  # the rollout of a row that has none


@dataclass(frozen=True)
class Sampling:
    """How to sample. Temperature 0 is greedy: all mass on one token, log-prob 0.

    stop: strings that end a completion. top_k, top_p and min_p cut the distribution and
    renormalise it. kept: rollouts name the ids that the cut kept, over which a trainer of ratios
    renormalises too.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    kept: bool = False

    @property
    def cuts(self) -> bool:
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    def held_out(self, temperature: float) -> "Sampling":
        """The same from the whole distribution, at another temperature: to measure a policy."""
        return replace(self, temperature=temperature, top_k=0, top_p=1.0, min_p=0.0)


class Engine:
    """Samples with a CausalLM in this process. The model may be the trainer's own."""

    def __init__(
        self,
        model,
        stop_ids: Iterable[int],
        decode: Callable[[list[int]], str] | None = None,
        rows: int = 512,
        tokens: int = 2**18,
        unused_ids: Iterable[int] = (),
        shared: bool = False,
    ):
        """stop_ids end a completion. decode: token ids to text, which stop strings need.

        rows: maximum completions sampled at once. tokens: maximum tokens of their cache.
        unused_ids: ids of the embedding that no token has; they are never drawn. shared: the model
        is the trainer's own.
        """
        self.model = model
        self.decode = decode
        self.rows, self.tokens = rows, tokens
        self.shared = shared
        self.version = 0
        self.busy, self.next = threading.Lock(), threading.Lock()  # next: who waits for busy
        self.closed = False
        self.stop_ids = sorted(stop_ids)
        self.device = model.head_weight.device
        self.unused_ids = torch.tensor(sorted(unused_ids), dtype=torch.long, device=self.device)
        cuda = self.device.type == "cuda"
        # Looking for ends makes the host wait for the device, and the device then for the host.
        self.check_every = 16 if cuda else 1
        # False: no step is captured as a CUDA graph, as where its experts make the host wait.
        self.graphs = cuda and moe.needs_no_host(model)
        # Each shape is captured by itself, so on CUDA there are few: attention reads a multiple of
        # so many positions, and rows are dropped once one in so many is free.
        self.positions, self.spare = (256, 2) if cuda else (1, 8)

    @classmethod
    def beside(
        cls, model, folder, world, tokenizer, rows: int, tokens: int, ahead: bool = False
    ) -> "Engine":
        """The engine of a training script. model: its policy, loaded from the checkpoint `folder`.

        The engine samples with the model's own tensors if they are whole and in world.dtype. If
        they are shards or fp32 master weights, it gets a full copy in world.dtype. ahead: it
        samples while they change, and always gets a copy. With --reproducible adapters are always
        merged into a copy, as on several ranks: computed beside the base they round otherwise.
        """
        head = model.head_weight
        whole = world.size == 1 and head.dtype == world.dtype and not isinstance(head, DTensor)
        shared = whole and not ahead and not (dist.reproducible and lora.layers(model))
        if not shared:
            model = hf.load_model(folder, world.device, world.dtype)
        return cls.of(model, tokenizer, rows, tokens, shared)

    @classmethod
    def of(
        cls, model, tokenizer, rows: int = 512, tokens: int = 2**18, shared: bool = False
    ) -> "Engine":
        """An engine that stops, decodes and draws ids as a Tokenizer says."""
        unused_ids = tokenizer.unused_ids(model.config.vocab_size)
        stop_ids, decode = tokenizer.stop_ids, tokenizer.decode
        return cls(model, stop_ids, decode, rows, tokens, unused_ids, shared)

    def sync_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int):
        """Copy full weights, under their checkpoint names, into the engine's model.

        If the model is the trainer's own there is nothing to copy or to merge, and ValueError for
        tensors that are not its own: they would be copied into the trainer. A running call to
        generate waits between two tokens, and goes on with the new weights.
        """
        own = dict(self.model.named_parameters())
        if self.shared and isinstance(named_tensors, dist.FullWeights):
            named_tensors = named_tensors.held()
        with torch.no_grad(), self.next, self.busy:
            for name, tensor in named_tensors:
                if not self.shared:
                    own[name].copy_(tensor)
                elif own[name].data_ptr() != tensor.data_ptr():
                    raise ValueError(
                        f"{name}: this engine samples with the trainer's own weights and was given "
                        "others: sync the trainer's, or give the engine a model of its own."
                    )
            self.version = version

    def sleep(self):
        """Nothing to give back: a cache lives only as long as its call to generate."""

    def close(self):
        """End a running call to generate, with an error."""
        self.closed = True

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seeds: list[int] | None = None,
        tell: Callable[[list[int]], None] | None = None,
    ) -> list[list[Rollout]]:
        """n rollouts of each prompt (token ids). Sample i of prompt p draws from seed seeds[p] + i.

        tell: called with the ids that are new, whenever the host has looked for ends: for one
        rollout of one prompt.
        InputError for an empty prompt, an empty stop string, more tokens than model positions or
        than the cache may hold, and for a device that runs out of memory.
        """
        lengths = [len(prompt) for prompt in prompts]
        if 0 in lengths:
            raise InputError(f"prompt {lengths.index(0)} has no tokens to continue from.")
        if "" in sampling.stop:
            raise InputError("--stop: an empty string would end every completion at once.")
        positions = self.model.config.max_positions
        longest = max(lengths, default=0)
        if longest + sampling.max_tokens > positions:
            raise InputError(
                f"a prompt of {longest} tokens and {sampling.max_tokens} new ones exceed the "
                f"model's {positions} positions: lower --max_new_tokens or drop long prompts."
            )
        if longest + sampling.max_tokens > self.tokens:
            raise InputError(
                f"a prompt of {longest} tokens and {sampling.max_tokens} new ones exceed "
                f"--engine_tokens {self.tokens}: raise it, or lower --max_new_tokens."
            )
        seeds = seeds or [0] * len(prompts)
        chunk = CHUNK if dist.reproducible else max(1, len(prompts))
        groups = []
        with self.next:
            self.busy.acquire()
        try:
            for i in range(0, len(prompts), chunk):
                some = slice(i, i + chunk)
                groups += self._generate(prompts[some], n, sampling, seeds[some], tell)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"out of memory while sampling: lower --engine_tokens ({self.tokens}) or "
                f"--engine_rows ({self.rows}). {error}"
            ) from error
        finally:
            self.busy.release()
        return groups

    def _generate(self, prompts, n, sampling, seeds, tell=None) -> list[list[Rollout]]:
        """n rollouts of each prompt. Rollout r is sample r % n of prompt r // n."""
        most, total = sampling.max_tokens, len(prompts) * n
        capacity = max(map(len, prompts)) + most
        size = max(1, min(total, self.rows, self.tokens // capacity))
        rows = Rows.of(self.model, size, capacity, most)
        rollouts = [None] * total
        waiting = 0  # the next rollout
        graphs = {}  # see _next_tokens

        while waiting < total or rows.taken().any():
            # Taking rollouts in costs a pass over their prompts, and dropping rows a copy of the
            # cache: both wait until enough rows are free.
            free_A = (~rows.taken()).nonzero()[0]
            new_R = ()
            if waiting < total and (len(free_A) * 8 >= size or not rows.taken().any()):
                new_R = range(waiting, min(waiting + len(free_A), total))
                waiting = new_R.stop
                prompts_A = [prompts[r // n] for r in new_R]
                seeds_A = [seeds[r // n] + r % n for r in new_R]
                self._take_in(rows, free_A[: len(new_R)], new_R, prompts_A, seeds_A, sampling)
            elif waiting == total and len(free_A) * self.spare >= size:
                rows.keep(rows.taken().nonzero()[0])
                size = len(rows.rollout_B)
                graphs.clear()

            live_A = rows.taken().nonzero()[0]
            masks = []  # [B, V] of each step, of the ids that a cut kept
            steps = min(self.check_every - bool(new_R), most - rows.count_B[live_A].max())
            for _ in range(steps):
                if self._let_others():
                    # What was computed with old weights is computed anew.
                    self._prefill(rows.cache, live_A, rows.prefixes(live_A))
                kept_BV = self._next_tokens(rows, sampling, graphs)
                if kept_BV is not None:
                    masks.append(kept_BV.clone())
                rows.version_BT[live_A, rows.count_B[live_A]] = self.version
                rows.count_B[live_A] += 1

            rows.read(live_A, masks)
            seen_A, count_A = rows.seen_B[live_A], rows.count_B[live_A]
            end_A = self._ends(rows.ids_BT[live_A], seen_A, count_A, sampling.stop)
            length_A = np.where(end_A, end_A, count_A)
            if tell is not None and 0 in rows.rollout_B:
                (a,) = (rows.rollout_B[live_A] == 0).nonzero()[0]
                tell(rows.ids_BT[live_A[a], seen_A[a] : length_A[a]].tolist())
            rows.seen_B[live_A] = count_A
            for a in ((end_A > 0) | (count_A == most)).nonzero()[0]:
                b, finish = live_A[a], "stop" if end_A[a] else "length"
                rollouts[rows.rollout_B[b]] = rows.rollout(b, length_A[a], finish)
                rows.rollout_B[b] = FREE
            rows.idle()
        return [rollouts[i : i + n] for i in range(0, total, n)]

    def _let_others(self) -> bool:
        """Let a waiting thread sync the weights -> whether one has."""
        if self.closed:
            raise RuntimeError("the engine was closed while it generated")
        if not self.next.locked():
            return False
        self.busy.release()
        with self.next:
            self.busy.acquire()
        return True

    def _take_in(self, rows, row_A, new_R, prompts_A, seeds_A, sampling):
        """Give these rows to new rollouts, and draw the first token of each."""
        hidden_PD, prompt_A = self._prefill(rows.cache, row_A, prompts_A)
        logits_AV = self.model.logits(hidden_PD)[prompt_A]
        uniform_AT = torch.stack([_uniforms(seed, sampling.max_tokens) for seed in seeds_A])
        uniform_AT = uniform_AT.to(self.device)
        token_A, logp_A, kept_AV = sample(logits_AV, uniform_AT[:, 0], sampling, self.unused_ids)
        at_A = torch.from_numpy(row_A).to(self.device)
        rows.token_B[at_A] = token_A
        rows.drawn_B[at_A] = 1
        rows.uniform_BT[at_A] = F.pad(uniform_AT, (0, 1))
        rows.record_2BT[:, at_A, 0] = torch.stack([token_A.double(), logp_A.double()])

        rows.rollout_B[row_A] = new_R
        rows.count_B[row_A], rows.seen_B[row_A] = 1, 0
        rows.version_BT[row_A, 0] = self.version
        kept_A1 = [[] for _ in row_A] if kept_AV is None else _ids(kept_AV[:, None])
        for b, prompt, kept in zip(row_A, prompts_A, kept_A1):
            rows.prompt_B[b], rows.start_B[b], rows.kept_B[b] = prompt, len(prompt), kept

    def _prefill(self, cache, row_A, prompts_A):
        """Write prompts into rows of the cache -> (hidden_PD of their last tokens, prompt_A).

        A prompt that neighbours share is computed once: prompt_A says which one each row has. A
        pass holds at most PREFILL_TOKENS tokens, or one prompt.
        """
        row_A = torch.from_numpy(row_A).to(self.device)
        cache.length_B[row_A] = torch.tensor([len(p) for p in prompts_A], device=self.device)
        hidden, prompt, first = [], [], 0
        for prompts, copies in _passes(prompts_A, min(PREFILL_TOKENS, self.tokens)):
            token_N, position_N, cu_seqlens, longest = _packed(prompts, self.device)
            of_A = torch.arange(len(prompts)).repeat_interleave(torch.tensor(copies))
            prompt.append(of_A + sum(map(len, hidden)))
            write = partial(
                cache.write_prompts,
                row_A=row_A[first : first + len(of_A)],
                prompt_A=of_A.to(self.device),
            )
            hidden.append(self.model.prefill(token_N, position_N, cu_seqlens, longest, write))
            first += len(of_A)
        return torch.cat(hidden), torch.cat(prompt).to(self.device)

    def _step(self, rows, sampling):
        """Draw the next token of each row, in place -> kept_BV of `sample`."""
        hidden_BD = self.model.decode(rows.token_B, rows.cache)
        at_B1 = rows.drawn_B.clamp(max=sampling.max_tokens)[:, None]
        uniform_B = rows.uniform_BT.gather(1, at_B1)[:, 0]
        logits_BV = self.model.logits(hidden_BD)
        token_B, logp_B, kept_BV = sample(logits_BV, uniform_B, sampling, self.unused_ids)
        rows.token_B.copy_(token_B)
        drawn_2B1 = torch.stack([token_B.double(), logp_B.double()])[..., None]
        rows.record_2BT.scatter_(2, at_B1.expand(2, -1, -1), drawn_2B1)
        rows.drawn_B.add_(1)
        return kept_BV

    def _next_tokens(self, rows, sampling, graphs):
        """A step; on CUDA as a graph, whose kernels the host launches once and repeats as a whole.

        graphs: positions that attention reads -> None after a first step, which loads the kernels;
        (graph, its kept_BV) after a second. Weights are synced in place, so a graph sees them. It
        is void once rows are dropped: their tensors are new.
        """
        longest = -(-rows.longest() // self.positions) * self.positions
        rows.cache.longest = longest = min(longest, rows.cache.capacity)
        if not self.graphs or longest not in graphs:
            graphs[longest] = None
            return self._step(rows, sampling)
        if graphs[longest] is None:
            graph = torch.cuda.CUDAGraph()
            # thread_local: another thread may train meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                kept_BV = self._step(rows, sampling)
            graphs[longest] = graph, kept_BV
        graph, kept_BV = graphs[longest]
        graph.replay()
        return kept_BV

    def _ends(self, ids_AT, seen_A, drawn_A, stop):
        """How many of its ids each row keeps if it ends among those from seen_A on; else 0.

        drawn_A: how many it has.
        """
        width = int((drawn_A - seen_A).max())
        at_AW = drawn_A[:, None] - np.arange(width, 0, -1)
        hits_AW = np.isin(np.take_along_axis(ids_AT, at_AW.clip(0), 1), self.stop_ids)
        hits_AW &= at_AW >= seen_A[:, None]
        end_A = np.where(hits_AW.any(1), drawn_A - width + hits_AW.argmax(1) + 1, 0)
        if not stop:
            return end_A
        for a, ids in enumerate(ids_AT):
            for t in range(seen_A[a] + 1, (end_A[a] or drawn_A[a]) + 1):
                if self._ends_with(ids[:t], stop):
                    end_A[a] = t
                    break
        return end_A

    def _ends_with(self, ids, stop) -> bool:
        """Whether a stop string has just appeared. It decodes no more of the end than it needs."""
        wanted = max(map(len, stop)) + len(self.decode(ids[-1:])) + 4
        size = wanted
        while True:
            text = self.decode(ids[-size:])
            if any(string in text for string in stop):
                return True
            if size >= len(ids) or len(text) >= wanted:
                return False
            size *= 2


@dataclass
class Rows:
    """The rows of a cache, each of which samples one rollout or is free.

    A step reads and writes the first five, on the device and in place. token_B: the last token,
    which is not in the cache yet. drawn_B: how many are drawn. uniform_BT: the random numbers of
    the rollout. record_2BT: its tokens and their log-probs, both exact in float64, so that the host
    reads them at once. Free rows run on: what they draw goes to the last column, of no token.

    On the host: rollout_B (FREE or its number), prompt_B, start_B (tokens of the prompt), count_B
    (tokens drawn), seen_B (of these, how many the host has looked at), and what it has read.
    """

    cache: Cache
    token_B: torch.Tensor
    drawn_B: torch.Tensor
    uniform_BT: torch.Tensor
    record_2BT: torch.Tensor
    rollout_B: np.ndarray
    prompt_B: list
    start_B: np.ndarray
    count_B: np.ndarray
    seen_B: np.ndarray
    ids_BT: np.ndarray
    logp_BT: np.ndarray
    version_BT: np.ndarray
    kept_B: list
    routed: bool  # the cache has the experts of each token

    @classmethod
    def of(cls, model, size: int, capacity: int, most: int) -> "Rows":
        """Free rows for a model. capacity: tokens of each; most: tokens to sample."""
        weight = model.head_weight
        real = {"dtype": torch.float64, "device": weight.device}
        return cls(
            cache=model.cache(size, capacity),
            token_B=torch.zeros(size, dtype=torch.long, device=weight.device),
            drawn_B=torch.full((size,), most, device=weight.device),
            uniform_BT=torch.zeros(size, most + 1, **real),
            record_2BT=torch.zeros(2, size, most + 1, **real),
            rollout_B=np.full(size, FREE),
            prompt_B=[None] * size,
            start_B=np.zeros(size, np.int64),
            count_B=np.zeros(size, np.int64),
            seen_B=np.zeros(size, np.int64),
            ids_BT=np.zeros((size, most), np.int64),
            logp_BT=np.zeros((size, most), np.float32),
            version_BT=np.zeros((size, most), np.int64),
            kept_B=[None] * size,
            routed=model.config.experts is not None,
        )

    def taken(self) -> np.ndarray:
        return self.rollout_B != FREE

    def longest(self) -> int:
        """Tokens of the longest rollout, with its prompt."""
        return int((self.start_B + self.count_B)[self.taken()].max())

    def prefixes(self, row_A) -> list[list[int]]:
        """What the cache holds of each row."""
        ids_BT = self.record_2BT[0].long().tolist()
        return [self.prompt_B[b] + ids_BT[b][: self.count_B[b] - 1] for b in row_A]

    def read(self, row_A, masks):
        """Copy to the host what these rows have drawn since it last looked."""
        width = int((self.count_B - self.seen_B)[row_A].max())
        at_AW = (self.count_B[row_A, None] - np.arange(width, 0, -1)).clip(0)
        row_A1 = row_A[:, None]
        device = self.token_B.device
        where = torch.from_numpy(row_A1).to(device), torch.from_numpy(at_AW).to(device)
        self.ids_BT[row_A1, at_AW], self.logp_BT[row_A1, at_AW] = (
            self.record_2BT[:, *where].cpu().numpy()
        )
        if masks:
            for b, kept in zip(row_A, _ids(torch.stack(masks, 1)[where[0][:, 0]])):
                self.kept_B[b] += kept

    def rollout(self, b: int, length: int, finish: str) -> Rollout:
        routes = None
        if self.routed:
            given = len(self.prompt_B[b]) + length - 1  # the last token was not given to the model
            (routes_BLTA,) = self.cache.held[ROUTES]
            routes = routes_BLTA[b, :, :given].transpose(0, 1).cpu().numpy()
            routes = np.concatenate([routes, np.full_like(routes[:1], -1)])
        return Rollout(
            self.prompt_B[b],
            self.ids_BT[b, :length].tolist(),
            self.logp_BT[b, :length].copy(),
            finish,
            self.version_BT[b, :length].copy(),
            kept=self.kept_B[b][:length] or None,
            routes=routes,
        )

    def idle(self):
        """Let the free rows run where they do no harm."""
        if not self.taken().all():
            free_A = torch.from_numpy((~self.taken()).nonzero()[0]).to(self.token_B.device)
            self.drawn_B[free_A] = self.record_2BT.shape[2] - 1
            self.cache.length_B[free_A] = 0

    def keep(self, row_A):
        """Keep these rows only."""
        at_A = torch.from_numpy(row_A).to(self.token_B.device)
        self.cache.keep(at_A)
        self.record_2BT = self.record_2BT[:, at_A]
        for name in ("token_B", "drawn_B", "uniform_BT"):
            setattr(self, name, getattr(self, name)[at_A])
        numbers = ("rollout_B", "start_B", "count_B", "seen_B", "ids_BT", "logp_BT", "version_BT")
        for name in numbers:
            setattr(self, name, getattr(self, name)[row_A])
        for name in ("prompt_B", "kept_B"):
            setattr(self, name, [getattr(self, name)[b] for b in row_A])


def sample(logits_BV, uniform_B, sampling: Sampling, unused_ids=None):
    """Draw one token per row -> (token_B, logp_B in fp32, kept_BV).

    Inverts the cumulative distribution at uniform_B in [0, 1). kept_BV: bool, what the cut kept;
    None if there is no cut or sampling.kept does not ask. unused_ids: int64, never drawn; without a
    cut the log-prob is that of the whole softmax nevertheless, as the trainer's is. The two differ
    by the mass on such ids, which a trained model leaves empty.
    """
    if sampling.temperature == 0:
        likeliest_B = _without(logits_BV, unused_ids).argmax(-1)
        return likeliest_B, torch.zeros(len(logits_BV), device=logits_BV.device), None
    if sampling.temperature != 1:
        logits_BV = logits_BV / sampling.temperature
    kept_BV = None
    if sampling.cuts:
        # Shares of the mass are of what may be drawn.
        log_p_BV = _without(logits_BV, unused_ids).log_softmax(-1)
        logits_BV = cut(log_p_BV, sampling.top_k, sampling.top_p, sampling.min_p)
        if sampling.kept:
            kept_BV = logits_BV > -torch.inf
    max_B1 = logits_BV.amax(-1, keepdim=True)
    past_the_end = -logits_BV.shape[1] % BLOCK
    p_BV = F.pad(logits_BV, (0, past_the_end), value=-torch.inf).sub_(max_B1).exp_()
    p_BCV = p_BV.unflatten(1, (-1, BLOCK))
    mass_BC = p_BCV.sum(-1).double()  # each row's p is off by the same factor
    log_mass_B1 = mass_BC.sum(-1, keepdim=True).log()
    if unused_ids is not None and len(unused_ids):
        p_BV.index_fill_(1, unused_ids, 0.0)
        mass_BC = p_BCV.sum(-1).double()
    block_B1, share_B1 = _invert(mass_BC, uniform_B[:, None])
    row_B = torch.arange(len(p_BCV), device=p_BCV.device)
    of_block_B1, _ = _invert(p_BCV[row_B, block_B1[:, 0]].double(), share_B1)
    token_B1 = block_B1 * BLOCK + of_block_B1
    logp_B1 = logits_BV.gather(1, token_B1) - max_B1 - log_mass_B1
    return token_B1[:, 0], logp_B1[:, 0].float(), kept_BV


def _invert(mass_BX, share_B1):
    """Where the sum of the masses first exceeds this share of all, and which share of that entry
    lies below -> index_B1, share_B1. An entry without mass is never found."""
    sum_BX = mass_BX.cumsum(-1)
    whole_B1 = sum_BX[:, -1:]
    # A product may round up to the whole, which no sum exceeds.
    wanted_B1 = (share_B1 * whole_B1).minimum(whole_B1.nextafter(torch.zeros_like(whole_B1)))
    index_B1 = torch.searchsorted(sum_BX, wanted_B1, right=True).clamp_(max=mass_BX.shape[1] - 1)
    found_B1 = mass_BX.gather(1, index_B1)
    below_B1 = wanted_B1 - (sum_BX.gather(1, index_B1) - found_B1)
    return index_B1, (below_B1 / found_B1).clamp_(0, 1)


def _without(x_BV, ids):
    if ids is None or not len(ids):
        return x_BV
    return x_BV.index_fill(1, ids, -torch.inf)


def cut(log_p_BV, top_k: int, top_p: float, min_p: float):
    """Cut the distribution and renormalise it; 0, 1.0 and 0.0 switch the three cuts off.

    It keeps the top_k likeliest tokens; of these, the fewest that hold top_p of the mass; of these,
    the ones at least min_p times as likely as the likeliest.
    """
    if top_k and top_k < log_p_BV.shape[1]:
        least = log_p_BV.topk(top_k).values[:, -1:]
        log_p_BV = log_p_BV.masked_fill(log_p_BV < least, -torch.inf).log_softmax(-1)
    if top_p < 1:
        sorted_BV, order_BV = log_p_BV.sort(-1, descending=True)
        before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()
        dropped_BV = torch.zeros_like(before_BV, dtype=torch.bool)
        dropped_BV.scatter_(1, order_BV, before_BV >= top_p)
        log_p_BV = log_p_BV.masked_fill(dropped_BV, -torch.inf).log_softmax(-1)
    if min_p:
        least = log_p_BV.max(-1, keepdim=True).values + float(np.log(min_p))
        log_p_BV = log_p_BV.masked_fill(log_p_BV < least, -torch.inf)
    return log_p_BV.log_softmax(-1)


def _ids(kept_ATV) -> list[list[np.ndarray]]:
    """Where a mask is True -> [A][T] of int32 arrays, on the host."""
    rows, tokens, _ = kept_ATV.shape
    id_E = kept_ATV.nonzero()[:, 2].int().cpu().numpy()
    end_AT = kept_ATV.sum(2).flatten().cumsum(0).cpu().numpy()
    ids = np.split(id_E, end_AT[:-1])
    return [ids[a * tokens : (a + 1) * tokens] for a in range(rows)]


def prompt_seed(seed: int, serial: int) -> int:
    """The seed of a run's serial-th prompt, the same on any rank; sample i adds i to it."""
    return int(np.random.SeedSequence((seed, serial)).generate_state(1, np.uint64)[0] >> 2)


def _uniforms(seed, count):
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _passes(prompts_B, most) -> Iterator[tuple[list, list[int]]]:
    """(prompts, how many rows in succession each one has), at most `most` tokens at once."""
    prompts, copies, tokens = [], [], 0
    for prompt in prompts_B:
        if prompts and prompt is prompts[-1]:
            copies[-1] += 1
            continue
        if prompts and tokens + len(prompt) > most:
            yield prompts, copies
            prompts, copies, tokens = [], [], 0
        prompts.append(prompt)
        copies.append(1)
        tokens += len(prompt)
    yield prompts, copies


def _packed(prompts, device):
    """Prompts as one stream -> token_N, position_N, cu_seqlens, longest; no targets, no shift."""
    lengths = np.array([len(prompt) for prompt in prompts])
    cu_seqlens = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    position_N = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
    token_N = np.concatenate([np.asarray(prompt) for prompt in prompts]).astype(np.int64)
    arrays = [token_N, position_N, cu_seqlens]
    token_N, position_N, cu_seqlens = [torch.from_numpy(x).to(device) for x in arrays]
    return token_N, position_N, cu_seqlens, int(lengths.max())
