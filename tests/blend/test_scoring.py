"""The attention that decides which tokens are computed again, against attention written down plainly."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cachetier_blend.plan import DocumentLoad, choose_runs
from cachetier_blend.scoring import PIECE_TOKENS, attention_paid, piece_scores, watched_layers

HEAD_SIZE = 16


def plain(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Query by query and head by head, from the definition."""
    num_queries, num_heads, _ = queries.shape
    num_kv_heads, num_tokens, _ = keys.shape
    paid = torch.zeros(num_tokens, dtype=torch.float64)
    for number in range(num_queries):
        num_visible = num_tokens - num_queries + number + 1
        for head in range(num_heads):
            visible = keys[head // (num_heads // num_kv_heads), :num_visible].double()
            weights = [math.exp(float(visible[token] @ queries[number, head].double()) * scale) for token in
                       range(num_visible)]  # fmt: skip
            paid[:num_visible] += torch.tensor(weights) / sum(weights)
    return paid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("num_queries", [1, 5, 40])
def test_attention_is_causal_softmax_attention_with_grouped_heads(num_heads, num_kv_heads, num_queries, dtype):
    generator = torch.Generator().manual_seed(num_heads + num_queries)
    queries = torch.randn(num_queries, num_heads, HEAD_SIZE, generator=generator).to(dtype)
    keys = torch.randn(num_kv_heads, 40, HEAD_SIZE, generator=generator).to(dtype)
    paid = attention_paid(queries, keys, 0.3)
    assert paid.dtype == torch.float32
    assert torch.allclose(paid.double(), plain(queries, keys, 0.3), rtol=1e-4)
    assert float(paid.sum()) == pytest.approx(num_queries * num_heads, rel=1e-4)


def test_a_token_that_all_queries_ask_for_gets_all_their_attention():
    keys = torch.zeros(2, 100, HEAD_SIZE)
    keys[:, 37, 0] = 50.0
    queries = torch.zeros(8, 4, HEAD_SIZE)
    queries[..., 0] = 1.0
    assert float(attention_paid(queries, keys, 1.0)[37]) == pytest.approx(32)


def test_pieces_are_as_many_as_choose_runs_wants_and_the_best_is_chosen_whole():
    loads = [DocumentLoad(0, 10, 10 + 2 * PIECE_TOKENS + 5), DocumentLoad(1, 100, 101)]
    paid = [0.0] * 120
    paid[9] = paid[99] = paid[101] = 100.0  # not loaded
    paid[10 + PIECE_TOKENS] = 8.0
    paid[10 + 2 * PIECE_TOKENS] = 3.0
    paid[100] = 0.55
    assert piece_scores(paid, loads) == [0.0, 8.0 / PIECE_TOKENS, 3.0 / 5, 0.55]
    assert choose_runs(loads, piece_scores(paid, loads), PIECE_TOKENS, 6 / 38) == [(42, 47), (100, 101)]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=5), st.integers(0, 9))
def test_scores_are_means_so_that_a_short_last_piece_is_not_put_behind(lengths, seed):
    loads, start = [], 3
    for number, length in enumerate(lengths):
        loads.append(DocumentLoad(number, start, start + length))
        start += length + 7
    paid = torch.rand(start, generator=torch.Generator().manual_seed(seed)).tolist()
    scores = piece_scores(paid, loads)
    assert len(scores) == sum(-(-length // PIECE_TOKENS) for length in lengths)
    last = loads[-1]
    tail = paid[last.end - ((last.end - last.start - 1) % PIECE_TOKENS + 1) : last.end]
    assert scores[-1] == pytest.approx(sum(tail) / len(tail))
    assert piece_scores([1.0] * start, loads) == pytest.approx([1.0] * len(scores))


@pytest.mark.parametrize(("num_layers", "watched"), [(32, [20, 24, 28]), (4, [2, 3]), (1, [0]), (80, [50, 60, 70])])
def test_a_few_late_layers_are_watched(num_layers, watched):
    assert watched_layers(num_layers) == watched
