"""Blending simulated in plain torch, on the weights that engines run: what the answers of a real one are held against.

    python -m bench.quality.reference            # writes bench/results/quality_reference.json

Documents are computed alone from position 0; their complete chunks are rotated to where they stand in the prompt; the
tokens that a selector chose are computed in their places, each attending to all before it, recomputed or not; so is
everything that was not loaded. It shares no code with `cachetier_blend`, on purpose.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bench.quality.measures import CONTENDERS, FULL, Answer, rows_of
from bench.quality.model import KV, Llama, load, rotate, rotation
from bench.quality.tasks import TASKS, Question, draw_questions
from bench.record import record

CHUNK_TOKENS = 64
SINK_TOKENS = 16
PIECE_TOKENS = 16
# What `query` goes by: the attention of so many tokens after the documents, the prompt's last one left out (an engine
# computes it later, to sample from), in the last layers.
QUERY_TOKENS = 32
LATE_LAYERS = 2


@dataclass(frozen=True)
class Computed:
    """What comes out: logits [vocabulary] after the last token, and the attention [n] that the asking tokens paid."""

    logits: Tensor
    paid: Tensor


def compute(model: Llama, tokens: Tensor, is_computed: Tensor, kv: KV, num_asking: int = 0) -> Computed:
    """Compute some tokens of a prompt in place, the last one among them.

    Args:
        model: in float32.
        tokens: [n].
        is_computed: [n]; which of them to compute.
        kv: of all n tokens, rotated to their positions; what is computed is written into it.
        num_asking: tokens before the last one whose attention matters.
    """
    places = is_computed.nonzero().flatten()
    angles = rotation(places, model.shape)
    is_hidden = torch.arange(len(tokens)) > places[:, None]
    x, paid = model.embed_tokens(tokens[places]), torch.zeros(len(tokens))
    for number, (layer, (keys, values)) in enumerate(zip(model.layers, kv, strict=True)):
        q, keys[:, places], values[:, places] = layer.project(x, angles)
        scores = (q @ keys.transpose(-1, -2) * model.shape.head_size**-0.5).masked_fill(is_hidden, float("-inf"))
        weights = scores.softmax(-1)
        x = layer.finish(x, weights @ values)
        if number >= model.shape.num_layers - LATE_LAYERS:
            paid += weights[:, -1 - num_asking : -1].sum((0, 1))
    return Computed(model.lm_head(model.norm(x[-1])), paid)


def empty_kv(model: Llama, num_tokens: int) -> KV:
    """Return KV of zeros."""
    size = (model.shape.num_heads, num_tokens, model.shape.head_size)
    return [(torch.zeros(size), torch.zeros(size)) for _ in model.layers]


class Prompt:
    """One question's prompt, with the KV of its documents computed alone."""

    def __init__(self, model: Llama, question: Question) -> None:
        self._model = model
        self._tokens = torch.from_numpy(question.prompt).long()
        self._kv = empty_kv(model, len(self._tokens))
        self._loads: list[tuple[int, int]] = []
        self._first_passes: dict[int, Computed] = {}  # by the first loaded token: with sinks computed, or without
        for offset, document in zip(question.offsets, question.documents, strict=True):
            held = len(document) // CHUNK_TOKENS * CHUNK_TOKENS
            self._load(offset, torch.from_numpy(document[:held]).long())
            self._loads.append((offset, offset + held))

    def _load(self, offset: int, tokens: Tensor) -> None:
        alone = empty_kv(self._model, len(tokens))
        compute(self._model, tokens, torch.ones(len(tokens), dtype=torch.bool), alone)
        shift = rotation(torch.full((len(tokens),), offset), self._model.shape)
        place = slice(offset, offset + len(tokens))
        for (keys, values), (keys_alone, values_alone) in zip(self._kv, alone, strict=True):
            keys[:, place], values[:, place] = rotate(keys_alone, shift), values_alone

    def full(self) -> Answer:
        """Answer with everything computed."""
        return self._answer(self._run(torch.ones(len(self._tokens), dtype=torch.bool)), 0, 0)

    def blended(self, select: str, budget: float | None) -> Answer:
        """Answer with what `select` leaves of the documents' own KV."""
        loads = [(start + SINK_TOKENS * (select != "none"), end) for start, end in self._loads]
        is_loaded = torch.zeros(len(self._tokens), dtype=torch.bool)
        for start, end in loads:
            is_loaded[start:end] = True
        num_loaded, first = int(is_loaded.sum()), loads[0][0]
        if first not in self._first_passes:
            self._first_passes[first] = self._run(~is_loaded)
        found = self._first_passes[first]
        if budget is None:
            return self._answer(found, num_loaded, int((~is_loaded[: loads[-1][1]]).sum()))
        num_computed = int((~is_loaded[:-1]).sum())
        is_loaded &= ~choose(found.paid, loads, budget)
        # In order of position, what had been computed with the loaded KV in view once more.
        return self._answer(self._run(~is_loaded), num_loaded, num_computed + int((~is_loaded[first:-1]).sum()))

    def _run(self, is_computed: Tensor) -> Computed:
        kv = [(keys.clone(), values.clone()) for keys, values in self._kv]
        num_asking = min(QUERY_TOKENS, len(self._tokens) - 1 - self._loads[-1][1])
        return compute(self._model, self._tokens, is_computed, kv, num_asking)

    def _answer(self, found: Computed, loaded: int, computed: int) -> Answer:
        return Answer(found.logits.log_softmax(-1).numpy(), loaded, computed)


def choose(paid: Tensor, loads: list[tuple[int, int]], budget: float) -> Tensor:
    """Return which tokens [n] to recompute: the pieces of the loads that most attention is paid to, token for token.

    The next best piece is taken as long as it fits into `budget`, a share of the loaded tokens.
    """
    pieces = [
        (start, min(start + PIECE_TOKENS, end))
        for load_start, end in loads
        for start in range(load_start, end, PIECE_TOKENS)
    ]
    left = int(budget * sum(end - start for start, end in loads))
    is_chosen = torch.zeros(len(paid), dtype=torch.bool)
    for start, end in sorted(pieces, key=lambda piece: -float(paid[slice(*piece)].mean())):
        left -= end - start
        if left < 0:
            break
        is_chosen[start:end] = True
    return is_chosen


@torch.inference_mode()
def measure(model: Llama, name: str, questions: list[Question]) -> Iterator[dict[str, Any]]:
    """Ask every contender and yield the results."""
    given: dict[tuple[str, float | None], list[Answer]] = {each: [] for each in ((FULL, None), *CONTENDERS)}
    for question in tqdm(questions, desc=name, mininterval=5):
        prompt = Prompt(model, question)
        given[FULL, None].append(prompt.full())
        for select, budget in CONTENDERS:
            given[select, budget].append(prompt.blended(select, budget))
    for (contender, budget), answers in given.items():
        yield from rows_of(
            questions, given[FULL, None], answers, contender=contender, on="torch", model=name, budget=budget
        )


def main() -> None:
    """Measure the models of both tasks and record the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=200, help="of each kind")
    parser.add_argument("--seed", type=int, default=2_000_000)
    parser.add_argument("--models", type=Path, default=Path(__file__).parent / "models")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--output", type=Path, help="instead of bench/results/quality_reference.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for task in args.tasks:
        questions = draw_questions(np.random.default_rng(args.seed), task, args.questions)
        rows += measure(load(args.models / task), task, questions)
    record("quality_reference", rows, path=args.output)


if __name__ == "__main__":
    main()
