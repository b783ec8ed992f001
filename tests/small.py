"""Small random models for tests, one of each architecture, with weights large enough that their
distributions are far from uniform."""

import torch

from nanopost.config import FAMILIES, Config
from nanopost.model import CausalLM

SIZES = {
    "hidden_act": "silu",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
# model_type -> what else its config.json says: layers of every kind that it has.
ARCHITECTURES = {
    "qwen3_5_text": {
        "num_hidden_layers": 4,
        "layer_types": 3 * ["linear_attention"] + ["full_attention"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
    },
    "gemma3_text": {
        "num_hidden_layers": 3,
        "layer_types": 2 * ["sliding_attention"] + ["full_attention"],
        "sliding_window": 6,
        "query_pre_attn_scalar": 12,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    },
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": 0, "bos_token_id": None},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "qwen3_5_moe_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
}


def small_config(model_type: str = "qwen3", **changes) -> Config:
    names = {"model_type": model_type, "architectures": [FAMILIES[model_type].causal]}
    return Config.of({**SIZES, **names, **ARCHITECTURES.get(model_type, {}), **changes})


def small_model(seed: int = 0, **changes) -> CausalLM:
    return CausalLM(small_config(**changes)).init_weights(seed)


def random_ids(length: int, seed: int, vocab: int = 61) -> list[int]:
    return torch.randint(
        0, vocab, (length,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
