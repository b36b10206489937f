"""The whole command against a server that speaks the engine's interface."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachetier.cli.main import main
from cachetier.cli.warm_engine import Backoff, Engine, Refused, Sent, TooLong, outcome_of
from cachetier.cli.warm_input import COMPLETIONS_PATH, Prompt
from cachetier.cli.warm_progress import TierCounters
from cachetier.cli.warm_up import default_journal
from cachetier.core.errors import ConfigError, UnavailableError
from tests.cli.openai_server import FakeEngine, running


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[FakeEngine]:
    with running(FakeEngine(), str(tmp_path / "tier.sock")) as server:
        yield server


def warm_up(engine: FakeEngine, *arguments: object) -> int:
    return main(["warm", "--url", engine.url, *map(str, arguments)])


def command_line(engine: FakeEngine, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "cachetier.cli.main", "warm", "--url", engine.url, *map(str, arguments)]


def started(engine: FakeEngine, *arguments: object) -> subprocess.Popen[bytes]:
    command = command_line(engine, *arguments)
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def write_prompts(file: Path, count: int) -> list[str]:
    texts = [f"prompt {number}" for number in range(count)]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return texts


def wait_until(engine: FakeEngine, num_requests: int) -> None:
    deadline = time.monotonic() + 20
    while len(engine.requests) < num_requests:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def journals(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "state").rglob("*.journal"))


class TestSending:
    def test_every_kind_of_input_arrives_once_with_one_token_to_generate(
        self, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "a.txt").write_text("text a")
        lines = [{"messages": [{"role": "user", "content": "hi"}], "cache_salt": "s"}, {"token_ids": [5, 6, 7]}]
        (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert warm_up(engine, "--concurrency", 1, tmp_path / "folder", tmp_path / "p.jsonl") == 0
        common = {"model": "tiny", "max_tokens": 1, "temperature": 0.0}
        assert engine.requests == [
            ("/v1/completions", {"prompt": "text a", **common}),
            ("/v1/chat/completions", {**lines[0], **common}),
            ("/v1/completions", {"prompt": [5, 6, 7], **common}),
        ]
        assert "sent 3 prompts, 11 tokens" in capsys.readouterr().out

    def test_concurrency_is_reached_and_never_exceeded(self, engine: FakeEngine, tmp_path: Path) -> None:
        engine.delay_s = 0.02
        texts = write_prompts(tmp_path / "p.jsonl", 60)
        assert warm_up(engine, "--concurrency", 5, tmp_path / "p.jsonl") == 0
        assert engine.most_in_flight == 5
        assert sorted(engine.texts()) == sorted(texts)

    def test_the_last_tokens_and_the_tier_are_counted(
        self, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        engine.counters = {"stored": 1000, "hit": {"host": 10, "disk": 20}}
        write_prompts(tmp_path / "p.jsonl", 3)
        assert warm_up(engine, "--socket", engine.socket, tmp_path / "p.jsonl") == 0
        assert "tier stored 24 tokens; hit 0" in capsys.readouterr().out

    def test_too_long_and_empty_prompts_are_skipped_and_counted(
        self, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name, text in {"a.txt": "x" * 5000, "b.txt": "short", "c.txt": "", "d.txt": "x" * 1000}.items():
            (tmp_path / name).write_text(text)
        assert warm_up(engine, *sorted(tmp_path.glob("*.txt"))) == 0
        output = capsys.readouterr()
        assert engine.texts() == ["short"]
        assert "skipped 2: longer than the model's context" in output.out
        assert "skipped 1: empty" in output.out
        assert "a.txt: HTTP 400: This model's maximum context length is 1000" in output.err

    def test_a_refused_prompt_and_a_bad_line_fail_the_run_but_not_the_others(
        self, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "p.jsonl").write_text('{"prompt": "refuse me"}\nrubbish\n{"prompt": "good"}\n')
        assert warm_up(engine, tmp_path / "p.jsonl") == 1
        output = capsys.readouterr()
        assert engine.texts() == ["good"]
        assert "failed 2" in output.out
        assert "p.jsonl:1: HTTP 400: bad grammar" in output.err
        assert "p.jsonl:2: " in output.err

    def test_only_the_first_failures_are_explained(
        self, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "p.jsonl").write_text("rubbish\n" * 100)
        assert warm_up(engine, tmp_path / "p.jsonl") == 1
        output = capsys.readouterr()
        assert len(output.err.splitlines()) == 11
        assert "failed 100" in output.out

    def test_a_terminal_shows_prompts_and_tokens_sent_stored_and_hit(self, engine: FakeEngine, tmp_path: Path) -> None:
        engine.delay_s = 0.03
        write_prompts(tmp_path / "p.jsonl", 100)
        ours, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (40, 150))
        command = command_line(engine, "--socket", engine.socket, "--concurrency", 2, tmp_path / "p.jsonl")
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs)
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # a pseudo-terminal's end is an error
            while part := os.read(ours, 65536):
                shown += part
        os.close(ours)
        assert process.wait() == 0
        assert re.search(rb"100 prompts \[.*tokens=890, stored=[1-9]\d*, hit=0", shown)


class TestModels:
    def test_an_unknown_model_is_refused_with_the_served_ones(
        self, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        engine.models = ["tiny", "big"]
        write_prompts(tmp_path / "p.jsonl", 1)
        assert warm_up(engine, "--model", "huge", tmp_path / "p.jsonl") == 2
        assert "does not serve 'huge'; it serves tiny, big" in capsys.readouterr().err
        assert warm_up(engine, tmp_path / "p.jsonl") == 2
        assert "name one of the models with --model" in capsys.readouterr().err
        assert engine.requests == []
        assert warm_up(engine, "--model", "big", tmp_path / "p.jsonl") == 0
        assert engine.requests[0][1]["model"] == "big"

    def test_the_url_may_end_in_v1(self, engine: FakeEngine, tmp_path: Path) -> None:
        engine.url += "/v1/"
        write_prompts(tmp_path / "p.jsonl", 1)
        assert warm_up(engine, tmp_path / "p.jsonl") == 0

    def test_a_key_is_sent_and_its_absence_explained(
        self,
        engine: FakeEngine,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        engine.key = "sesame"
        write_prompts(tmp_path / "p.jsonl", 1)
        assert warm_up(engine, tmp_path / "p.jsonl") == 1
        assert "VLLM_API_KEY" in capsys.readouterr().err
        monkeypatch.setenv("VLLM_API_KEY", "sesame")
        assert warm_up(engine, tmp_path / "p.jsonl") == 0

    @pytest.mark.parametrize(
        ("url", "words", "code"),
        [
            ("http://127.0.0.1:9", "no engine answers at http://127.0.0.1:9", 1),
            ("ftp://x", "write http://HOST:PORT", 2),
        ],
    )
    def test_an_engine_that_cannot_be_reached_is_named(
        self, url: str, words: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        unreachable = FakeEngine()
        unreachable.url = url
        write_prompts(tmp_path / "p.jsonl", 1)
        assert warm_up(unreachable, tmp_path / "p.jsonl") == code
        assert words in capsys.readouterr().err

    def test_a_server_of_another_kind_is_named(
        self, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        engine.url += "/elsewhere"
        write_prompts(tmp_path / "p.jsonl", 1)
        assert warm_up(engine, tmp_path / "p.jsonl") == 1
        assert "not as an OpenAI server" in capsys.readouterr().err

    def test_a_missing_input_or_tier_is_refused_before_anything_is_sent(
        self, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_prompts(tmp_path / "p.jsonl", 1)
        assert warm_up(engine, tmp_path / "p.jsonl", tmp_path / "missing") == 2
        assert "no such file" in capsys.readouterr().err
        assert warm_up(engine, "--socket", tmp_path / "nobody", tmp_path / "p.jsonl") == 1
        assert "no cachetier server answers" in capsys.readouterr().err
        assert engine.requests == []


class TestRetries:
    def test_a_busy_engine_and_a_broken_connection_are_tried_again(self, engine: FakeEngine, tmp_path: Path) -> None:
        engine.replies = [429, 503, 0]
        texts = write_prompts(tmp_path / "p.jsonl", 6)
        assert warm_up(engine, "--concurrency", 6, tmp_path / "p.jsonl") == 0
        assert sorted(engine.texts()) == texts
        assert engine.num_connections_dropped == 1

    def test_an_engine_that_stays_away_ends_the_run(self, engine: FakeEngine) -> None:
        engine.replies = [503] * 3

        async def send() -> int:
            async with Engine(engine.url, max_tokens=1, backoff=Backoff(3, 0.01, 0.02)) as client:
                await client.choose_model(None)
                with pytest.raises(UnavailableError, match=r"after 3 tries; the last: HTTP 503: busy"):
                    await client.send(Prompt("a", COMPLETIONS_PATH, {"prompt": "x"}))
                assert await client.send(Prompt("a", COMPLETIONS_PATH, {"prompt": "x"})) == Sent(1)
                return client.num_retries

        assert asyncio.run(send()) == 2

    def test_waits_double_up_to_a_limit_and_respect_retry_after(self) -> None:
        backoff = Backoff()
        waits = [backoff.wait_s(failures) for failures in range(1, 9)]
        assert all(0.75 * 0.5 * 2**index <= wait or wait == 30 for index, wait in enumerate(waits))
        assert 60 < sum(waits) < 180
        assert backoff.wait_s(1, "7") == 7
        assert backoff.wait_s(1, "3600") == 30
        assert backoff.wait_s(1, "Wed, 21 Oct 2026 07:28:00 GMT") < 1

    @pytest.mark.parametrize(
        ("status", "text", "kind"),
        [
            (200, b'{"usage": {"prompt_tokens": 3}}', Sent),
            (200, b"{}", Refused),
            (200, b"\xff", Refused),
            (400, b'{"error": {"message": "maximum context length is 5"}}', TooLong),
            (400, b'{"error": "odd"}', Refused),
            (413, b"", TooLong),
            (404, b"<html>", Refused),
            (500, b'[1, "\xff"]', Refused),
        ],
    )
    def test_every_final_answer_has_an_outcome(self, status: int, text: bytes, kind: type) -> None:
        assert type(outcome_of(status, text)) is kind


class TestResuming:
    def test_kill_9_loses_nothing_that_was_answered(self, engine: FakeEngine, tmp_path: Path) -> None:
        engine.delay_s = 0.01
        texts = write_prompts(tmp_path / "p.jsonl", 200)
        killed = started(engine, "--concurrency", 4, tmp_path / "p.jsonl")
        wait_until(engine, 40)
        killed.kill()
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL
        assert len(engine.requests) < 200
        (journal,) = journals(tmp_path)
        with journal.open("ab") as file:
            file.write(b"0123torn")
        assert warm_up(engine, "--concurrency", 4, tmp_path / "p.jsonl") == 0
        assert set(engine.texts()) == set(texts)
        assert len(engine.requests) <= 200 + 4  # only what was in flight at the kill was sent twice
        assert journals(tmp_path) == []

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_an_interruption_ends_soon_with_a_summary_and_can_be_resumed(
        self, engine: FakeEngine, tmp_path: Path, number: signal.Signals
    ) -> None:
        texts = write_prompts(tmp_path / "p.jsonl", 50)
        engine.delay_s = 0.02
        process = started(engine, "--concurrency", 2, tmp_path / "p.jsonl")
        wait_until(engine, 10)
        engine.delay_s = 60.0  # whoever waited for prompts in flight would wait for long
        time.sleep(0.1)
        process.send_signal(number)
        output, errors = process.communicate(timeout=10)
        assert process.returncode == 130
        assert b"sent 1" in output
        assert b"interrupted" in output
        assert b"Traceback" not in errors
        engine.delay_s = 0.0
        assert warm_up(engine, tmp_path / "p.jsonl") == 0
        assert sorted(engine.texts()) == sorted(texts)

    def test_an_interruption_while_waiting_for_standard_input_ends_at_once(
        self, engine: FakeEngine, tmp_path: Path
    ) -> None:
        process = started(engine, "-")
        assert process.stdin is not None
        process.stdin.write(b'{"prompt": "first"}\n')
        process.stdin.flush()
        wait_until(engine, 1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        _, errors = process.communicate()
        assert b"Traceback" not in errors
        assert b"Fatal" not in errors

    def test_a_failed_run_sends_only_what_failed_the_next_time(self, engine: FakeEngine, tmp_path: Path) -> None:
        (tmp_path / "p.jsonl").write_text('{"prompt": "refuse me"}\n{"prompt": "good"}\n')
        assert warm_up(engine, tmp_path / "p.jsonl") == 1
        assert warm_up(engine, tmp_path / "p.jsonl") == 1
        assert engine.texts() == ["good"]
        assert warm_up(engine, "--no-resume", tmp_path / "p.jsonl") == 1
        assert engine.texts() == ["good", "good"]

    def test_a_complete_run_is_sent_again_unless_its_journal_was_named(
        self, engine: FakeEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_prompts(tmp_path / "p.jsonl", 3)
        for _ in range(2):
            assert warm_up(engine, tmp_path / "p.jsonl") == 0
        assert len(engine.requests) == 6
        for _ in range(2):
            assert warm_up(engine, "--journal", tmp_path / "j", tmp_path / "p.jsonl") == 0
        assert len(engine.requests) == 9
        assert "skipped 3: sent by an earlier run" in capsys.readouterr().out

    def test_standard_input_is_sent_as_it_comes(self, engine: FakeEngine, tmp_path: Path) -> None:
        process = started(engine, "-")
        assert process.stdin is not None
        for number in range(3):
            process.stdin.write(json.dumps({"prompt": str(number)}).encode() + b"\n")
            process.stdin.flush()
            wait_until(engine, number + 1)
        process.communicate()
        assert process.returncode == 0
        assert engine.texts() == ["0", "1", "2"]


class TestCounters:
    def test_a_restart_of_the_tier_does_not_lose_what_was_counted(self, engine: FakeEngine) -> None:
        async def count() -> tuple[int, int, int, int]:
            counters = TierCounters(engine.socket)
            await counters.start()
            for values in ((150, 3, 5, 0), (30, 0, 0, 2), (40, 4, 1, 2)):  # the second is smaller: a new server
                gpu, host, disk = values[1:]
                engine.counters = {"stored": values[0], "hit": {"gpu": gpu, "host": host, "disk": disk}}
                await counters.refresh()
            return counters.gained.as_tuple()

        engine.counters = {"stored": 100, "hit": {"host": 0, "disk": 0}}
        assert asyncio.run(count()) == (50 + 30 + 10, 3 + 0 + 4, 5 + 0 + 1, 0 + 2 + 0)

    def test_a_tier_that_goes_away_costs_nothing(self, engine: FakeEngine, tmp_path: Path) -> None:
        async def count() -> int:
            counters = TierCounters(engine.socket)
            await counters.start()
            os.rename(engine.socket, tmp_path / "gone")
            await counters.refresh()
            os.rename(tmp_path / "gone", engine.socket)
            engine.counters["stored"] = 7
            await counters.refresh()
            return counters.gained.stored

        assert asyncio.run(count()) == 7


def test_impossible_options_are_refused(engine: FakeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--concurrency", "--max-tokens"):
        for value in ("0", "-1", "x"):
            with pytest.raises(SystemExit, match="2"):
                warm_up(engine, option, value, "file")
    assert "whole number of at least 1" in capsys.readouterr().err


def test_journals_of_different_runs_are_different(tmp_path: Path) -> None:
    paths = {
        default_journal(url, model, inputs)
        for url in ("http://a:1", "http://a:2")
        for model in ("m", "n")
        for inputs in (["x"], ["x", "y"], ["-"])
    }
    assert len(paths) == 12
    os.makedirs(tmp_path / "d")
    assert default_journal("u", "m", [str(tmp_path / "d")]) == default_journal(
        "u", "m", [str(tmp_path / "d" / ".." / "d")]
    )


def test_an_engine_needs_a_url_it_understands() -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Engine("localhost:8000", max_tokens=1)
