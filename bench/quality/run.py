"""The same questions as in `reference`, asked of a real vLLM engine that blends.

    python -m bench.quality.run                  # writes bench/results/quality.json

One engine and one server a model. Each document is registered, and so computed alone; then the full prefill and every
contender answers every question, with vLLM's own prefix cache emptied between them, so that nobody profits from what
another computed. That documents were loaded is counted by the server, and checked.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from bench.quality.measures import CONTENDERS, FULL, Answer, rows_of
from bench.quality.tasks import TASKS, VOCAB_SIZE, Question, draw_questions
from bench.record import record

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests.e2e.harness import PATIENT, Engine, Server, running  # noqa: E402

PLAIN = {"load": False, "store": False}
AT_ONCE = 20  # requests in one call


class Stand:
    """An engine that blends, with its server, and what they are asked."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.server = Server(folder, host="1GiB", disk="2GiB")
        try:
            extra = {"server": f"unix:{self.server.socket}", "blend": "request", "blend_guard": 0.0} | PATIENT
            self.engine = Engine(
                folder / "engine.log",
                extra,
                model=str(model),
                skip_tokenizer_init=True,
                max_logprobs=VOCAB_SIZE,
                max_num_seqs=AT_ONCE,
                connector_class="tests.e2e.loading_connector.LoadingConnector",  # this model computes faster
            )
        except BaseException:
            self.server.kill()
            raise
        self._num_asked = 0

    def register(self, questions: list[Question]) -> None:
        """Have every document computed alone and registered."""
        documents = [document for question in questions for document in question.documents]
        for start in tqdm(range(0, len(documents), AT_ONCE), desc="documents", mininterval=5):
            requests = [(tokens, {"document": f"d{n}"}) for n, tokens in enumerate(documents[start:][:AT_ONCE], start)]
            self._ask(requests)
        self.server.wait_for(lambda stats: stats["documents"] == len(documents) and not stats["chunks_pending"], 60)

    def answer(self, questions: list[Question], wishes: dict[str, Any]) -> list[Answer]:
        """Return the answer to each question; how much was loaded and computed is a mean, the same for each."""
        self.engine.reset()
        before = self._blended()
        logprobs: list[NDArray[np.float32]] = []
        for start in range(0, len(questions), AT_ONCE):
            logprobs += self._ask([(question.prompt, wishes) for question in questions[start:][:AT_ONCE]])
        expected = len(questions) if wishes.get("blend") else 0
        self.server.wait_for(
            lambda stats: stats["requests"]["blended"] >= before[0] + expected
        )  # told after the answer
        requests, loaded, computed = (now - then for now, then in zip(self._blended(), before, strict=True))
        assert requests == expected, f"{requests} of {len(questions)} blended"
        return [Answer(each, loaded / len(questions), computed / len(questions)) for each in logprobs]

    def _ask(self, requests: list[tuple[NDArray[np.int32], dict[str, Any]]]) -> list[NDArray[np.float32]]:
        prompts = []
        for tokens, wishes in requests:
            self._num_asked += 1
            params = {"cachetier": wishes}
            prompt = {"id": f"r{self._num_asked}", "tokens": tokens.tolist(), "params": params, "logprobs": VOCAB_SIZE}
            prompts.append(prompt)
        answers = self.engine.generate(prompts, max_tokens=1, at_once=True)
        return [_in_order(answer["logprobs"][0]) for answer in answers]

    def _blended(self) -> tuple[int, int, int]:
        stats = self.server.wait_for(lambda stats: stats["leases"] == 0)
        blend = stats["tokens"]["blend"]
        return stats["requests"]["blended"], blend["loaded"], blend["computed"]


def _in_order(by_token: dict[str, float]) -> NDArray[np.float32]:
    return np.array([by_token[str(token)] for token in range(VOCAB_SIZE)], np.float32)


def wishes_of(contender: str, budget: float | None) -> dict[str, Any]:
    """Return what a request says to be answered as `contender` does."""
    if contender == FULL:
        return PLAIN
    return {"blend": True, "select": contender} | ({} if budget is None else {"budget": budget})


def measure(folder: Path, model: Path, questions: list[Question]) -> Iterator[dict[str, Any]]:
    """Ask every contender and yield the results."""
    stand = Stand(folder, model)
    with running(stand.server, stand.engine):
        stand.register(questions)
        full = stand.answer(questions, wishes_of(FULL, None))
        for contender, budget in tqdm(((FULL, None), *CONTENDERS), desc=model.name):
            answers = full if contender == FULL else stand.answer(questions, wishes_of(contender, budget))
            yield from rows_of(
                questions, full, answers, contender=contender, on="vllm", model=model.name, budget=budget
            )
        stand.engine.stop()
        stand.server.stop()


def main() -> None:
    """Measure the models of both tasks and record the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=200, help="of each kind")
    parser.add_argument("--seed", type=int, default=2_000_000, help="that of `reference`: then it is the same prompts")
    parser.add_argument("--models", type=Path, default=Path(__file__).parent / "models")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--output", type=Path, help="instead of bench/results/quality.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for task in args.tasks:
        with tempfile.TemporaryDirectory(prefix="cachetier-quality-") as folder:
            questions = draw_questions(np.random.default_rng(args.seed), task, args.questions)
            rows += measure(Path(folder), args.models / task, questions)
    record("quality", rows, path=args.output)


if __name__ == "__main__":
    main()
