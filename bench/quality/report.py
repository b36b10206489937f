"""Make docs/quality.md and docs/quality.svg of bench/results/quality.json and quality_reference.json.

    python -m bench.quality.report               # after `bench.quality.reference`, `bench.quality.run`, or both
    python -m bench.quality.report --check       # only tell whether they are up to date

The same results give the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.quality.chart import Line, Panel, draw
from bench.quality.measures import CONTENDERS, FULL
from bench.report import RESULTS_DIR, Result, read_results

DOCS = Path(__file__).parents[2] / "docs"
NAMES = {"vllm": "vLLM", "torch": "simulated"}
COLUMNS = {
    "accuracy_cross": "across",
    "accuracy_in": "in one",
    "agreement": "agreement",
    "kl": "KL, nats",
    "tokens_computed": "computed",
}
TITLES = {
    "alias": "alias: facts that build on facts of other documents",
    "header": "header: the first document says how all are to be read",
}
TEXT = """\
# What blending does to answers

Made by `python -m bench.quality.report` of `bench/results/quality*.json`. Do not edit.

Two small models ([bench/quality](../bench/quality/README.md)) are asked about prompts of five documents of 192 to 256
tokens, whose KV was computed for each document alone. A question needs a chain of facts that stands in one document
(*in one*) or in several (*across*). *Agreement* is how often the answer is that of the full prefill, right or wrong,
and *KL* how far the probabilities of the answer's token are from its. *Computed* is the tokens a prompt that blend
passes computed; `query` computes some of them twice. *vLLM* is the engine with cachetier, *simulated* the same weights
in plain torch, by a program that shares no code with it.

![Accuracy against budget](quality.svg)
"""
READING = """\
## How to read this

- A document's own facts survive blending. What it takes from another document does not: its KV was computed without
  it. Of the questions across documents, `none` and `link` answer hardly any right. `link` makes little difference here,
  because nothing in these texts depends on a document's first tokens.
- `query` computes again what the question attends to, and that is most of what was missing: in the task *alias* nearly
  all of it at 15%. It is a small model's task with one question about one chain; do not expect as much of a question
  that needs the whole text.
- Where the first document changes how all others are read, too many tokens depend on it for any selector: answers are
  wrong within one document as well, and a budget that repairs them saves little. Do not blend such prompts. Put what
  holds for all documents in front of them as a prefix that is stored exactly *and* write documents that mean the same
  behind any such prefix.
- To find out on texts of your own, ask the same questions with `{"cachetier": {"load": false}}` and compare.
"""

Key = tuple[str, str, str, float | None, str]  # question, model, contender, budget, on


def by_key(results: list[Result]) -> dict[Key, float]:
    """Return the values."""
    found: dict[Key, float] = {}
    for result in results:
        if result.question in COLUMNS and "model" in result.parameters:
            given = result.parameters
            budget = given.get("budget")
            assert budget is None or isinstance(budget, float)
            key = (result.question, str(given["model"]), result.contender, budget, str(given["on"]))
            found[key] = float(result.value)
    return found


def sections(values: dict[Key, float]) -> Iterator[str]:
    """Yield the page."""
    yield TEXT
    for model, title in TITLES.items():
        runs = [on for on in NAMES if (next(iter(COLUMNS)), model, FULL, None, on) in values]
        if runs:
            yield "\n".join([f"## {title[0].upper()}{title[1:]}", "", *_table(values, model, runs), ""])
    yield READING


def _table(values: dict[Key, float], model: str, runs: list[str]) -> Iterator[str]:
    yield _row(["selector", "budget", *(f"{NAMES[on]}: {column}" for on in runs for column in COLUMNS.values())])
    yield _row(["---"] + ["---:"] * (1 + len(runs) * len(COLUMNS)))
    for contender, budget in ((FULL, None), *CONTENDERS):
        cells = [
            _number(question, values.get((question, model, contender, budget, on)))
            for on in runs
            for question in COLUMNS
        ]
        yield _row([contender, "" if budget is None else f"{budget:.0%}", *cells])


def _number(question: str, value: float) -> str:
    return {"kl": f"{value:.3f}", "tokens_computed": f"{value:.0f}"}.get(question, f"{100 * value:.1f}%")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def chart(values: dict[Key, float]) -> str:
    """Return the picture: a panel a model; solid lines for what the engine said, dashed ones for the simulation."""
    panels = []
    for model, title in TITLES.items():
        lines = [
            _line(values, question, model, on, color)
            for question, color in (("accuracy_cross", "#c0392b"), ("accuracy_in", "#2c6fbb"))
            for on in NAMES
            if (question, model, FULL, None, on) in values
        ]
        panels.append(Panel(title, lines))
    return draw(panels)


def _line(values: dict[Key, float], question: str, model: str, on: str, color: str) -> Line:
    curve = [(budget or 0.0, contender) for contender, budget in CONTENDERS if contender != "none"]
    return Line(
        label=f"{COLUMNS[question]}, {NAMES[on]}",
        color=color,
        is_dashed=on == "torch",
        points=[(at, values[question, model, contender, at or None, on]) for at, contender in curve],
        none=values[question, model, "none", None, on],
        full=values[question, model, FULL, None, on],
    )


def main() -> int:
    """Write or check page and picture; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when something is out of date")
    is_check = parser.parse_args().check
    values = by_key(read_results(RESULTS_DIR))
    made = {DOCS / "quality.md": "\n".join(sections(values)), DOCS / "quality.svg": chart(values)}
    for path, text in made.items():
        if not is_check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            print(f"{path.name} is out of date; run python -m bench.quality.report", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
