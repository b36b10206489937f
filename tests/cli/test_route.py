"""`cachetier route`: what is a mistake in usage; tests/route/test_server.py has its life."""

import socket

import pytest

from tests.service.running import run_cli


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--listen", "0.0.0.0:0"], "needs a token file"),
        (["--listen", "8000"], "write HOST:PORT"),
        (["--listen", "localhost:65536"], "write HOST:PORT"),
        (["--listen", "127.0.0.1:0", "--engine", "x"], "NAME=ROLE@http://HOST:PORT"),
        (["--listen", "127.0.0.1:0", "--token-file", "/nowhere/token"], "token_file"),
        (["--listen", "127.0.0.1:0", "--min-prefill-tokens", "-1"], "not a whole number"),
    ],
)
def test_what_cannot_be_is_a_mistake_in_usage(options: list[str], words: str) -> None:
    done = run_cli("route", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run_cli("route", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot listen on 127.0.0.1:" in done.stderr
