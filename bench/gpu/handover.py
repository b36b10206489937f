"""One run that measures disaggregated prefill on two GPUs of a host: one computes a prompt, the other its answer.

The time is that from asking to the first token of the engine that decodes. `none` is the prefill alone, on an engine
without a connector. cachetier's two engines share a server, and both are asked at once: the consumer loads what the
producer has stored so far while the rest is being computed; or one after the other. vLLM's NixlConnector hands over
from GPU to GPU once the prompt is computed; it is asked if its package is there. Results go to
bench/results/handover_gpu.json. About three minutes on two H200s:

    python -m bench.gpu.handover
    python -m bench.gpu.handover --rehearse       on the CPU with a tiny model: does it run?
"""

import argparse
import dataclasses
import importlib.util
import os
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.gpu.contenders import CACHETIER, Cachetier, Contender, free_ports, start_server
from bench.gpu.lab import Lab, hardware_name, timed
from bench.gpu.questions import LOOSE_TOKENS
from bench.gpu.raw import make_room_in_shared_memory
from bench.gpu.setting import GIB, Setting, rehearsal
from bench.record import RESULTS_DIR

PRODUCER = "producer"
NIXL = "NixlConnector"


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two engines, and how a prompt goes from one to the other."""

    producer: Contender
    consumer: Contender

    def at_once(self, part: tuple[int, int]) -> tuple[float, int]:
        """Ask both at the same time; return the seconds to the consumer's first token and how many tokens it found."""
        with ThreadPoolExecutor() as pool:
            prefill = pool.submit(self.producer.ask, part)
            answer = self.consumer.ask(part, cachetier={"prefill": PRODUCER})
            return self._seconds(prefill.result(), answer), answer["cached"]

    def in_turn(self, part: tuple[int, int]) -> tuple[float, int]:
        """Ask the consumer when the producer has answered."""
        prefill = self.producer.ask(part)
        answer = self.consumer.ask(part, cachetier={"prefill": PRODUCER})
        return self._seconds(prefill, answer), answer["cached"]

    def by_nixl(self, part: tuple[int, int]) -> tuple[float, int]:
        """Hand over as vLLM's proxy for NixlConnector does: the producer's answer says where its blocks are."""
        prefill = self.producer.ask(part, do_remote_decode=True, do_remote_prefill=False)
        answer = self.consumer.ask(part, **prefill["params"])
        return self._seconds(prefill, answer), answer["cached"]

    @staticmethod
    def _seconds(prefill: dict[str, Any], answer: dict[str, Any]) -> float:
        first_s = min(prefill["started_s"], answer["started_s"])
        return float(answer["started_s"] + answer["first_token_s"] - first_s)


def main() -> int:
    """Measure; return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / "handover_gpu.json")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with a tiny model")
    parser.add_argument("--batched-tokens", type=int, default=16384, help="max_num_batched_tokens of all engines")
    parser.add_argument("--logs", type=Path, help="folder that gets the ends of all logs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cachetier-bench-") as name:
        folder = Path(name)
        setting = rehearsal(folder) if options.rehearse else Setting(folder=folder, is_eager=True, host_bytes=12 * GIB)
        if not options.rehearse:
            make_room_in_shared_memory(2 * setting.host_bytes)
        lab = Lab(setting, options.out, hardware_name(), "bench.gpu.handover")
        run(lab, setting.tier_length, options.batched_tokens)
        lab.save()
        if options.logs:
            options.logs.mkdir(parents=True, exist_ok=True)
            for log in folder.rglob("*.log"):
                (options.logs / log.name).write_bytes(log.read_bytes()[-200_000:])
        print(lab.table(), flush=True)
    return 1 if lab.errors else 0


def run(lab: Lab, length: int, batched_tokens: int) -> None:
    """Start all engines and ask them in turn; what fails is noted."""
    setting = lab.setting
    server = start_server(setting, "handover", 0)
    batched = {"max_num_batched_tokens": min(batched_tokens, length // 2)}
    engines = [Contender("none", setting, None, **batched)]
    for role in (PRODUCER, "consumer"):
        connector = CACHETIER | {"kv_role": f"kv_{role}"}
        engines.append(Cachetier(setting, server, f"cachetier-{role}", connector, extra={"name": role}, **batched))
    if importlib.util.find_spec("nixl") or importlib.util.find_spec("nixl_cu13"):
        engines += [
            Contender(f"nixl-{role}", setting, {"kv_connector": NIXL}, **batched) for role in (PRODUCER, "consumer")
        ]
    for engine, port in zip(engines, free_ports(len(engines)), strict=True):
        engine.environment["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(port)
        place = "1" if engine.name.endswith("consumer") else "0"
        engine.environment |= {"CUDA_VISIBLE_DEVICES": place, "VLLM_CPU_OMP_THREADS_BIND": place}
    try:
        began_s = time.monotonic()
        with ThreadPoolExecutor(1 if setting.is_rehearsal else len(engines)) as pool:
            list(pool.map(_started, engines))
        lab.live = {each.name: each for each in engines}
        timed("starting", began_s)
        lab.warm_up()
        ask_all(lab, length, batched["max_num_batched_tokens"])
    except Exception as error:
        lab.note(f"{type(error).__name__}: {error}")
    finally:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Contender.stop, engines))
        server.kill()
        server.clear()


def ask_all(lab: Lab, length: int, batched_tokens: int) -> None:
    """Ask every way in every round, for a prompt that nobody has seen."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    pair = Pair(lab.live["cachetier-producer"], lab.live["cachetier-consumer"])
    ways = {("cachetier", "at once"): pair.at_once, ("cachetier", "in turn"): pair.in_turn}
    if "nixl-producer" in lab.live:
        ways["nixl", "in turn"] = Pair(lab.live["nixl-producer"], lab.live["nixl-consumer"]).by_nixl
    before = lab.live["cachetier-consumer"].counters()
    for number in range(lab.setting.rounds + 1):  # the first finds kernels and pages that are not ready yet
        if number == 1:
            times.clear()
        times["none", ""].append(1000 * lab.live["none"].ask((lab.seed(), length))["first_token_s"])
        for way in lab.random.sample(list(ways), len(ways)):
            seconds, cached = ways[way]((lab.seed(), length))
            if cached < length - LOOSE_TOKENS:
                lab.note(f"{way}: the consumer found only {cached} of {length} tokens")
            times[way].append(1000 * seconds)
        lab.live["cachetier-consumer"].settle()
    after = lab.live["cachetier-consumer"].counters()
    waited = {"waited_tokens": after["tokens"]["waited"] - before["tokens"]["waited"]}
    for (name, how), samples in times.items():
        shape = {"tokens": length, "batched_tokens": batched_tokens} | ({"asked": how} if how else {})
        lab.add("handover", name, samples, "ms", waited if name == "cachetier" else None, **shape)
        if name != "none":
            cost = [100 * (each / none - 1) for each, none in zip(samples, times["none", ""], strict=True)]
            lab.add("handover", name, cost, "% over the prefill", **shape, measure="cost")


def _started(contender: Contender) -> None:
    contender.start()
    contender.wait_until_ready()


if __name__ == "__main__":
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    sys.exit(main())
