"""The router as a process: what it says, and how it ends."""

import asyncio
import http.client
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest

from tests.route.standing import SHORT, StandIn, in_loop
from tests.service.running import environment


async def start(*options: str) -> tuple[asyncio.subprocess.Process, str]:
    """Start a router on a free port, and return it and its ready line."""
    command = [sys.executable, "-m", "cachetier.cli.main", "route", "--listen", "127.0.0.1:0", *options]
    process = await asyncio.create_subprocess_exec(*command, env=environment(), stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process, (await process.stdout.readline()).decode().rstrip()


@in_loop
async def test_it_says_where_it_listens_and_whom_it_knows_and_lets_answers_end() -> None:
    engine = StandIn("c1")
    await engine.start()
    process, line = await start("--engine", f"c1=consumer@{engine.url}", "--engine", "p1=producer@http://127.0.0.1:1")
    head, _, url = line.split(",")[0].partition("http://")
    assert (head, line.partition(", ")[2]) == (
        "cachetier route ready: ",
        "engines: c1 (consumer), p1 (producer, out)",
    )
    engine.word_gate.clear()
    body = {"model": "small", "prompt": SHORT, "stream": True}
    async with aiohttp.ClientSession() as http, http.post(f"http://{url}/v1/completions", json=body) as reply:
        await reply.content.readline()
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        with pytest.raises(aiohttp.ClientConnectorError):
            await http.get(f"http://{url}/health")
        engine.word_gate.set()
        assert (await reply.read()).endswith(b"data: [DONE]\n\n")
    assert await process.wait() == 0
    await engine.stop()


@in_loop
async def test_it_does_not_wait_for_answers_longer_than_it_may() -> None:
    engine = StandIn("c1")
    await engine.start()
    process, line = await start("--engine", f"c1=consumer@{engine.url}", "--drain-s", "1")
    engine.gate.clear()
    body = {"model": "small", "prompt": SHORT}
    async with aiohttp.ClientSession() as http:
        url = line.split(",")[0].partition("http://")[2]
        asked = asyncio.ensure_future(http.post(f"http://{url}/v1/completions", json=body))
        while not engine.requests:
            await asyncio.sleep(0.01)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
        assert 0.9 < time.monotonic() - started < 5
        with pytest.raises(aiohttp.ClientError):
            await asked
    assert engine.num_aborted == 1
    await engine.stop()


@in_loop
async def test_with_a_token_it_listens_anywhere(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0123456789abcdef-token")
    process, line = await start("--listen", "0.0.0.0:0", "--token-file", str(tmp_path / "token"))
    assert line.startswith("cachetier route ready: http://0.0.0.0:")
    port = int(line.split(",")[0].rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/engines", headers={"Authorization": "Bearer 0123456789abcdef-token"})
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())) == (200, [])
    connection.close()
    process.terminate()
    assert await process.wait() == 0
