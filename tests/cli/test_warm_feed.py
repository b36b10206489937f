"""Prompts reach the event loop in order, only a few ahead, and without keeping the process or the loop alive."""

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from cachetier.cli.warm_feed import PromptFeed
from cachetier.cli.warm_input import Prompt


def counted(taken: list[int]) -> Iterator[Prompt]:
    for number in itertools.count():
        taken.append(number)
        yield Prompt(str(number), "/", {})


def test_an_endless_input_is_read_only_as_far_ahead_as_there_is_capacity() -> None:
    async def take() -> tuple[list[str], int]:
        taken: list[int] = []
        feed = PromptFeed(counted(taken), capacity=4)
        sources = [item.source for _ in range(10) if (item := await feed.get())]
        await asyncio.sleep(0.1)
        feed.close()
        return sources, len(taken)

    sources, num_taken = asyncio.run(take())
    assert sources == [str(number) for number in range(10)]
    assert 10 + 4 <= num_taken <= 10 + 4 + 1


def test_every_caller_learns_of_the_end() -> None:
    async def take() -> list[object]:
        feed = PromptFeed(iter([Prompt("only", "/", {})]), capacity=2)
        return list(await asyncio.gather(*(feed.get() for _ in range(5))))

    items = asyncio.run(take())
    assert items.count(None) == 4


def test_a_failing_reader_fails_the_run() -> None:
    def failing() -> Iterator[Prompt]:
        yield Prompt("first", "/", {})
        raise OSError("disk on fire")

    async def take() -> None:
        feed = PromptFeed(failing(), capacity=2)
        await feed.get()
        with pytest.raises(OSError, match="disk on fire"):
            await feed.get()

    asyncio.run(take())


def test_a_closed_feed_ends_its_thread() -> None:
    async def take() -> None:
        feed = PromptFeed(counted([]), capacity=1)
        await feed.get()
        feed.close()

    asyncio.run(take())
    deadline = time.monotonic() + 5
    while any(thread.name == "warm-reader" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
