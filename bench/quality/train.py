"""Train the model of a task, on one core in a quarter of an hour, from text that is made as it goes and never repeated.

    python -m bench.quality.train alias
    python -m bench.quality.train header --start bench/quality/models/alias

It begins with short texts in which facts stand close together, goes on with gaps in the positions instead of words to
compute, and ends with prompts of the length that is asked about. At first a throw-away head has the first layer tell
the previous token: from there, looking up a key is found in half a minute, and without, not in many. The last thing
printed is the accuracy on prompts of another seed.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from bench.quality.model import Llama, load, save
from bench.quality.tasks import (
    BOS,
    NO_LABEL,
    NUM_MODES,
    TASKS,
    Laid,
    draw_facts,
    draw_question,
    lay_out,
    lay_questions,
)

MODELS = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Stage:
    """What is read for part of the time."""

    until: float  # which part of the training is over then
    batch: int
    documents: tuple[int, int]  # at least, at most
    facts_each: tuple[int, int]
    filler: tuple[int, int]  # words in each document
    stretch: int  # the positions of a text are spread over up to so many more


STAGES = (
    Stage(0.10, 32, (1, 1), (4, 6), (0, 2), 0),
    Stage(0.30, 16, (1, 3), (4, 7), (0, 8), 256),
    Stage(0.60, 8, (2, 5), (5, 7), (0, 40), 3000),
    Stage(1.00, 2, (4, 6), (5, 7), (150, 230), 1000),
)
PREVIOUS_TOKEN_UNTIL = 0.30


def draw_batch(rng: np.random.Generator, task: str, stage: Stage) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, positions and labels [batch, tokens] of one stage; all texts of a batch have one shape."""
    documents, facts_each, filler = (
        int(rng.integers(low, high + 1)) for low, high in (stage.documents, stage.facts_each, stage.filler)
    )
    texts = [_draw_text(rng, task, documents, facts_each, filler, stage.stretch) for _ in range(stage.batch)]
    longest = max(len(text[0]) for text in texts)
    rows = np.full((3, len(texts), longest), NO_LABEL, np.int64)
    rows[:2] = 0
    for number, text in enumerate(texts):
        for kind, values in enumerate(text):
            rows[kind, number, : len(values)] = values
    tokens, positions, labels = torch.from_numpy(rows)
    return tokens, positions, labels


def _draw_text(
    rng: np.random.Generator, task: str, num_documents: int, facts_each: int, num_filler: int, stretch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, positions and labels of documents followed by a question about every fact."""
    mode = int(rng.integers(NUM_MODES + 1)) if task == "header" else 0
    across = float(rng.choice([0.3, 0.5, 0.8]))
    facts = draw_facts(rng, num_documents, facts_each, mode, across=across, unknown=float(rng.choice([0.0, 0.25])))
    parts = [
        lay_out(rng, each, 2 + 3 * facts_each + num_filler + int(rng.integers(3)), mode if number == 0 else 0)
        for number, each in enumerate(facts)
    ]
    everything = [fact for document in facts for fact in document]
    parts.append(lay_questions([everything[index] for index in rng.permutation(len(everything))]))
    if rng.random() < 0.5:
        parts.insert(0, Laid(np.array([BOS], np.int32), np.array([NO_LABEL], np.int32), np.array([True])))
    tokens, labels, units = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "labels", "units")
    )
    gaps = units * rng.exponential(1.0, len(units)) ** 2  # some wide, most narrow
    spread = rng.random() * stretch * np.cumsum(gaps) / gaps.sum()
    return tokens, np.arange(len(tokens)) + spread.astype(np.int64), labels


def loss_of(model: Llama, previous: nn.Linear, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean loss at the tokens that have a label, and that of telling the previous token."""
    tokens, positions, labels = batch
    after_first, last = model(tokens, positions)
    is_asked = labels != NO_LABEL
    loss = cross_entropy(model.lm_head(last[is_asked]), labels[is_asked])
    return loss, cross_entropy(previous(after_first[:, 1:]).flatten(0, 1), tokens[:, :-1].flatten())


def rate_at(progress: float, step: int, peak: float) -> float:
    """Rise over 100 steps, stay, and fall to a fiftieth over the second half."""
    fall = max(0.0, 2 * progress - 1)
    return peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * fall)) / 2)


@torch.inference_mode()
def accuracies(model: Llama, task: str, seed: int, count: int) -> Iterator[tuple[str, int, float]]:
    """Yield kind of question, aliases in its chain, and the share of right answers, with full attention."""
    rng, right = np.random.default_rng(seed), dict[tuple[str, int], list[bool]]()
    for kind in ("in", "across"):
        for _ in range(count):
            question = draw_question(rng, task, kind)
            tokens = torch.from_numpy(question.prompt).long()[None]
            last = model(tokens, torch.arange(tokens.shape[1])[None])[1][0, -1]
            found = int(model.lm_head(last).argmax())
            right.setdefault((kind, question.num_aliases), []).append(found == question.answer)
    for (kind, num_aliases), answers in sorted(right.items()):
        yield kind, num_aliases, sum(answers) / len(answers)


def train(args: argparse.Namespace) -> Llama:
    """Train for `args.minutes` and return the model. Processor time counts: others may use the machine as well."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    model = load(args.start).train() if args.start else Llama()
    previous = nn.Linear(model.shape.hidden_size, model.shape.vocab_size, bias=False)
    weights = [*model.parameters(), *previous.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    started, step, progress, num_tokens, losses = time.process_time(), 0, 0.0, 0, list[float]()
    while progress < 1:
        stage = next(stage for stage in STAGES if progress < stage.until)
        batch = draw_batch(rng, args.task, stage)
        loss, loss_of_previous = loss_of(model, previous, batch)
        (loss + loss_of_previous * (progress < PREVIOUS_TOKEN_UNTIL)).backward()
        clip_grad_norm_(weights, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(progress, step, args.learning_rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, num_tokens, losses = step + 1, num_tokens + batch[0].numel(), [*losses[-49:], loss.item()]
        elapsed_s = time.process_time() - started
        progress = elapsed_s / 60 / args.minutes
        if step % 100 == 0:
            mean = sum(losses) / len(losses)
            print(f"{elapsed_s:6.0f} s, step {step}, {num_tokens / 1e6:.2f} M tokens, loss {mean:.4f}", flush=True)
    return model.eval()


def main() -> None:
    """Train, save, and print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--minutes", type=float, default=12.0, help="of processor time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak of the schedule")
    parser.add_argument("--start", type=Path, help="folder of a model to go on from")
    parser.add_argument("--folder", type=Path, help="where the model goes (bench/quality/models/TASK)")
    parser.add_argument("--questions", type=int, default=300, help="of each kind, asked at the end")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.folder or MODELS / args.task
    save(train(args), folder)
    for kind, num_aliases, accuracy in accuracies(load(folder), args.task, 10**6 + args.seed, args.questions):
        print(f"{kind:7} {num_aliases} aliases: {accuracy:.4f}")


if __name__ == "__main__":
    main()
