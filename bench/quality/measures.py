"""What is measured of the answers of one selector at one budget, whoever gave them: the simulation or a real engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.quality.tasks import Question
from bench.record import row

FULL = "full-prefill"
# Contender and budget, in the order in which they are asked and reported.
CONTENDERS = (("none", None), ("link", None), *(("query", budget) for budget in (0.05, 0.15, 0.25, 0.5, 1.0)))


@dataclass(frozen=True)
class Answer:
    """Log-probabilities [vocabulary] of the token after the prompt, and how the prompt's KV came about."""

    logprobs: NDArray[np.float32]
    loaded: float = 0  # tokens of documents
    computed: float = 0  # tokens in blend passes, those twice that were computed twice


def divergence(full: Answer, other: Answer) -> float:
    """Return the Kullback-Leibler divergence, in nats, of `other` from the full prefill."""
    p, q = (answer.logprobs.astype(np.float64) for answer in (full, other))
    return float(np.sum(np.exp(p) * (p - q)))


def rows_of(
    questions: Sequence[Question],
    full: Sequence[Answer],
    answers: Sequence[Answer],
    *,
    contender: str,
    **parameters: Any,
) -> Iterator[dict[str, Any]]:
    """Yield the results of one contender.

    Args:
        questions: of both kinds.
        full: the answers of the full prefill to them.
        answers: the contender's.
        contender: its name.
        parameters: of the results; the budget is one only where there is one.
    """
    given = {name: value for name, value in parameters.items() if value is not None}
    said = [int(answer.logprobs.argmax()) for answer in answers]
    notes = {
        "questions": len(questions),
        "prompt_tokens": round(mean(len(question.prompt) for question in questions), 1),
        "loaded": round(mean(answer.loaded for answer in answers), 1),
    }
    right: dict[str, list[bool]] = {"in": [], "across": []}
    for question, token in zip(questions, said, strict=True):
        right[question.kind].append(token == question.answer)
    agreement = mean(token == int(each.logprobs.argmax()) for token, each in zip(said, full, strict=True))
    kl = mean(divergence(*pair) for pair in zip(full, answers, strict=True))
    for question, value, unit in (
        ("accuracy_cross", mean(right["across"]), ""),
        ("accuracy_in", mean(right["in"]), ""),
        ("agreement", agreement, ""),
        ("kl", kl, "nats"),
        ("tokens_computed", mean(answer.computed for answer in answers), "tokens"),
    ):
        yield row(question, contender, round(value, 4), unit, **given) | {"notes": notes}
