"""The report says what the results say, in the same way every time, and the committed one is up to date."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "report.py"
_spec = importlib.util.spec_from_file_location("bench_report", SCRIPT)
assert _spec
assert _spec.loader
report = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(report)


def row(value: float, contender: str = "cachetier", **changes: Any) -> dict[str, Any]:
    return {
        "question": "How long does a match take?",
        "contender": contender,
        "parameters": {"chunks": 512},
        "value": value,
        "unit": "ms",
        "hardware": "2 cores",
        "command": "python bench/match.py",
        "date": "2026-01-02",
        **changes,
    }


def rendered(folder: Path, **files: list[dict[str, Any]]) -> str:
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return report.render(report.read_results(folder))


def test_the_committed_report_is_up_to_date() -> None:
    assert report.REPORT.read_text() == report.render(report.read_results(report.RESULTS_DIR))


def test_contenders_stand_side_by_side_and_the_origin_below(tmp_path: Path) -> None:
    text = rendered(
        tmp_path,
        match=[
            row(1.23456),
            row(2, "other"),
            row(10.5, parameters={"chunks": 1024, "warm": True}, date="2026-01-05"),
        ],
    )
    assert text.removeprefix(report.HEADER) == (
        "\n## How long does a match take?\n\n"
        "| chunks | warm | cachetier | other |\n"
        "| --- | --- | ---: | ---: |\n"
        "| 512 |  | 1.235 ms | 2 ms |\n"
        "| 1,024 | yes | 10.5 ms |  |\n\n"
        "2 cores; 2026-01-02 to 2026-01-05; `python bench/match.py`\n"
    )


def test_questions_and_hardware_have_tables_of_their_own(tmp_path: Path) -> None:
    text = rendered(
        tmp_path, b=[row(1), row(2, hardware="8 cores")], a=[row(3, question="First?"), row(4, question="Second?")]
    )
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## First?", "## Second?", "## How long does a match take?"]
    assert text.count("| --- |") == 4


def test_the_order_of_parameters_in_a_file_does_not_matter(tmp_path: Path) -> None:
    orders = itertools.permutations([("a", 1), ("b", 2)])
    text = rendered(tmp_path, x=[row(n, str(n), parameters=dict(order)) for n, order in enumerate(orders)])
    assert "| 1 | 2 | 0 ms | 1 ms |" in text


def test_no_results_make_a_report_without_sections(tmp_path: Path) -> None:
    assert rendered(tmp_path) == report.HEADER


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.000123456, "0.0001235"), (12.3456, "12.35"), (999.96, "1000"), (1234567.8, "1,234,568"), (-2, "-2")],
)
def test_numbers_have_the_digits_that_mean_something(tmp_path: Path, value: float, text: str) -> None:
    assert f"| {text} ms |" in rendered(tmp_path, x=[row(value)])


@pytest.mark.parametrize(
    "rows",
    [
        [row(1), row(2)],
        [{"question": "What?"}],
        [{**row(1), "surprise": 1}],
        [row("fast")],  # type: ignore[arg-type]
        {"question": "no list"},
    ],
)
def test_results_that_cannot_be_shown_are_refused(tmp_path: Path, rows: Any) -> None:
    with pytest.raises(ValueError, match=r"two results|x\.json"):
        rendered(tmp_path, x=rows)


def test_the_script_writes_and_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "RESULTS_DIR", tmp_path)
    monkeypatch.setattr(report, "REPORT", tmp_path / "RESULTS.md")
    (tmp_path / "x.json").write_text(json.dumps([row(1)]))

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
        return report.main()

    assert run("--check") == 1
    assert "out of date" in capsys.readouterr().err
    assert run() == 0
    assert run("--check") == 0
    (tmp_path / "x.json").write_text(json.dumps([row(2)]))
    assert run("--check") == 1
    (tmp_path / "x.json").write_text("[")
    assert run() == 1
    assert "x.json" in capsys.readouterr().err


def test_samples_and_notes_stay_in_the_results(tmp_path: Path) -> None:
    plain, kept = rendered(tmp_path, a=[row(2)]), rendered(tmp_path, a=[row(2, samples=[1, 2, 3], notes={"hits": 512})])
    assert plain == kept
