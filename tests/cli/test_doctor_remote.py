"""The doctor tells whether a remote store can be used."""

import json
from pathlib import Path

import pytest

from cachetier.cli import doctor
from cachetier.cli.doctor_checks import Status
from cachetier.cli.doctor_remote import check_remote
from cachetier.cli.main import main
from tests.remote.masters import running_master
from tests.remote.s3_server import running_s3


def test_a_bucket_that_works_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    with running_s3(tmp_path) as server:
        result = check_remote(server.url)
        assert (result.status, result.advice) == (Status.OK, ""), result
        assert "a look-up takes" in result.text
        assert server.num_objects() == 0


def test_a_mooncake_store_without_memory_is_reported_and_the_doctor_brings_none(tmp_path: Path) -> None:
    with running_master(tmp_path) as master:
        url, _, _ = master.url.partition("?")
        assert check_remote(master.url).status is Status.OK
        result = check_remote(url)
        assert (result.status, result.text) == (Status.WARN, "answers, and has no room for a probe object")


def test_one_that_does_not_answer_fails_with_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", ())
    assert main(["doctor", "--data-dir", str(tmp_path), "--remote", "mooncake://127.0.0.1:1", "--json"]) == 1
    [result] = json.loads(capsys.readouterr().out)
    assert (result["status"], result["text"]) == ("fail", "does not answer")
    assert main(["doctor", "--data-dir", str(tmp_path), "--remote", "ftp://host"]) == 1
    assert "mooncake://MASTER_HOST:PORT" in capsys.readouterr().out
