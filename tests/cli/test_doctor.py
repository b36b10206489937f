"""The doctor finds what it is there to find, changes nothing, and says so with its exit code."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cachetier.cli import doctor_checks
from cachetier.cli.doctor_checks import CHECKS, Status
from cachetier.cli.main import main
from tests.service.running import environment


def test_every_check_answers_and_all_take_at_most_four_seconds(tmp_path: Path) -> None:
    start = time.monotonic()
    results = [check(str(tmp_path / "data")) for check in CHECKS]
    assert time.monotonic() - start < 4
    assert len({result.name for result in results}) == len(CHECKS)
    for result in results:
        assert result.text
        assert result.advice or result.status == Status.OK
    assert list(tmp_path.iterdir()) == [], "nothing was left behind"


@pytest.fixture
def short_disk_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "TRANSFER_FILE_BYTES", 1)


@pytest.mark.usefixtures("short_disk_test")
def test_json_and_exit_code_of_a_healthy_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--data-dir", str(tmp_path / "data"), "--json"])
    results = json.loads(capsys.readouterr().out)
    assert {tuple(result) for result in results} == {("status", "name", "text", "advice")}
    assert code == int(any(result["status"] == "fail" for result in results))


@pytest.mark.usefixtures("short_disk_test")
def test_readable_data_directory_fails_with_the_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o755)
    assert main(["doctor", "--data-dir", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "fail data directory" in out
    assert f"chmod 700 {tmp_path}" in out


def test_file_in_place_of_the_data_directory_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert doctor_checks.check_permissions(str(tmp_path / "file")).status == Status.FAIL


def test_missing_shared_memory_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "SHARED_MEMORY", str(tmp_path / "none"))
    assert doctor_checks.check_shared_memory("").status == Status.FAIL


@pytest.mark.parametrize(
    ("limit", "has_gpu", "status"), [(8 << 20, True, "warn"), (8 << 20, False, "ok"), (-1, True, "ok")]
)
def test_memlock_matters_with_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, has_gpu: bool, status: str
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    monkeypatch.setattr(doctor_checks, "NVIDIA_DEVICE", str(tmp_path if has_gpu else tmp_path / "none"))
    assert doctor_checks.check_memlock("").status == status


@pytest.mark.parametrize(
    ("version", "status"), [("0.26.0", "ok"), ("0.33.1+cpu", "ok"), ("0.25.9", "warn"), ("1.0", "warn"), ("", "warn")]
)
def test_vllm_version_is_judged(monkeypatch: pytest.MonkeyPatch, version: str, status: str) -> None:
    monkeypatch.setattr(doctor_checks, "_version_of", lambda *_: version)
    assert doctor_checks.check_vllm("").status == status


def test_without_a_gpu_chunks_go_through_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "NVIDIA_DEVICE", str(tmp_path / "none"))
    result = doctor_checks.check_gpu_direct(str(tmp_path))
    assert (result.status, "host memory" in result.text, "no CUDA device" in result.text) == (Status.OK, True, True)


@pytest.mark.parametrize("mode", ["direct", "host"])
def test_with_a_gpu_the_probe_says_which_way_is_faster_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(doctor_checks, "NVIDIA_DEVICE", str(tmp_path))
    found = json.dumps({"mode": mode, "why": "9.00 GB/s against 3.00 GB/s", "advice": "buy one"})
    done = subprocess.CompletedProcess([], 0, f"a line of a library\n{found}\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    result = doctor_checks.check_gpu_direct(str(tmp_path))
    assert ("host memory" in result.text) == (mode == "host")
    assert "9.00 GB/s against 3.00 GB/s" in result.text
    assert result.advice == "buy one"


def test_the_real_probe_answers_where_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "NVIDIA_DEVICE", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = doctor_checks.check_gpu_direct(str(tmp_path / "data"))
    assert (result.status, result.text) == (Status.OK, "through host memory: no CUDA device")
    monkeypatch.setattr(doctor_checks, "PROBE", "cachetier_connector.cuda.no_such_probe")
    result = doctor_checks.check_gpu_direct(str(tmp_path / "data"))
    assert result.status == Status.WARN
    assert "no_such_probe" in result.advice


def test_program_prints_a_line_a_check_and_does_not_import_vllm(tmp_path: Path) -> None:
    code = (
        "import sys; from cachetier.cli import doctor_checks, main; doctor_checks.TRANSFER_FILE_BYTES = 1; "
        "code = main.main(['doctor', '--data-dir', sys.argv[1]]); "
        "sys.exit(99 if {'vllm', 'torch', 'lmdb'} & set(sys.modules) else code)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data")]
    outcome = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    lines = [line for line in outcome.stdout.splitlines() if not line.strip().startswith("->")]
    assert len(lines) == len(CHECKS)
    assert all(line.split()[0] in ("ok", "warn", "fail") for line in lines)
    assert outcome.returncode in (0, 1), outcome.stderr
