"""Make bench/RESULTS.md from bench/results/*.json: one section a question, one column a contender.

    python bench/report.py            write RESULTS.md
    python bench/report.py --check    only tell whether it is up to date

The same results give the same bytes: questions stand in the order of the files' names and of the rows in them.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

RESULTS_DIR = Path(__file__).parent / "results"
REPORT = Path(__file__).parent / "RESULTS.md"
HEADER = """\
# Measured

Made by `python bench/report.py` from `bench/results/*.json`, which the scripts in `bench/` write. Do not edit.
"""

Parameter = str | int | float | bool | None
Parameters = tuple[tuple[str, Parameter], ...]


class Result(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One number: what was asked, of whom, under which circumstances, and how to measure it again.

    Where it is the median of `samples`, these are kept, with `notes` on what else was counted meanwhile.
    """

    question: str
    contender: str
    parameters: dict[str, Parameter]
    value: int | float
    unit: str
    hardware: str
    command: str
    date: str
    samples: list[int | float] = msgspec.field(default_factory=list)
    notes: dict[str, Parameter] = msgspec.field(default_factory=dict)


def read_results(folder: Path) -> list[Result]:
    """Return all results in `folder`.

    Raises:
        ValueError: a file is not a list of results.
    """
    results: list[Result] = []
    for path in sorted(folder.glob("*.json")):
        try:
            results += msgspec.json.decode(path.read_bytes(), type=list[Result])
        except msgspec.DecodeError as error:
            raise ValueError(f"{path.name}: {error}") from error
    return results


def render(results: Iterable[Result]) -> str:
    """Return the report."""
    by_question: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        by_question.setdefault(result.question, {}).setdefault(result.hardware, []).append(result)
    lines = [HEADER]
    for question, by_hardware in by_question.items():
        lines += [f"## {question}", ""]
        for hardware, group in by_hardware.items():
            lines += [*_table(group), "", *_origin(hardware, group), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _table(group: list[Result]) -> Iterator[str]:
    contenders = list(dict.fromkeys(result.contender for result in group))
    names = list(dict.fromkeys(name for result in group for name in result.parameters))
    cells: dict[Parameters, dict[str, str]] = {}
    for result in group:
        row = cells.setdefault(tuple(sorted(result.parameters.items())), {})
        if result.contender in row:
            raise ValueError(
                f"two results for {result.question!r}, {result.contender}, {result.parameters}; what tells them apart?"
            )
        row[result.contender] = f"{_number(result.value)} {result.unit}".strip()
    yield _row(names + contenders)
    yield _row(["---"] * len(names) + ["---:"] * len(contenders))
    for parameters, row in cells.items():
        given = dict(parameters)
        yield _row([_text(given.get(name)) for name in names] + [row.get(name, "") for name in contenders])


def _origin(hardware: str, group: list[Result]) -> Iterator[str]:
    dates = sorted({result.date for result in group})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    commands = dict.fromkeys(result.command for result in group)
    yield f"{hardware}; {span}; " + ", ".join(f"`{command}`" for command in commands)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _text(value: Parameter) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def main() -> int:
    """Write or check the report; return the exit code."""
    parser = argparse.ArgumentParser(description="Make bench/RESULTS.md from bench/results/*.json.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when RESULTS.md is out of date")
    is_check = parser.parse_args().check
    try:
        text = render(read_results(RESULTS_DIR))
    except ValueError as error:
        print(f"bench/report.py: {error}", file=sys.stderr)
        return 1
    if not is_check:
        REPORT.write_text(text)
    elif not REPORT.exists() or REPORT.read_text() != text:
        print("bench/RESULTS.md is out of date; run python bench/report.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
