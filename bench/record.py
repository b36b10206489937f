"""Write a benchmark's rows to bench/results/NAME.json and print them as a table."""

import json
import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS_DIR = Path(__file__).parent / "results"


def row(question: str, contender: str, value: float, unit: str, **parameters: Any) -> dict[str, Any]:
    """Return one result; `record` adds hardware, command and date."""
    return {"question": question, "contender": contender, "parameters": parameters, "value": value, "unit": unit}


def write(
    name: str, rows: list[dict[str, Any]], *, path: Path | None = None, gpu: str = "", keeps_others: bool = False
) -> None:
    """Write `rows` to bench/results/NAME.json or `path`, in their order; `gpu` names what ran it.

    With `keeps_others`, rows in the file that answer other questions stay there.
    """
    script, spec = Path(sys.argv[0]), sys.modules["__main__"].__spec__
    program = ["-m", spec.name] if spec else [f"{script.parent.name}/{script.name}"]
    command = shlex.join(["python", *program, *sys.argv[1:]])
    common = {
        "hardware": ", ".join(filter(None, [gpu, hardware()])),
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
    }
    path = path or RESULTS_DIR / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = {each["question"] for each in rows}
    old = json.loads(path.read_text()) if keeps_others and path.exists() else []
    others = [each for each in old if each["question"] not in asked]
    path.write_text(json.dumps([*others, *({**each, **common} for each in rows)], indent=2) + "\n")


def record(
    name: str, rows: list[dict[str, Any]], *, path: Path | None = None, gpu: str = "", keeps_others: bool = False
) -> None:
    """Write `rows` as `write` does, and print them."""
    write(name, rows, path=path, gpu=gpu, keeps_others=keeps_others)
    for each in rows:
        parameters = ", ".join(f"{key}={value}" for key, value in each["parameters"].items())
        print(f"{each['question']:50}  {each['contender']:22}  {each['value']:>12} {each['unit']:6}  {parameters}")


def hardware() -> str:
    """Return the CPU's model and the number of cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    return f"{model}, {os.cpu_count()} cores"
