"""A real vLLM server of each family takes a sync and samples from what it got.

Not part of .ci/run: a server takes half a minute to start. On a CPU vLLM 0.32 does not load
Qwen3.5, and its heads are at least 32 wide.
"""

import numpy as np
import pytest
import torch
import vllm_servers
from test_engine import trainer_logp
from test_vllm import ALONE, PROMPTS, SEEDS

from nanopost import hf
from nanopost.config import FAMILIES, Config
from nanopost.engine import Sampling
from nanopost.model import CausalLM
from nanopost.save import save_model
from nanopost.tokenizer import Tokenizer
from nanopost.vllm import Servers
from runs import toy

pytestmark = pytest.mark.slow
SIZES = {
    "vocab_size": 264,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
MORE = {
    "gemma3_text": {
        "layer_types": 2 * ["sliding_attention"] + ["full_attention"],
        "sliding_window": 16,
        "query_pre_attn_scalar": 50,
        "tie_word_embeddings": True,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "smollm3": {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True},
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
}


def write_model(folder, family, seed=0):
    names = {"model_type": family, "architectures": [FAMILIES[family].causal]}
    config = Config.of({**SIZES, **names, **MORE[family]})
    model = CausalLM(config).init_weights(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:  # or a norm that is left out would not be seen
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    save_model(folder, model.state_dict().items(), config, toy.tokenizer_files())


@vllm_servers.needed
@pytest.mark.parametrize("family", MORE)
def test_a_server_takes_a_sync_and_samples_from_it(family, tmp_path, alone):
    write_model(tmp_path / "served", family)
    write_model(tmp_path / "trained", family, seed=1)
    model, tokenizer = hf.load_model(tmp_path / "trained"), Tokenizer.load(tmp_path / "trained")
    with vllm_servers.servers(tmp_path / "served", tmp_path) as urls:
        engine = Servers(urls, tokenizer, ALONE, model.config, timeout=120)
        for version, folder in enumerate(("trained", "served")):
            model = hf.load_model(tmp_path / folder)
            engine.sync_weights(model.state_dict().items(), version)
            groups = engine.generate(PROMPTS, 2, Sampling(24), SEEDS)
            for r in (r for group in groups for r in group):
                np.testing.assert_allclose(r.logp, trainer_logp(model, r, 1.0), atol=1e-3)
        engine.close()
