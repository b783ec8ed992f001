"""A small random model for tests, with weights large enough that its distributions are far from
uniform."""

import torch

from nanopost.config import Config
from nanopost.model import CausalLM


def small_config(**changes) -> Config:
    return Config.of(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
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
            **changes,
        }
    )


def small_model(seed: int = 0, **changes) -> CausalLM:
    return CausalLM(small_config(**changes)).init_weights(seed)


def random_ids(length: int, seed: int, vocab: int = 61) -> list[int]:
    return torch.randint(
        0, vocab, (length,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
