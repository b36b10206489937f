"""A run on the GPU spends its time on what was named first, and passes over what would take too long."""

from argparse import Namespace
from pathlib import Path

import pytest

from bench.gpu.contenders import Contender
from bench.gpu.gpu_bench import ON_HOST, Run
from bench.gpu.lab import Lab
from bench.gpu.questions import held_before
from bench.gpu.setting import Setting


def lab_in(folder: Path) -> Lab:
    return Lab(Setting(folder=folder), folder / "gpu.json", "a GPU", "bench.gpu.gpu_bench")


@pytest.mark.parametrize(
    ("seconds", "asked"),
    [
        (480, ["cold_prefill", "device_bytes", "ttft_host"]),
        (40, ["device_bytes", "ttft_host"]),
        (20, ["device_bytes"]),
    ],
)
def test_questions_are_asked_as_named_and_what_takes_too_long_is_passed_over(
    tmp_path: Path, seconds: float, asked: list[str]
) -> None:
    lab, seen = lab_in(tmp_path), list[str]()
    named = ["cold_prefill", "disk_read", "device_bytes", "ttft_host"]
    run = Run(lab, Namespace(questions=named, seconds=seconds, profile=False))
    run.ask({name: lambda _, name=name: seen.append(name) for name in ON_HOST})
    assert seen == asked
    assert len(lab.errors) == 3 - len(asked)


def test_what_was_offered_before_is_what_was_computed(tmp_path: Path) -> None:
    lab = lab_in(tmp_path)
    contender = Contender("lmcache", lab.setting, None)
    contender.asked = [{"tokens": 32768, "cached": 0}, {"tokens": 32768, "cached": 24576}]
    assert held_before(lab, contender) == {"offered_before_gib": 5.0}
