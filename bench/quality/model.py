"""A Llama in plain torch, small enough to read, which the tasks are trained on and blending is simulated with.

It is its own implementation so that the KV of each layer can be taken out, rotated and put back; `save` writes the
folder that vLLM and transformers load, and a test shows that transformers computes the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from bench.quality.tasks import BOS, EOS, VOCAB_SIZE

KV = list[tuple[Tensor, Tensor]]  # of each layer, keys (rotated) and values [heads, tokens, head size]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the head size is one that vLLM's attention on the CPU takes."""

    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 128
    intermediate_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    head_size: int = 32
    rope_theta: float = 100_000.0
    max_positions: int = 4096
    norm_eps: float = 1e-5


def rotation(positions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [..., 1, tokens, head size / 2] of `positions` [..., tokens]."""
    half = shape.head_size // 2
    frequencies = shape.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double().unsqueeze(-2).unsqueeze(-1) * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs (i, i + half) of the last dimension, as NeoX and Llama do."""
    cos, sin = angles
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Layer(nn.Module):
    """Attention and MLP, each added to what came in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        wide, attention = shape.hidden_size, shape.num_heads * shape.head_size
        self.shape = shape
        self.input_layernorm = nn.RMSNorm(wide, eps=shape.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(wide, eps=shape.norm_eps)
        self.qkv_proj = nn.Linear(wide, 3 * attention, bias=False)
        self.o_proj = nn.Linear(attention, wide, bias=False)
        self.gate_up_proj = nn.Linear(wide, 2 * shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, wide, bias=False)

    def project(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [..., heads, tokens, head size] of x [..., tokens, hidden]."""
        qkv = self.qkv_proj(self.input_layernorm(x)).unflatten(-1, (3, self.shape.num_heads, self.shape.head_size))
        q, k, v = (part.transpose(-2, -3) for part in qkv.unbind(-3))
        return rotate(q, angles), rotate(k, angles), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return what the layer makes of `x` and what its heads found."""
        x = x + self.o_proj(attended.transpose(-2, -3).flatten(-2))
        gate, up = self.gate_up_proj(self.post_attention_layernorm(x)).chunk(2, dim=-1)
        return x + self.down_proj(silu(gate) * up)


class Llama(nn.Module):
    """The whole model."""

    def __init__(self, shape: Shape | None = None) -> None:
        super().__init__()
        self.shape = shape = shape or Shape()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                small = (2 * shape.num_layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                nn.init.normal_(parameter, std=small * (0.5 if "embed" in name else shape.hidden_size**-0.5))

    def forward(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states [batch, tokens, hidden] after the first layer, and the last ones, of whole sequences."""
        angles = rotation(positions, self.shape)
        x, after_first = self.embed_tokens(tokens), None
        for layer in self.layers:
            q, k, v = layer.project(x, angles)
            x = layer.finish(x, scaled_dot_product_attention(q, k, v, is_causal=True))
            after_first = x if after_first is None else after_first
        assert after_first is not None
        return after_first, self.norm(x)


def save(model: Llama, folder: Path) -> None:
    """Write the folder that vLLM and transformers load, weights in bf16."""
    shape, tensors = model.shape, dict[str, Tensor]()
    for name, tensor in model.state_dict().items():
        for part, chunk in _split(name, tensor.bfloat16()):
            tensors[part if part.startswith("lm_head") else f"model.{part}"] = chunk.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path) -> Llama:
    """Read back what `save` wrote, in float32."""
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        head_size=config["head_dim"],
        rope_theta=config["rope_parameters"]["rope_theta"],
        max_positions=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
    )
    model, tensors = Llama(shape), load_file(folder / "model.safetensors")
    state = {}
    for name, tensor in model.state_dict().items():
        parts = [tensors[part if part.startswith("lm_head") else f"model.{part}"] for part, _ in _split(name, tensor)]
        state[name] = torch.cat(parts).float()
    model.load_state_dict(state)
    return model.eval()


def _split(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Return the names and parts that a weight has in a Hugging Face folder, where nothing is fused."""
    for fused, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
        if fused in name:
            return [
                (name.replace(fused, f"self_attn.{part}" if fused == "qkv_proj" else f"mlp.{part}"), chunk)
                for part, chunk in zip(parts, tensor.chunk(len(parts)), strict=True)
            ]
    for part, parent in (("o_proj", "self_attn"), ("down_proj", "mlp")):
        if part in name:
            return [(name.replace(part, f"{parent}.{part}"), tensor)]
    return [(name, tensor)]
