"""The native engine: sampling from the policy over a KV cache.

Shapes: P prompts, B rows (n per prompt), A rows still alive, T sampled positions, V vocabulary.

An engine has four calls: generate, sync_weights, sleep, close. Tokens in, tokens out. The log-prob
of each sampled token is that of the distribution it was drawn from, in fp32. Each row draws its own
random numbers, from its own seed. So a rollout depends on weights, prompt, sampling and seed, but
not on its neighbours, the number of ranks, or the order in which rows finish. One thread may sync
the weights, or close the engine, while another one generates.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from nanopost import InputError, dist, hf, lora
from nanopost.attention import Cache
from nanopost.packing import CHUNK
from nanopost.rollout import Rollout

PREFILL_TOKENS = 2**14  # of prompts in one pass: their activations are as large as a micro-batch's


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
        # Looking for ends makes the host wait for the device, and the device then for the host.
        self.check_every = 1 if self.device.type == "cpu" else 16

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
        positions = self.model.config.hf.get("max_position_embeddings", 2**31)
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
        rollouts = []
        with self.next:
            self.busy.acquire()
        try:
            for rows in self._parts(lengths, n, sampling.max_tokens):
                prompts_B = [prompts[b // n] for b in rows]
                seeds_B = [seeds[b // n] + b % n for b in rows]
                rollouts += self._generate(prompts_B, sampling, seeds_B, tell)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"out of memory while sampling: lower --engine_tokens ({self.tokens}) or "
                f"--engine_rows ({self.rows}). {error}"
            ) from error
        finally:
            self.busy.release()
        return [rollouts[i : i + n] for i in range(0, len(rollouts), n)]

    def _parts(self, lengths, n, max_tokens) -> Iterator[range]:
        """Rows to sample at once. Row b is sample b % n of prompt b // n. With --reproducible they
        are of one chunk of prompts (packing.part)."""
        first = longest = 0
        for b in range(len(lengths) * n):
            longest = max(longest, lengths[b // n])
            count = b - first + 1
            full = count > self.rows or count * (longest + max_tokens) > self.tokens
            if full or (dist.reproducible and b > first and b % (CHUNK * n) == 0):
                yield range(first, b)
                first, longest = b, lengths[b // n]
        if lengths:
            yield range(first, len(lengths) * n)

    def _generate(self, prompts_B, sampling, seeds_B, tell=None) -> list[Rollout]:
        rows, most, device = len(prompts_B), sampling.max_tokens, self.device
        uniform_BT = torch.stack([_uniforms(seed, most) for seed in seeds_B]).to(device)
        token_BT = torch.zeros(rows, most, dtype=torch.long, device=device)
        logp_BT = torch.zeros(rows, most, device=device)
        # On the host: what was sampled so far, and where each row ends.
        host_BT = np.zeros((rows, most), np.int64)
        length_B = np.full(rows, most)
        stopped_B = np.zeros(rows, bool)
        kept_B = [[] for _ in range(rows)]
        prompt_B = np.array([len(prompt) for prompt in prompts_B])

        logits_AV, cache = self._prefill(prompts_B, most)
        row_A = torch.arange(rows, device=device)
        living_A = np.arange(rows)  # row_A on the host
        seen, versions = 0, []
        masks = []  # [A, V] of each token since `seen`, of the ids that a cut kept
        for t in range(1, most + 1):
            # What was computed with old weights is computed anew.
            if self._let_others():
                sampled_A = token_BT[row_A, : t - 1].tolist()
                prefixes_A = [prompts_B[b] + ids for b, ids in zip(living_A, sampled_A)]
                cache = None  # its memory is free before there is another one
                logits_AV, cache = self._prefill(prefixes_A, most - t + 1)
            versions.append(self.version)
            uniform_A = uniform_BT[row_A, t - 1]
            token_A, logp_A, kept_AV = sample(logits_AV, uniform_A, sampling, self.unused_ids)
            token_BT[row_A, t - 1] = token_A
            logp_BT[row_A, t - 1] = logp_A
            masks.append(kept_AV)
            if t == most or t % self.check_every == 0:
                host_BT[living_A, seen:t] = token_BT[row_A, seen:t].cpu().numpy()
                if sampling.kept and sampling.cuts:
                    for b, kept in zip(living_A, _ids(torch.stack(masks, 1))):
                        kept_B[b] += kept
                masks.clear()
                open_A = living_A[~stopped_B[living_A]]
                end_A = self._ends(host_BT[open_A, :t], seen, sampling.stop)
                length_B[open_A[end_A > 0]] = end_A[end_A > 0]
                stopped_B[open_A] = end_A > 0
                if tell is not None:
                    tell(host_BT[0, seen : min(t, length_B[0])].tolist())
                seen = t
                keep_A = (~stopped_B[living_A]).nonzero()[0]
                if t == most or not len(keep_A):
                    break
                # Dropping rows copies the cache, so it waits until an eighth have finished.
                if len(keep_A) <= len(living_A) * 7 // 8:
                    living_A = living_A[keep_A]
                    kept_A = torch.from_numpy(keep_A).to(device)
                    row_A, token_A = row_A[kept_A], token_A[kept_A]
                    cache.keep(kept_A, int(prompt_B[living_A].max()) + t - 1)
            logits_AV = self.model.logits(self.model.decode(token_A, cache))

        logp_BT = logp_BT.cpu().numpy()
        rollouts = []
        for b in range(rows):
            ids = host_BT[b, : length_B[b]].tolist()
            logp = logp_BT[b, : length_B[b]].copy()
            finish = "stop" if stopped_B[b] else "length"
            version_T = np.array(versions[: len(ids)])
            kept = kept_B[b][: len(ids)] or None
            rollouts.append(Rollout(prompts_B[b], ids, logp, finish, version_T, kept=kept))
        return rollouts

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

    def _prefill(self, prompts_B, max_tokens):
        """-> logits_BV of the first sampled token, and the cache.

        A prompt that neighbours share is computed once; a pass holds at most PREFILL_TOKENS tokens,
        or one prompt.
        """
        config, model = self.model.config, self.model
        lengths_B = [len(prompt) for prompt in prompts_B]
        cache = Cache(
            config.layers,
            lengths_B,
            config.kv_heads,
            max(lengths_B) + max_tokens,
            config.head_dim,
            model.head_weight.dtype,
            self.device,
        )
        logits, first = [], 0
        for prompts, copies in _passes(prompts_B, min(PREFILL_TOKENS, self.tokens)):
            token_N, position_N, cu_seqlens, longest = _packed(prompts, self.device)
            prompt_B = torch.arange(len(prompts)).repeat_interleave(torch.tensor(copies))
            prompt_B = prompt_B.to(self.device)

            write = partial(
                cache.write_prompts,
                cu_seqlens=cu_seqlens,
                max_seqlen=longest,
                first=first,
                prompt_B=prompt_B,
            )
            hidden_PD = model.prefill(token_N, position_N, cu_seqlens, longest, write)
            logits.append(model.logits(hidden_PD)[prompt_B])
            first += len(prompt_B)
        return torch.cat(logits), cache

    def _ends(self, ids_AT, seen, stop):
        """How many of its ids each row keeps if it ends among those from `seen` on; else 0."""
        hits_AT = np.isin(ids_AT[:, seen:], self.stop_ids)
        end_A = np.where(hits_AT.any(1), seen + hits_AT.argmax(1) + 1, 0)
        if not stop:
            return end_A
        for a, ids in enumerate(ids_AT):
            for t in range(seen + 1, (end_A[a] or len(ids)) + 1):
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
    log_p_BV = _without((logits_BV / sampling.temperature).log_softmax(-1), unused_ids)
    kept_BV = None
    if sampling.cuts:
        # Shares of the mass are of what may be drawn.
        log_p_BV = cut(log_p_BV.log_softmax(-1), sampling.top_k, sampling.top_p, sampling.min_p)
        if sampling.kept:
            kept_BV = log_p_BV > -torch.inf
    cdf_BV = log_p_BV.exp().double().cumsum(-1)
    token_B1 = torch.searchsorted(cdf_BV, uniform_B[:, None] * cdf_BV[:, -1:], right=True)
    token_B1 = token_B1.clamp_(max=cdf_BV.shape[1] - 1)
    return token_B1[:, 0], log_p_BV.gather(1, token_B1)[:, 0], kept_BV


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
