"""Who is still in the race, what was found, and the file that keeps it: written after every question."""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.gpu.contenders import Cachetier, Contender, MissError
from bench.gpu.setting import Setting
from bench.record import hardware, row

WARM_UP_TOKENS = 256
Question = Callable[["Lab"], None]


class Lab:
    """One run of the benchmark."""

    def __init__(self, setting: Setting, out: Path, hardware_name: str, module: str) -> None:
        """Keep what `out` holds already, but for what is measured again; `module` is what was started."""
        self.setting, self._module = setting, module
        self.live: dict[str, Contender] = {}
        self.limits: dict[str, float] = {}
        self.errors: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.random = random.Random(0)
        self._out, self._hardware = out, hardware_name
        self._next_seed = 1

    def seed(self) -> int:
        """Return a seed for text that nobody has seen."""
        self._next_seed += 1
        return self._next_seed

    def fail(self, name: str, error: Exception) -> None:
        """Write an error down, and stop the contender."""
        self.note(f"{name}: {type(error).__name__}: {error}")
        if contender := self.live.pop(name, None):
            contender.stop()

    def note(self, error: str) -> None:
        """Write an error down."""
        self.errors.append(error)
        print(f"!! {error}", file=sys.stderr, flush=True)

    def each(self, do: Callable[[Contender], None], *names: str) -> None:
        """Do something with every contender (or those of `names`) that lives, in random order."""
        chosen = [name for name in names or list(self.live) if name in self.live]
        for name in self.random.sample(chosen, len(chosen)):
            try:
                do(self.live[name])
            except MissError as error:
                self.note(str(error))
            except Exception as error:
                self.fail(name, error)

    def warm_up(self) -> None:
        """Have everybody store something, and wait until cachetier's memory is page-locked, as that of others is."""

        def ask(contender: Contender) -> None:
            contender.ask((self.seed(), WARM_UP_TOKENS))
            contender.settle()

        self.each(ask)
        if any(isinstance(contender, Cachetier) for contender in self.live.values()):
            time.sleep(self.setting.pin_s)

    def add(
        self, question: str, contender: str, samples: list[float], unit: str, notes: Any = None, **parameters: Any
    ) -> None:
        """Add one result, the median of `samples`; nothing if there are none."""
        if not samples:
            return
        found = row(question, contender, _rounded(statistics.median(samples)), unit, **parameters)
        self.rows.append(found | {"samples": [_rounded(sample) for sample in samples], "notes": notes or {}})

    def save(self) -> None:
        """Write all rows to the file, in place of older ones to the same questions."""
        command = " ".join(["python -m", self._module, *sys.argv[1:]])
        common = {"hardware": self._hardware, "command": command, "date": datetime.now(UTC).date().isoformat()}
        kept = json.loads(self._out.read_text()) if self._out.exists() else []
        found = {(each["question"], each["contender"]) for each in self.rows}
        kept = [each for each in kept if (each["question"], each["contender"]) not in found]
        rows = sorted([*kept, *({**each, **common} for each in self.rows)], key=_place)
        self._out.write_text(json.dumps(rows, indent=1) + "\n")

    def table(self) -> str:
        """Return what this run found, a line a result."""
        lines = []
        for each in sorted(self.rows, key=_place):
            parameters = ", ".join(f"{key}={value}" for key, value in each["parameters"].items())
            spread = f"{min(each['samples']):g}..{max(each['samples']):g}"
            start = f"{each['question']:22} {each['contender']:12} {each['value']:>10g} {each['unit']:9}"
            lines.append(f"{start} {spread:>22}  {parameters}")
        ends = [error.strip().splitlines() for error in self.errors]  # first what failed, last why
        return "\n".join([*lines, *("!! " + " ... ".join(dict.fromkeys([end[0], end[-1]])) for end in ends)])


QUESTIONS = (
    "ttft_host",
    "cold_prefill",
    "cold_prefill_cost",
    "bidirectional",
    "ttft_gpu_tier",
    "disk_read",
    "long_documents",
    "checksum_cost",
    "device_bytes",
    "match_documents",
    "ttft_blend",
    "throughput_blend",
    "handover",
)


CONTENDERS = (
    *("cachetier", "vllm-native", "lmcache", "nixl", "none", "limit"),
    *("cachetier-link", "cachetier-query", "prefix-only", "full-prefill"),
)


def _place(each: dict[str, Any]) -> tuple[int, int, int]:
    """Questions, short before long prompts, and contenders in the order of these lists."""
    return QUESTIONS.index(each["question"]), each["parameters"].get("tokens", 0), CONTENDERS.index(each["contender"])


def _rounded(value: float) -> float:
    return round(value, 3) if abs(value) < 1000 else round(value, 1)


def hardware_name() -> str:
    """Return the GPU, the CPU and the number of cores."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return f"{pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0))}; {hardware()}"
    except ImportError:  # a rehearsal without a GPU
        return hardware()


def timed(what: str, start_s: float) -> None:
    """Say how long something took."""
    print(f"-- {what}: {time.monotonic() - start_s:.1f} s", file=sys.stderr, flush=True)
