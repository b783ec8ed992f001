"""Rollouts by vLLM inside the processes of a run (--engine colocate): the calls of engine.py.

Every rank has a vLLM engine of its own on its own GPU, for its own prompts. It sleeps while the
model trains, without its weights, which each sync brings back.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from nanopost import InputError
from nanopost.engine import Sampling
from nanopost.rollout import Rollout


class Colocated:
    """The engine by vllm.LLM, in this process."""

    def __init__(self, folder, tokenizer, world, config, memory: float, tokens: int):
        """folder: the checkpoint. config: the model's. memory: vLLM's share of the GPU, 0 to 1.
        tokens: of prompt and completion, at most."""
        # The engine runs in this process, not in one that it starts.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        cuda = world.device.type == "cuda"
        if not cuda:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        try:
            with _without_our_kernels():
                from vllm import LLM
        except ImportError as error:
            raise InputError(
                f"--engine colocate needs vLLM, and {error}: pip install -r requirements-vllm.txt."
            ) from error
        self.asleep = False
        self.sleeps = cuda
        self.device, self.form = world.device, config.form
        self.stop_ids = sorted(tokenizer.stop_ids)
        self.positions = min(config.max_positions, tokens)
        self.version = 0
        more = {"distributed_executor_backend": "external_launcher"} if world.size > 1 else {}
        self.llm = LLM(
            str(folder),
            dtype=world.dtype,
            max_model_len=self.positions,
            gpu_memory_utilization=memory,
            enable_sleep_mode=cuda,
            enforce_eager=not cuda,
            generation_config="vllm",  # else the model's own top_k and top_p apply
            logprobs_mode="processed_logprobs",
            seed=world.rank,
            **more,
        )
        # At the end of the process it would tear down the run's own process group.
        self.llm.llm_engine.engine_core._finalizer.detach()

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int] | None = None
    ) -> list[list[Rollout]]:
        """n rollouts of each prompt (token ids). Sample i of prompt p draws from seed seeds[p] + i.

        InputError for what Engine.generate refuses too.
        """
        from vllm import SamplingParams

        lengths = [len(prompt) for prompt in prompts]
        if 0 in lengths:
            raise InputError(f"prompt {lengths.index(0)} has no tokens to continue from.")
        if "" in sampling.stop:
            raise InputError("--stop: an empty string would end every completion at once.")
        longest = max(lengths, default=0)
        if longest + sampling.max_tokens > self.positions:
            raise InputError(
                f"a prompt of {longest} tokens and {sampling.max_tokens} new ones exceed the "
                f"{self.positions} positions of model and --tokens: lower --max_new_tokens or drop "
                "long prompts."
            )
        if sampling.kept and sampling.cuts:
            raise InputError(
                "--engine colocate does not say what --top_k, --top_p or --min_p kept, which the "
                "trainer must know: sample with nanopost's own engine."
            )
        if not prompts:
            return []
        params = [
            SamplingParams(
                n=n,
                seed=int(seed),
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                logprobs=0,  # of the sampled token alone
                stop_token_ids=self.stop_ids,
                ignore_eos=True,  # stop_token_ids say what ends a completion
                stop=list(sampling.stop),
                detokenize=bool(sampling.stop),
                skip_special_tokens=False,
            )
            for seed in seeds or [0] * len(prompts)
        ]
        asked = [{"prompt_token_ids": list(map(int, prompt))} for prompt in prompts]
        answers = self.llm.generate(asked, params, use_tqdm=False)
        return [
            [self._rollout(prompt, sample, sampling) for sample in answer.outputs]
            for prompt, answer in zip(prompts, answers)
        ]

    def _rollout(self, prompt, sample, sampling) -> Rollout:
        ids = list(sample.token_ids)
        logp = [found[token].logprob for token, found in zip(ids, sample.logprobs)]
        logp = np.array(logp, np.float32)
        if sampling.temperature == 0:
            logp = np.zeros_like(logp)
        return Rollout(prompt, ids, logp, sample.finish_reason, self.version)

    def sync_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int):
        """Load full weights, waking up first. A collective.

        After a sleep what a model carries (a vision tower) is not there: no text needs it.
        """
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        named_tensors = self.form.published(named_tensors)  # as in the model's folder
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_tensors})
        if self.device.type == "cpu":
            self.llm.apply_model(_repack)
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()
        self.asleep = False
        self.version = version

    def sleep(self):
        """Give the memory back until the next sync: weights and cache are dropped."""
        if self.sleeps and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def close(self):
        """Nothing to release: the engine ends with the process."""


def _repack(model):
    from nanopost.vllm_worker import repack

    repack(model)


class _without_our_kernels:
    """While this lasts, `import kernels` finds an installed package of that name, not ours."""

    def __enter__(self):
        root = Path(__file__).resolve().parents[1]
        self.path = list(sys.path)
        sys.path = [p for p in sys.path if Path(p or ".").resolve() != root] + [str(root)]

    def __exit__(self, *_):
        sys.path = self.path
