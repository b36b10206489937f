"""The selector `query`: which loaded tokens the end of a prompt attends to, by a few late layers.

Pure functions of tensors, on any thread and device.
"""

from collections.abc import Sequence

import torch

from cachetier_blend.plan import DocumentLoad

PIECE_TOKENS = 16
QUERY_TOKENS = 32


def watched_layers(num_layers: int) -> list[int]:
    """Return the layers whose attention decides: at five, six and seven eighths of the depth."""
    return sorted({num_layers * eighths // 8 for eighths in (5, 6, 7)})


def attention_paid(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Return how much attention each token gets from the last ones: causal softmax attention, summed.

    Args:
        queries: of the last tokens, `[queries, heads, head_size]`.
        keys: of all tokens, `[kv_heads, tokens, head_size]`; head h of the queries belongs to KV head
            `h // (heads / kv_heads)`.
        scale: what products of queries and keys are multiplied by.

    Returns:
        float32 `[tokens]`; its sum is queries times heads.
    """
    num_queries, num_tokens = len(queries), keys.shape[1]
    hidden = torch.ones(num_queries, num_tokens, dtype=torch.bool, device=keys.device)
    hidden = hidden.triu(num_tokens - num_queries + 1)
    paid = torch.zeros(num_tokens, dtype=torch.float32, device=keys.device)
    for group, of_head in zip(queries.transpose(0, 1).chunk(len(keys)), keys, strict=True):  # bounds the memory
        products = (group.float() @ of_head.float().T * scale).masked_fill_(hidden, -torch.inf)
        paid += products.softmax(dim=-1).sum(dim=(0, 1))
    return paid


def piece_scores(paid: Sequence[float], loads: Sequence[DocumentLoad]) -> list[float]:
    """Return the mean attention of each piece of `PIECE_TOKENS` tokens of each load, as `choose_runs` takes them."""
    pieces = [
        paid[start : min(start + PIECE_TOKENS, load.end)]
        for load in loads
        for start in range(load.start, load.end, PIECE_TOKENS)
    ]
    return [sum(piece) / len(piece) for piece in pieces]
