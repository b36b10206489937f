"""Where the time to a first token goes when the prompt is loaded: from log lines of `profiled` and what was asked.

Every phase begins where the one before it ends, so that they sum up to the time that was measured.
"""

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

NUMBER = r"(-?[\d.]+)"
STAMP = rf"@{NUMBER} "
SCHEDULED = re.compile(
    rf"matched {NUMBER} ms, planned {NUMBER} ms, loaded {NUMBER} ms, scheduled {NUMBER} ms after it arrived"
)
LOADED = re.compile(
    rf"load of (\d+) chunks: queued {NUMBER} ms, pushed {NUMBER} ms, settled {NUMBER} ms, {NUMBER} GB/s"
)
PHASES = (
    "way in",
    "match",
    "plan",
    "hand over",
    "queue",
    "push",
    "settle",
    "report",
    "schedule",
    "compute, way out",
    "all",
)


def phases_ms(log: str, asked: Iterable[dict[str, Any]]) -> dict[int, list[list[float]]]:
    """Return `PHASES` of every prompt that was loaded at once, alone, by its length; `asked` is a `Contender`'s."""
    scheduled, loaded = _stamped(SCHEDULED, log), _stamped(LOADED, log)
    found = defaultdict(list)
    for ask in asked:
        start, all_ms = 1000 * ask["started_s"], 1000 * ask["first_token_s"]
        ours, loads = ([each for each in lines if 0 < each[0] - start < all_ms] for lines in (scheduled, loaded))
        if len(ours) != 1 or len(loads) != 1:
            continue
        [(now, matched, planned, ended, since)], [(settled, _, queue, push, settle, _)] = ours, loads
        arrived = now - since
        submitted = settled - settle - push - queue
        found[ask["tokens"]].append(
            [
                arrived - start,
                matched,
                planned - matched,
                submitted - (arrived + planned),
                queue,
                push,
                settle,
                arrived + ended - settled,
                since - ended,
                start + all_ms - now,
                all_ms,
            ]
        )
    return dict(found)


def table(log: str, asked: Iterable[dict[str, Any]], hits_ms: dict[int, float]) -> str:
    """Return medians, a column a length; `hits_ms`: a hit in the GPU's own prefix cache, by length."""
    found = sorted(phases_ms(log, asked).items())
    head = ["ms, median of", *(f"{len(samples)} x {length}" for length, samples in found)]
    columns = [[statistics.median(values) for values in zip(*samples, strict=True)] for _, samples in found]
    rows = [[name, *(f"{column[number]:.2f}" for column in columns)] for number, name in enumerate(PHASES)]
    rows.append(["GPU hit, all", *(f"{hits_ms.get(length, 0.0):.2f}" for length, _ in found)])
    return "\n".join(f"{name:18}" + "".join(f"{value:>14}" for value in values) for name, *values in [head, *rows])


def _stamped(line: re.Pattern[str], log: str) -> list[list[float]]:
    """Return the stamp, in milliseconds, and the numbers of each such line."""
    found = re.finditer(STAMP + r".*?" + line.pattern, log)
    return [[1000 * float(match[1]), *map(float, match.groups()[1:])] for match in found]
