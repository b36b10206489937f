"""Which tokens of a blended prompt are loaded and which are computed: pure functions and values, on any thread.

Token ranges are half-open and count from the start of the prompt. The first tokens of a document act as attention
sinks when it is computed alone, which they are not in the middle of a prompt: they are computed anew, not loaded.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

LOADED_TOKENS_MIN = 128  # what a shorter load saves does not pay for its sinks and for being approximate


class Run(NamedTuple):
    """Tokens `[start, end)` of the prompt."""

    start: int
    end: int


class DocumentHit(NamedTuple):
    """A document in the prompt: where its token 0 stands, and how many of its leading tokens are held."""

    start: int
    num_tokens: int


class DocumentLoad(NamedTuple):
    """Tokens `[start, end)` of the prompt come from a document, given by its index into the hits."""

    document: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class BlendPlan:
    """What fills the tokens from the exact prefix up to `end`; every one of them is in exactly one run.

    Attributes:
        loads: from documents, ascending.
        computes: by the blend pass, ascending.
        end: where the last load ends; what follows is computed by the engine itself.
        approximate_from: the first loaded token; what is computed before it is exact.
    """

    loads: tuple[DocumentLoad, ...]
    computes: tuple[Run, ...]
    end: int
    approximate_from: int


def plan_blend(
    *, exact_end: int, documents: Sequence[DocumentHit], num_tokens: int, sink_tokens: int = 16
) -> BlendPlan | None:
    """Decide what to load.

    Where documents overlap, the one that starts first has the tokens. The other is used from where it is free; its
    sinks are its own first tokens also then, so they are computed only where they are not the first one's.

    Args:
        exact_end: tokens before it are held exactly, whatever documents say.
        documents: what was found, in any order.
        num_tokens: tokens of the prompt. The last one is never loaded: the engine needs its output.
        sink_tokens: leading tokens of a document that are not loaded.

    Returns:
        None if no document has `LOADED_TOKENS_MIN` tokens to load.
    """
    loads: list[DocumentLoad] = []
    free_from = exact_end
    for index, hit in sorted(enumerate(documents), key=lambda item: item[1].start):
        start = max(hit.start + sink_tokens, free_from)
        end = min(hit.start + hit.num_tokens, num_tokens - 1)
        if end - start >= LOADED_TOKENS_MIN:
            loads.append(DocumentLoad(index, start, end))
            free_from = end
    if not loads:
        return None
    computes = subtract([Run(exact_end, free_from)], [Run(load.start, load.end) for load in loads])
    return BlendPlan(tuple(loads), tuple(computes), end=free_from, approximate_from=loads[0].start)


def choose_runs(loads: Sequence[DocumentLoad], scores: Sequence[float], block_tokens: int, budget: float) -> list[Run]:
    """Choose loaded tokens to compute after all, the best first, until the next best would exceed the budget.

    Args:
        loads: what was loaded, ascending.
        scores: of the consecutive pieces of `block_tokens` tokens of each load, load after load. The last piece of a
            load may be shorter. Of equal scores the one further in front is better.
        block_tokens: see above.
        budget: the part of all loaded tokens that may be chosen, 0 to 1.

    Returns:
        Ascending runs that do not touch.
    """
    pieces = [
        Run(start, min(start + block_tokens, load.end))
        for load in loads
        for start in range(load.start, load.end, block_tokens)
    ]
    left_tokens = int(budget * sum(load.end - load.start for load in loads))
    chosen = []
    for _, piece in sorted(zip(scores, pieces, strict=True), key=lambda item: -item[0]):
        left_tokens -= piece.end - piece.start
        if left_tokens < 0:
            break
        chosen.append(piece)
    return merge(chosen)


def cut_runs(runs: Sequence[Run], max_tokens: int, max_runs: int) -> list[list[Run]]:
    """Cut ascending runs into the pieces of a blend pass, in their order, as few as possible.

    A piece has at most `max_tokens` tokens in at most `max_runs` runs, both at least 1; long runs are split.
    """
    pieces: list[list[Run]] = []
    left_tokens = 0
    for run in runs:
        start = run.start
        while start < run.end:
            if left_tokens == 0 or len(pieces[-1]) == max_runs:
                pieces.append([])
                left_tokens = max_tokens
            until = min(run.end, start + left_tokens)
            pieces[-1].append(Run(start, until))
            left_tokens -= until - start
            start = until
    return pieces


def merge(runs: Iterable[Run]) -> list[Run]:
    """Return the tokens of `runs`, in any order and overlapping or not, as ascending runs that do not touch."""
    merged: list[Run] = []
    for run in sorted(run for run in runs if run.start < run.end):
        if merged and run.start <= merged[-1].end:
            merged[-1] = Run(merged[-1].start, max(run.end, merged[-1].end))
        else:
            merged.append(run)
    return merged


def subtract(runs: Sequence[Run], holes: Iterable[Run]) -> list[Run]:
    """Return the tokens of the ascending, disjoint `runs` that are in none of `holes`, as such runs."""
    left: list[Run] = []
    ordered, first = merge(holes), 0
    for run in runs:
        start = run.start
        while first < len(ordered) and ordered[first].end <= start:
            first += 1
        for hole in islice(ordered, first, None):
            if hole.start >= run.end:
                break
            if start < hole.start:
                left.append(Run(start, hole.start))
            start = hole.end
        if start < run.end:
            left.append(Run(start, run.end))
    return left
