"""A random Llama around any tokenizer, for runs on real text without weights from a hub."""

from pathlib import Path

from nanopost.config import Config
from nanopost.model import CausalLM
from nanopost.save import save_model
from nanopost.tokenizer import Tokenizer


def write(folder, tokenizer_folder, width: int = 192, layers: int = 4, positions: int = 1024):
    """tokenizer_folder: has a tokenizer.json, and perhaps a tokenizer_config.json."""
    source = Path(tokenizer_folder)
    tokenizer = Tokenizer.load(source)
    config = Config.of(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": width,
            "vocab_size": tokenizer.vocab_size,
            "intermediate_size": width * 8 // 3,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 96,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": positions,
            "tie_word_embeddings": True,
            "initializer_range": 0.06,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
        }
    )
    files = {}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).exists():
            files[name] = (source / name).read_bytes()
    model = CausalLM(config).init_weights(0)
    save_model(folder, model.state_dict().items(), config, files)
