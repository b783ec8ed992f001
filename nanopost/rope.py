"""Rotary position embedding (RoFormer 2104.09864), with the scalings that extend the context.

Shapes: N tokens, H heads, K width of a head, R frequencies.
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


def read_ropes(text: dict, source: str) -> dict[str, dict]:
    """The ropes of a decoder, by kind of layer: one under "full_attention", and another under
    "sliding_attention" where local layers have their own (Gemma 3). Each is a dict with rope_type.

    rope_theta and rope_scaling; in transformers 5 rope_parameters, which may be one of each kind.
    """
    given, local = dict(text.get("rope_parameters") or text.get("rope_scaling") or {}), {}
    if any(isinstance(value, dict) for value in given.values()):
        if "rope_local_base_freq" not in text:
            raise InputError(
                f"{source}: a rope type for each kind of layer is not supported in this family, "
                f"only one of {', '.join(ROPE_NEEDS)} for all layers."
            )
        given, local = given.get("full_attention") or {}, given.get("sliding_attention") or {}
    elif "rope_local_base_freq" in text and text.get("rope_parameters"):
        raise InputError(
            f"{source}: rope_parameters of this family has full_attention and sliding_attention; "
            "copy the model's own config.json."
        )
    ropes = {"full_attention": _read(given, text, source)}
    if "rope_local_base_freq" in text:
        local = {"rope_theta": text["rope_local_base_freq"], **local}
        ropes["sliding_attention"] = _read(local, text, source)
    return ropes


def _read(given, text, source) -> dict:
    kind = given.get("rope_type", given.get("type", "default"))
    rope = {
        "rope_theta": text.get("rope_theta") or 10000.0,
        "max": text.get("max_position_embeddings", 2048),
        "partial_rotary_factor": text.get("partial_rotary_factor") or 1.0,
        **{key: value for key, value in given.items() if value is not None},
        "rope_type": kind,
    }
    kinds = ", ".join(ROPE_NEEDS)
    if kind not in ROPE_NEEDS:
        raise InputError(f"{source}: rope type {kind!r} is not one of {kinds}.")
    missing = [key for key in ROPE_NEEDS[kind] if rope.get(key) is None]
    if missing:
        raise InputError(
            f"{source}: rope type {kind!r} needs {', '.join(missing)}, but config.json has none."
        )
    return rope


def rope_frequencies(rope: dict, head_dim: int, device=None):
    """Rotary frequencies (RoFormer 2104.09864) -> (inv_freq fp32, factor of cos and sin).

    There are K/2 of them, or less where only the first part of a head turns.
    """
    kind = rope["rope_type"]
    head_dim = int(head_dim * rope["partial_rotary_factor"])
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


def rotate(x_NHK, cos_NR, sin_NR):
    """Rotary embedding in the two-halves layout of Hugging Face checkpoints, computed in fp32.

    The first 2 R numbers of a head turn, in pairs; the others stay.
    """
    turned = 2 * cos_NR.shape[1]
    if turned == 0:
        return x_NHK
    if turned < x_NHK.shape[2]:
        first = rotate(x_NHK[..., :turned], cos_NR, sin_NR)
        return torch.cat([first, x_NHK[..., turned:]], -1)
    a, b = x_NHK.to(torch.promote_types(x_NHK.dtype, torch.float32)).chunk(2, -1)
    cos, sin = cos_NR[:, None], sin_NR[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_NHK.dtype)
