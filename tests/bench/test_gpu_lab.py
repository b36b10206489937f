"""What a run on the GPU found is kept: beside older results, in place of older ones to the same questions."""

import json
from pathlib import Path

from bench.gpu.contenders import Contender, MissError
from bench.gpu.lab import Lab
from bench.gpu.setting import LLAMA_8B, rehearsal, token_bytes


def lab_in(folder: Path) -> Lab:
    return Lab(rehearsal(folder), folder / "gpu.json", "a GPU", "bench.gpu.gpu_bench")


def found(folder: Path) -> list[tuple[str, str, float]]:
    rows = json.loads((folder / "gpu.json").read_text())
    return [(row["question"], row["contender"], row["value"]) for row in rows]


def test_a_later_run_replaces_what_it_measured_and_keeps_the_rest(tmp_path: Path) -> None:
    first = lab_in(tmp_path)
    first.add("ttft_host", "none", [1.0, 3.0, 2.0], "ms", tokens=8192)
    first.add("ttft_host", "cachetier", [9.0], "ms", tokens=8192)
    first.add("device_bytes", "lmcache", [600.0], "MiB")
    first.save()
    second = lab_in(tmp_path)
    second.add("ttft_host", "cachetier", [5.0], "ms", tokens=8192)
    second.add("cold_prefill", "none", [], "ms", tokens=8192)
    second.save()
    second.save()
    assert found(tmp_path) == [
        ("ttft_host", "cachetier", 5.0),
        ("ttft_host", "none", 2.0),
        ("device_bytes", "lmcache", 600.0),
    ]


class Fake(Contender):
    """Starts nothing."""

    def __init__(self, name: str, error: Exception | None, lab: Lab) -> None:
        super().__init__(name, lab.setting, None)
        self.error, self.num_asked = error, 0

    def ask_once(self) -> None:
        self.num_asked += 1
        if self.error is not None:
            raise self.error


def test_a_contender_that_fails_is_asked_no_more_and_one_that_misses_is(tmp_path: Path) -> None:
    lab = lab_in(tmp_path)
    good, missing, broken = (
        Fake(name, error, lab)
        for name, error in (("good", None), ("missing", MissError("no")), ("broken", RuntimeError("no")))
    )
    lab.live = {each.name: each for each in (good, missing, broken)}
    for _ in range(2):
        lab.each(lambda contender: contender.ask_once())  # type: ignore[attr-defined]
    assert (good.num_asked, missing.num_asked, broken.num_asked) == (2, 2, 1)
    assert list(lab.live) == ["good", "missing"]
    assert len(lab.errors) == 3


def test_a_token_of_the_8b_model_has_128_kib() -> None:
    assert token_bytes(LLAMA_8B) == 128 << 10
