"""One run that measures cachetier beside vLLM's own offloading, LMCache and no connector, on one GPU.

Engines of all contenders are up at the same time and asked in turn, in random order within a round, so that whatever
changes on the machine changes for all of them; an engine that is not asked does nothing. They differ in nothing but
`kv_transfer_config`. Results are written after every question; a contender that fails is noted, and the rest goes on.
Questions are asked in the order in which they are named, within groups that share engines; one for which too little
time is left is passed over. Everything takes about nine minutes on an H200, in two commands of less than five each:

    python -m bench.gpu.gpu_bench --eager --questions ttft_host device_bytes long_documents cold_prefill
    python -m bench.gpu.gpu_bench --eager --questions ttft_gpu_tier checksum_cost disk_read bidirectional
    python -m bench.gpu.gpu_bench --rehearse       on the CPU with a tiny model: does it run?
"""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.gpu import bus, profile, questions, tiers
from bench.gpu.contenders import CACHETIER, Cachetier, Contender, Lmcache, native, start_server
from bench.gpu.lab import Lab, Question, hardware_name, timed
from bench.gpu.raw import make_room_in_shared_memory, measure_copies
from bench.gpu.setting import GIB, Setting, rehearsal
from bench.record import RESULTS_DIR
from tests.e2e.harness import Server

CONTENDERS = ("none", "cachetier", "vllm-native", "lmcache")
ON_HOST: dict[str, Question] = {
    "ttft_host": questions.ttft_host,
    "device_bytes": questions.device_bytes,
    "cold_prefill": questions.cold_prefill,
    "long_documents": questions.long_documents,
}
ON_TIERS: dict[str, Question] = {
    "ttft_gpu_tier": tiers.ttft_gpu_tier,
    "checksum_cost": tiers.checksum_cost,
    "disk_read": tiers.disk_read,
}
ON_BUS: dict[str, Question] = {"bidirectional": bus.bidirectional}
ASKED = [*ON_HOST, *ON_TIERS, *ON_BUS]
UNVERIFIED = {"kv_connector": "UnverifiedConnector", "kv_connector_module_path": "bench.gpu.unverified"}
LOADING = {"kv_connector": "LoadingConnector", "kv_connector_module_path": "tests.e2e.loading_connector"}
PROFILED = {"kv_connector": "ProfiledConnector", "kv_connector_module_path": "bench.gpu.profiled"}
PROFILES = {"ttft_host": "cachetier", "ttft_gpu_tier": "cachetier-gpu"}  # of whom, after which question
BUS_HOST_BYTES = 20 * GIB
# Seconds on an H200 with 16 cores, in eager mode; starting engines includes that their memory is page-locked.
START_S = 60
ESTIMATE_S = {
    "ttft_host": 36,
    "device_bytes": 1,
    "cold_prefill": 50,
    "long_documents": 83,
    "ttft_gpu_tier": 12,
    "checksum_cost": 8,
    "disk_read": 40,
    "bidirectional": 50,
}


def main() -> int:
    """Measure; return 1 if anything failed."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="cachetier-bench-") as name:
        setting = rehearsal(Path(name)) if options.rehearse else Setting(folder=Path(name), is_eager=options.eager)
        if options.rounds:
            setting = dataclasses.replace(setting, rounds=options.rounds)
        lab = Lab(setting, options.out, hardware_name(), "bench.gpu.gpu_bench")
        run = Run(lab, options)
        try:
            run.all()
        finally:
            run.stop()
            lab.save()
            if options.logs:
                run.keep_logs(options.logs)
            print(lab.table(), flush=True)
    return 1 if lab.errors else 0


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / "gpu.json")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--questions", nargs="+", choices=ASKED, default=ASKED)
    parser.add_argument("--rounds", type=int, default=0, help="how often each prompt is asked")
    parser.add_argument("--seconds", type=float, default=480, help="what would take longer is passed over")
    parser.add_argument("--eager", action="store_true", help="neither torch.compile nor CUDA graphs, for all")
    parser.add_argument("--profile", action="store_true", help="say where cachetier's time goes in first tokens")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with a tiny model")
    parser.add_argument("--logs", type=Path, help="folder that gets the ends of all logs")
    return parser.parse_args()


class Run:
    """The order of things: which engines are up for which questions."""

    def __init__(self, lab: Lab, options: argparse.Namespace) -> None:
        self._lab, self._setting, self._options = lab, lab.setting, options
        self._start_s = time.monotonic()
        self._server: Server | None = None

    def all(self) -> None:
        """Ask all questions that were asked for."""
        if not self._setting.is_rehearsal:
            make_room_in_shared_memory(4 * self._setting.host_bytes)
            self._lab.limits = measure_copies()
            print(f"-- pinned copies: {self._lab.limits}", file=sys.stderr)
        if self._wants(ON_HOST):
            self._replace_server("host", self._setting)
            self.start([self._make(name) for name in self._options.contenders])
            self._lab.warm_up()
            self.ask(ON_HOST)
        if self._wants(ON_TIERS) and "cachetier" in self._options.contenders:
            self._prepare_tiers()
            self._lab.warm_up()
            self.ask(ON_TIERS)
        if self._wants(ON_BUS):
            self._stop_all_but()
            setting = self._setting
            if not setting.is_rehearsal:
                setting = dataclasses.replace(setting, host_bytes=BUS_HOST_BYTES)
            self._replace_server("bus", setting)
            names = [name for name in self._options.contenders if name != "none"]
            self.start([self._make(name, setting, **setting.wide_arguments()) for name in names])
            self._lab.warm_up()
            self.ask(ON_BUS)

    def start(self, contenders: Sequence[Contender]) -> None:
        """Start contenders: the first alone, so that the others find what it compiled, then all at once."""
        began_s = time.monotonic()
        batches = [contenders[:1], contenders[1:]]
        if self._setting.is_rehearsal:
            batches = [[contender] for contender in contenders]
        elif self._lab.live or all(each.is_eager for each in contenders):  # nothing is compiled, or not any more
            batches = [contenders]
        for batch in batches:
            with ThreadPoolExecutor() as pool:
                for contender, starting in [(each, pool.submit(_started, each)) for each in batch]:
                    self._lab.live[contender.name] = contender
                    try:
                        seconds = starting.result()
                        print(f"-- {contender.name} is up after {seconds:.1f} s", file=sys.stderr, flush=True)
                    except Exception as error:
                        self._lab.fail(contender.name, error)
        timed("starting " + ", ".join(each.name for each in contenders), began_s)

    def ask(self, wanted: dict[str, Question]) -> None:
        """Ask those of the questions that were asked for, as long as there is time."""
        for name in self._named(wanted):
            if not self._has_time(ESTIMATE_S[name]):
                self._lab.note(f"{name}: no time left")
                continue
            began_s = time.monotonic()
            elapsed_s = began_s - self._start_s
            print(f"-- {name}: begins at {elapsed_s:.0f} s, about {ESTIMATE_S[name]} s", file=sys.stderr, flush=True)
            try:
                wanted[name](self._lab)
            except Exception as error:
                self._lab.fail(name, error)
            self._lab.save()
            timed(f"{name}, {time.monotonic() - self._start_s:.0f} s since the start", began_s)
            if name in PROFILES and self._options.profile:
                self._print_profile(name)

    def stop(self) -> None:
        """Stop whatever runs."""
        self._stop_all_but()
        if self._server is not None:
            self._server.kill()
            self._server.clear()

    def keep_logs(self, folder: Path) -> None:
        """Copy the ends of all logs."""
        folder.mkdir(parents=True, exist_ok=True)
        for log in self._setting.folder.rglob("*.log"):
            (folder / log.name).write_bytes(log.read_bytes()[-200_000:])

    def _wants(self, wanted: dict[str, Question]) -> bool:
        names = self._named(wanted)
        if names and not self._has_time(START_S + min(ESTIMATE_S[name] for name in names)):
            self._lab.note(f"{', '.join(names)}: no time left")
            return False
        return bool(names)

    def _named(self, wanted: dict[str, Question]) -> list[str]:
        """Return those of the questions that were asked for, in that order."""
        return [name for name in self._options.questions if name in wanted]

    def _has_time(self, estimate_s: float) -> bool:
        needed_s = 0.0 if self._setting.is_rehearsal else estimate_s
        return time.monotonic() - self._start_s + needed_s < self._options.seconds

    def _print_profile(self, name: str) -> None:
        """Print where cachetier's first tokens of a question spent their time."""
        if contender := self._lab.live.get(PROFILES[name]):
            hits = [each for each in self._lab.rows if (each["question"], each["contender"]) == (name, "none")]
            hits_ms = {each["parameters"]["tokens"]: each["value"] for each in hits}
            print(profile.table(contender.log_text(), contender.asked, hits_ms), flush=True)

    def _prepare_tiers(self) -> None:
        """Have engines without a connector, with one, with a GPU tier, and one that verifies nothing, on one server."""
        self._stop_all_but("none", "cachetier")
        self._replace_server("tiers", self._setting, self._setting.disk_bytes)
        setting, server = self._setting, self._server
        missing = [self._make(name) for name in ("none", "cachetier") if name not in self._lab.live]
        if "ttft_gpu_tier" in self._options.questions and not setting.is_rehearsal:
            extra = {"gpu_bytes": setting.gpu_tier_bytes}
            missing.append(Cachetier(setting, server, "cachetier-gpu", self._connector, extra=extra))
        if "checksum_cost" in self._options.questions:
            missing.append(Cachetier(setting, server, "cachetier-unverified", UNVERIFIED))
        if "disk_read" in self._options.questions:
            missing.append(Cachetier(setting, server, "cachetier-loading", LOADING))
        self.start(missing)
        if isinstance(kept := self._lab.live.get("cachetier"), Cachetier):
            kept.server = server
            server.wait_for(lambda stats: stats["sessions"] >= 2, 30)

    def _replace_server(self, folder: str, setting: Setting, disk_bytes: int = 0) -> None:
        """Start another server at the socket that all engines know; those that are up find it within a second."""
        if self._server is not None:
            self._server.kill()
            self._server.clear()
        self._server = start_server(setting, folder, disk_bytes)
        time.sleep(2)

    def _stop_all_but(self, *names: str) -> None:
        leaving = [name for name in self._lab.live if name not in names]
        with ThreadPoolExecutor() as pool:
            list(pool.map(Contender.stop, [self._lab.live.pop(name) for name in leaving]))

    @property
    def _connector(self) -> dict[str, str]:
        return PROFILED if self._options.profile else CACHETIER

    def _make(self, name: str, setting: Setting | None = None, **arguments: Any) -> Contender:
        setting = setting or self._setting
        if name == "none":
            return Contender("none", setting, None, **arguments)
        if name == "vllm-native":
            return native(setting, **arguments)
        if name == "lmcache":
            return Lmcache(setting, **arguments)
        return Cachetier(setting, self._server, connector=self._connector, **arguments)


def _started(contender: Contender) -> float:
    """Start a contender; return how long that took."""
    contender.start()
    return contender.wait_until_ready()


if __name__ == "__main__":
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    sys.exit(main())
