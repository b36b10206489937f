"""Moving keys to other positions: which angles a model's rotary embedding turns by, and turning by a difference.

A key at position p is `R(p) k`: pairs of its numbers turned by `p * frequency`. So `K(p + shift) = R(shift) K(p)`,
with one rotation for all tokens. Where the embedding also scales (the attention factor of YaRN and LongRoPE), it scales
both sides alike. Pure functions, on any thread.

What counts is which angles the engine turns by, so frequencies are computed as vLLM computes the tables of its
`rotary_embedding` layers: in float32, operation by operation. The last bit of a frequency is 0.01 radians after
100,000 tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

REFUSED = {
    "mrope_section": "positions are of several dimensions (mrope)",
    "use_fope": "the embedding is a Fourier series (fope)",
    "is_deepseek_v4": "keys are compressed over tokens (DeepSeek V4)",
}

ROWS_AT_ONCE = 256  # their float32 copies stay in a core's cache: four times as fast as all at once


class CannotRotate(Exception):  # noqa: N818 (an answer about a model, not a fault)
    """Keys of this model cannot be moved to other positions; the text says why."""


@dataclass(frozen=True)
class Rotary:
    """How keys are rotated.

    Attributes:
        frequencies: radians a token, `rotary_dim / 2` of them.
        is_interleaved: numbers 2i and 2i + 1 make a pair (GPT-J); otherwise i and i + rotary_dim / 2 (NeoX).
        rotary_dim: how many numbers of a row are rotated.
        first_dim: the first of them.
    """

    frequencies: tuple[float, ...]
    is_interleaved: bool
    rotary_dim: int
    first_dim: int = 0


def read_rotary(
    parameters: Mapping[str, Any], *, head_size: int, rotary_dim: int, is_interleaved: bool, max_positions: int
) -> Rotary:
    """Return how a model rotates keys.

    Args:
        parameters: Hugging Face's `rope_parameters`, or `rope_scaling` with `rope_theta` added.
        head_size: numbers a key row.
        rotary_dim: how many of them, from the first on, are rotated.
        is_interleaved: see `Rotary`.
        max_positions: the engine's `max_model_len`, by which vLLM chooses between LongRoPE's two sets of factors.

    Raises:
        CannotRotate: rotating by a difference would not give the key of another position, or the kind is not known.
    """
    for name, reason in REFUSED.items():
        if parameters.get(name):
            raise CannotRotate(reason)
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise CannotRotate(f"layers have different rotary embeddings ({', '.join(parameters)})")
    if not 0 < rotary_dim <= head_size or rotary_dim % 2:
        raise CannotRotate(f"{rotary_dim} numbers of rows of {head_size} are rotated")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    base = parameters.get("rope_theta", 10000)
    try:
        frequencies = _frequencies(kind, base, rotary_dim, parameters, max_positions)
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise CannotRotate(f"parameters of rotary kind {kind!r}: {error!r}") from error
    return Rotary(tuple(frequencies.double().tolist()), is_interleaved, rotary_dim)


def cos_sin(shift: int, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine of each pair's angle, float32 `[rotary_dim / 2]` on the CPU."""
    angles = torch.tensor(rotary.frequencies, dtype=torch.float64) * shift
    return angles.cos().float(), angles.sin().float()


def rotate(keys: torch.Tensor, shift: int, rotary: Rotary) -> torch.Tensor:
    """Return keys of positions p as keys of positions p + `shift`.

    Args:
        keys: `[..., head_size]`, any layout; of eight-bit types e4m3 and e5m2, whose scales do not matter.
        shift: tokens, may be negative.
        rotary: how the model rotates.

    Returns:
        A tensor of the same shape and dtype; computed in float32, rounded once.
    """
    cos, sin = (factor.to(keys.device) for factor in cos_sin(shift, rotary))
    limits = torch.finfo(keys.dtype)
    rotated = torch.empty(keys.shape, dtype=keys.dtype, device=keys.device)
    sources, targets = (rows[None].flatten(0, -2).split(ROWS_AT_ONCE) for rows in (keys, rotated))
    for source, target in zip(sources, targets, strict=True):
        wide = source.to(torch.float32, copy=True)
        x, y = _pairs(wide, rotary)
        first = torch.addcmul(x * cos, y, sin, value=-1)
        y.mul_(cos).addcmul_(x, sin)
        x.copy_(first)
        # A pair may turn into a number larger than both; the cast to eight bits would make NaN of what does not fit.
        target.copy_(wide if keys.element_size() > 1 else wide.clamp_(limits.min, limits.max))
    return rotated


def _pairs(keys: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of the first and of the second number of each pair, `[..., rotary_dim / 2]`."""
    part = keys[..., rotary.first_dim : rotary.first_dim + rotary.rotary_dim]
    if rotary.is_interleaved:
        return part[..., ::2], part[..., 1::2]
    half = rotary.rotary_dim // 2
    return part[..., :half], part[..., half:]


def _frequencies(
    kind: str, base: float, rotary_dim: int, parameters: Mapping[str, Any], max_positions: int
) -> torch.Tensor:
    """Return radians a token, float `[rotary_dim / 2]`."""
    powers = base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    if kind == "default":
        return 1.0 / powers
    if kind == "linear":  # vLLM divides the position, kaiokendev 2023
        return (1.0 / powers).double() / parameters["factor"]
    if kind == "llama3":
        return _llama3(1.0 / powers, parameters)
    if kind == "yarn":
        return _yarn(powers, base, parameters, truncate=parameters.get("truncate", True))
    if kind in ("deepseek_yarn", "deepseek_llama_scaling"):
        return _yarn(powers, base, parameters, truncate=True)
    if kind == "longrope":
        is_long = max_positions > parameters["original_max_position_embeddings"]
        factors = parameters["long_factor" if is_long else "short_factor"]
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * powers)
    reason = "frequencies depend on the length" if kind == "dynamic" else "not known"
    raise CannotRotate(f"rotary kind {kind!r}: {reason}")


def _llama3(frequencies: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Divide the frequencies of long waves, and blend in between; Llama 3.1, `_compute_llama3_parameters`."""
    factor, original = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    wave_lengths = 2 * math.pi / frequencies
    smooth = (original / wave_lengths - low) / (high - low) if low != high else 0
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    long_waves = torch.where(wave_lengths > original / low, frequencies / factor, blended)
    return torch.where(wave_lengths < original / high, frequencies, long_waves)


def _yarn(powers: torch.Tensor, base: float, parameters: Mapping[str, Any], truncate: bool) -> torch.Tensor:
    """Divide the frequencies of dimensions that turn rarely within the original length; Peng et al. 2023, YaRN."""
    half, original = len(powers), parameters["original_max_position_embeddings"]

    def dimension_of(num_turns: float) -> float:
        return half * math.log(original / (num_turns * 2 * math.pi)) / math.log(base)

    low, high = dimension_of(parameters.get("beta_fast", 32)), dimension_of(parameters.get("beta_slow", 1))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(half, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (parameters["factor"] * powers) * (1 - kept) + 1.0 / powers * kept
