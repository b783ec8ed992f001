"""Rotary position embedding (RoFormer 2104.09864), with the scalings that extend the context.

Shapes: N tokens, H heads, K width of a head.
"""

import math

import torch

from nanopost import InputError

ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}


def read_rope(hf: dict, source: str) -> dict:
    """rope_theta and rope_scaling (transformers 5: rope_parameters) as one dict with rope_type."""
    given = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = given.get("rope_type", given.get("type", "default"))
    rope = {
        "rope_theta": hf.get("rope_theta", 10000.0),
        "max": hf.get("max_position_embeddings", 2048),
        **given,
        "rope_type": kind,
    }
    kinds = ", ".join(ROPE_NEEDS)
    if kind not in ROPE_NEEDS:
        raise InputError(f"{source}: rope type {kind!r} is not one of {kinds}.")
    if any(isinstance(value, dict) for value in given.values()):
        raise InputError(
            f"{source}: a rope type for each kind of layer is not supported, only one of "
            f"{kinds} for all layers."
        )
    missing = [key for key in ROPE_NEEDS[kind] if rope.get(key) is None]
    if missing:
        raise InputError(
            f"{source}: rope type {kind!r} needs {', '.join(missing)}, but config.json has none."
        )
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise InputError(f"{source}: a partial_rotary_factor other than 1 is not supported.")
    return rope


def rope_frequencies(rope: dict, head_dim: int, device=None):
    """Rotary frequencies (RoFormer 2104.09864) -> (inv_freq fp32 [K/2], factor of cos and sin)."""
    kind = rope["rope_type"]
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    freq = 1.0 / rope["rope_theta"] ** exponent
    if kind == "default":
        return freq, 1.0
    if kind == "linear":
        return freq / rope["factor"], 1.0
    if kind == "llama3":
        return _llama3_frequencies(rope, freq), 1.0
    return _yarn_frequencies(rope, freq, head_dim), _yarn_magnitude(rope)


def _original_context(rope):
    return rope.get("original_max_position_embeddings") or rope["max"]


def _llama3_frequencies(rope, freq):
    """Frequencies that turn often within the original context are kept; slow ones are divided."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    turns = _original_context(rope) * freq / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return smooth * freq + (1 - smooth) * freq / factor


def _yarn_frequencies(rope, freq, head_dim):
    """NTK-by-parts, 2309.00071 section 3.2: a ramp over dimensions between the two."""
    original, base = _original_context(rope), rope["rope_theta"]

    def dimension(rotations):
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float32, device=freq.device)
    ramp = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return freq / rope["factor"] * ramp + freq * (1 - ramp)


def _yarn_magnitude(rope):
    """What scales cos and sin, and so the attention's temperature: 2309.00071 section 3.4."""
    magnitude, factor = rope.get("attention_factor"), rope["factor"]
    if magnitude is not None:
        return magnitude

    def scale(m):
        if factor <= 1:
            return 1.0
        return 0.1 * m * math.log(factor) + 1.0

    m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if m and m_all:
        return scale(m) / scale(m_all)
    return scale(1)


def rotate(x_NHK, cos_NK, sin_NK):
    """Rotary embedding in the two-halves layout of Hugging Face checkpoints, computed in fp32."""
    a, b = x_NHK.to(torch.promote_types(x_NHK.dtype, torch.float32)).chunk(2, -1)
    cos, sin = cos_NK[:, None], sin_NK[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_NHK.dtype)
