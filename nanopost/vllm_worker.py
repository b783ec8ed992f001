"""The server's side of rollouts on vLLM: starts a server that vllm.py can train with.

    python -m nanopost.vllm_worker --model out/sft --port 8000 [any flag of vLLM's server]

Run it from the repository's root, in an environment that has vLLM 0.32. It is vLLM's own server
with the flags that training needs: log-probs after temperature and cuts, none of the model's
default cuts, the routes for token ids and for new weights.

On GPUs weights arrive over NCCL, by vLLM's own engine. On a CPU, where vLLM has none, they arrive
as files in shared memory, by the one below. A server that a dead trainer has left paused gets the
weights of its --model again and goes on (after --max_pause seconds; default 600).
"""

import argparse
import base64
import http.client
import importlib.util
import json
import os
import runpy
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # at the end of the path, our kernels/ hides no package of that name
    ROOT = Path(__file__).resolve().parents[1]
    sys.path = [path for path in sys.path if Path(path).resolve() != ROOT] + [str(ROOT)]
    if importlib.util.find_spec("vllm") is None:
        if {"-h", "--help"} & set(sys.argv):
            print(__doc__)
        sys.exit("error: this environment has no vLLM: pip install -r requirements-vllm.txt")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from vllm.distributed.weight_transfer.base import (  # noqa: E402
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # noqa: E402


# ------------------------------------------------------------------------------------------ weights
@dataclass
class Init(WeightTransferInitInfo):
    """Nothing: a file needs no connection."""


@dataclass
class Update(WeightTransferUpdateInfo):
    """path: a safetensors file of some of the weights, under their checkpoint names. inode: its
    number, by which another file under the same path is noticed."""

    path: str
    inode: int


class SharedMemory(WeightTransferEngine):
    """Weights from files. Its calls are those of vLLM's NCCL engine, in the same order."""

    init_info_cls, update_info_cls = Init, Update

    def init_transfer_engine(self, init_info):
        pass

    def start_weight_update(self):
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info):
        # The base class would synchronise an accelerator here.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info):
        if os.stat(update_info.path).st_ino != update_info.inode:
            raise ValueError(f"{update_info.path}: the file of this update is gone")
        self.model.load_weights(list(load_file(update_info.path).items()))

    def finish_weight_update(self):
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        repack(self.model)

    def shutdown(self):
        pass


def repack(model):
    """On a CPU vLLM computes with a packed copy of each matrix. Loading weights packs every layer
    anew but for a tied head, which would go on with the weights before, and for experts, whose new
    weights would be read as if they were packed."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(module, ParallelLMHead):
            method.process_weights_after_loading(module)
        elif getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel.fused_experts.process_weights_after_loading(module)


if __name__ == "nanopost.vllm_worker":  # a spawned process runs the main module once more
    WeightTransferEngineFactory.register_engine("shm", SharedMemory)


class Extension:
    """--worker-extension-cls: makes each worker import this module, before it makes its engine."""

    def nanopost_sizes(self, names: list[str]) -> dict:
        """What config.json says about the model; None where it says nothing."""
        config = self.model_config.hf_text_config
        return {name: getattr(config, name, None) for name in names}

    def nanopost_abandon(self):
        """End an update that was not finished, if there is one: layers that it has not filled get
        the weights before.

        vLLM keeps what an update that failed had loaded of a layer: the next one would fill the
        layer too early, and drop the rest of it without a word.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        model = self.model_runner.get_model()
        begun = [get_layerwise_info(layer) for layer in model.modules()]
        begun = [info for info in begun if info.can_load()]
        for info in begun:
            info.loaded_weights, info.load_numel = [], 0
        if begun:
            with set_current_vllm_config(self.vllm_config):
                finalize_layerwise_reload(model, self.model_config)
        self._weight_update_active = False

    def nanopost_restore(self):
        """Load the weights of --model again, whatever state an update has left."""
        self.nanopost_abandon()
        model = self.model_runner.get_model()
        self.model_runner.reload_weights()
        if not torch.cuda.is_available():
            repack(model)

    @torch.no_grad()
    def nanopost_prints(self, vectors: dict[str, list[float]]) -> dict:
        """For the audit (audit.py): each matrix times the vector of its width, as the server
        computes it, whatever it has packed the weights into; norms and biases as they are.

        -> {vLLM's name: fp32 numbers in base64}, and "about": how the server computes.
        """
        from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        config = self.vllm_config
        about = {
            "ranks": config.parallel_config.world_size,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "logprobs_mode": str(config.model_config.logprobs_mode),
            "quantization": config.model_config.quantization,
        }
        prints = {}
        if about["ranks"] > 1:  # this worker has only a part of each matrix
            return {"about": about}
        for name, module in self.model_runner.get_model().named_modules():
            if isinstance(module, (RMSNorm, GemmaRMSNorm)) and getattr(module, "has_weight", True):
                prints[f"{name}.weight"] = module.weight
            head = isinstance(module, ParallelLMHead)
            if isinstance(module, LinearBase):
                width, rows = module.input_size, None
            elif isinstance(module, VocabParallelEmbedding):
                width, rows = module.embedding_dim, module.org_vocab_size
            else:
                continue
            if str(width) not in vectors:  # a convolution's
                continue
            x_D = torch.tensor(vectors[str(width)], dtype=config.model_config.dtype)
            x_D = x_D.to(self.device)
            if rows is None or head:
                product = module.quant_method.apply(module, x_D[None], None)[0, :rows]
            else:
                ids = torch.arange(rows, device=self.device)
                parts = [module.quant_method.embedding(module, part) for part in ids.split(4096)]
                product = torch.cat([part.float() @ x_D.float() for part in parts])
            prints[f"{name}.weight"] = product
            if getattr(module, "bias", None) is not None:
                prints[f"{name}.bias"] = module.bias
        for name, x in prints.items():
            prints[name] = base64.b64encode(x.float().cpu().numpy().tobytes()).decode()
        return {"about": about, **prints}


# ------------------------------------------------------------------------------------------- server
def arguments(given: list[str], cuda: bool) -> list[str]:
    """The flags of vLLM's server: those given, and those that training needs, unless given."""
    needed = {
        "--served-model-name": "policy",
        "--generation-config": "vllm",  # else the model's own top_k and top_p apply
        "--logprobs-mode": "processed_logprobs",
        "--enable-scale-out": None,
        "--worker-extension-cls": "nanopost.vllm_worker.Extension",
        "--weight-transfer-config": json.dumps({"backend": "nccl" if cuda else "shm"}),
    }
    if not cuda:
        needed |= {"--dtype": "float32", "--enforce-eager": None}
        # With a seed, a prompt in parts ends vLLM's CPU engine ("does not use offset").
        needed |= {"--no-enable-chunked-prefill": None}
    names = {text.partition("=")[0].replace("_", "-") for text in given if text.startswith("--")}
    result = list(given)
    for name, value in needed.items():
        if name not in names:
            result += [name] if value is None else [name, value]
    return result


def watch(host: str, port: int, limit: float):
    """Free a server that has been paused for `limit` seconds: its trainer is dead. If it cannot be
    reached at http://host:port (TLS, say), this says so, once."""

    def call(path, body=None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://{host}:{port}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read() or b"null")

    began = time.monotonic()
    since, seen, reached = 0.0, None, False
    while True:
        time.sleep(min(5.0, limit / 4))
        try:
            # Each sync has a version of its own: two of them are not one long pause.
            before, seen = seen, call("/weight_info")["weight_version"]
            reached = True
            if not call("/is_paused")["is_paused"] or seen != before:
                since = time.monotonic()
            if time.monotonic() - since < limit:
                continue
            print(f"paused for {limit:g} s: back to the weights of --model", flush=True)
            call("/collective_rpc", {"method": "nanopost_restore"})
            call("/update_weight_version", {"new_version": "restored"})
            call("/resume", {})
        except (OSError, ValueError, http.client.HTTPException):  # not up yet, or going down
            if not reached and time.monotonic() - began > 1800:
                print(f"--max_pause does nothing: no server at http://{host}:{port}", flush=True)
                return


def main():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max_pause", type=float, default=600.0)
    ours, given = parser.parse_known_args()
    if {"-h", "--help"} & set(given):
        print(__doc__)
    os.environ.setdefault("VLLM_SERVER_DEV_MODE", "1")  # the routes for weights
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    where = ["--host", ours.host, "--port", str(ours.port)]
    sys.argv = ["api_server", *arguments([*given, *where], cuda)]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(ours.host, ours.host)
    host = f"[{host}]" if ":" in host else host
    threading.Thread(target=watch, args=(host, ours.port, ours.max_pause), daemon=True).start()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


if __name__ == "__main__":
    main()
