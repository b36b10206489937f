"""The run behind `cachetier warm`: reader thread, workers, progress, interruption.

One event loop: a reader thread fills a bounded queue (standard input may block it), as many workers as `--concurrency`
send. An interruption cancels what is in flight; the journal knows what was answered.
"""

import argparse
import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import xxhash

from cachetier.cli.warm_check import as_text, unregistered
from cachetier.cli.warm_documents import Document, DocumentReader
from cachetier.cli.warm_engine import Engine, Refused, Sent, TooLong, TooShort
from cachetier.cli.warm_feed import PromptFeed
from cachetier.cli.warm_input import PROMPTS, STDIN, Prompt, Rejected, check_inputs, read_inputs
from cachetier.cli.warm_journal import Journal
from cachetier.cli.warm_progress import REFRESH_S, Progress, TierCounters
from cachetier.client.client import Client

EXIT_SENT, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130


def warm_up(args: argparse.Namespace) -> int:
    """Send the prompts that `args` name and print what became of them; return the exit code."""
    return asyncio.run(_warm_up(args))


def default_journal(url: str, model: str, inputs: list[str], *, are_documents: bool = False) -> str:
    """Return the journal of a run that names none: one for each engine, model, kind and list of inputs."""
    places = [name if name == STDIN else os.path.realpath(name) for name in inputs]
    kind = ["documents"] if are_documents else []
    name = xxhash.xxh3_128_hexdigest("\n".join([url, model, *places, *kind]).encode())
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "cachetier", f"warm-{name}.journal")


@contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at the first SIGINT or SIGTERM; the next one ends the process the hard way."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop_once() -> None:
        for number in signals:
            loop.remove_signal_handler(number)
        stop()

    for number in signals:
        loop.add_signal_handler(number, stop_once)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


async def _warm_up(args: argparse.Namespace) -> int:
    check_inputs(args.inputs)
    tier = TierCounters(args.socket) if args.socket else None
    async with Engine(args.url, max_tokens=args.max_tokens) as engine:
        model = await engine.choose_model(args.model)
        if tier:
            await tier.start()
        path = args.journal or default_journal(engine.url, model, args.inputs, are_documents=args.document)
        journal = Journal(path, resume=not args.no_resume)
        progress = Progress(tier, "documents" if args.document else "prompts")
        warmup = WarmUp(engine, journal, progress, tier)
        reading = DocumentReader().reading() if args.document else PROMPTS
        is_complete = False
        try:
            with _interrupts(warmup.stop):
                await warmup.send_all(read_inputs(args.inputs, reading, is_jsonl=args.jsonl), args.concurrency)
            is_complete = not warmup.is_interrupted and not warmup.progress.tally.num_failed
        finally:
            journal.close(remove=is_complete and not args.journal)
            warmup.progress.close()
            print(warmup.progress.summary())
    if warmup.is_interrupted:
        print("interrupted; the same command goes on from here")
        return EXIT_INTERRUPTED
    are_registered = not warmup.sent_documents or not tier or _check(args.socket, engine.weights, warmup.sent_documents)
    return EXIT_SENT if are_registered and not warmup.progress.tally.num_failed else EXIT_FAILED


def _check(socket: str, weights: str, sent: set[str]) -> bool:
    """Print whether all documents that were `sent` are registered, and tell it."""
    with closing(Client(socket.removeprefix("unix:"))) as client:
        missing = unregistered(client, weights, sent)
    print(as_text(len(sent), missing))
    return not missing


class WarmUp:
    """One run: reader thread, workers, and the refreshing of the tier's counters.

    Attributes:
        progress: what became of the prompts so far.
        sent_documents: ids of those that were sent, if documents are.
        is_interrupted: `stop` was called.
    """

    def __init__(self, engine: Engine, journal: Journal, progress: Progress, tier: TierCounters | None) -> None:
        self.progress = progress
        self.sent_documents: set[str] = set()
        self.is_interrupted = False
        self._engine = engine
        self._journal = journal
        self._tier = tier
        self._work: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """Cancel what is in flight; `send_all` returns soon after."""
        self.is_interrupted = True
        if self._work:
            self._work.cancel()

    async def send_all(self, prompts: Iterator[Prompt | Rejected], concurrency: int) -> None:
        """Send all `prompts`, never more than `concurrency` at once.

        Raises:
            UnavailableError: the engine is gone for good.
        """
        self._work = asyncio.ensure_future(self._work_through(prompts, concurrency))
        try:
            await self._work
        except asyncio.CancelledError:
            if not self.is_interrupted:
                raise
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        if self._tier:
            await self._tier.settle()

    async def _work_through(self, prompts: Iterator[Prompt | Rejected], concurrency: int) -> None:
        feed = PromptFeed(prompts, capacity=concurrency)
        refreshing = asyncio.ensure_future(self._keep_refreshing())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(self._send_from(feed))
        finally:
            feed.close()
            refreshing.cancel()

    async def _send_from(self, feed: PromptFeed) -> None:
        while (item := await feed.get()) is not None:
            await self._handle(item)
            self.progress.advance()

    async def _handle(self, item: Prompt | Rejected) -> None:
        tally = self.progress.tally
        if isinstance(item, Rejected):
            tally.num_empty += item.is_empty
            tally.num_failed += not item.is_empty
            self.progress.explain(item.source, item.reason)
            return
        digest = item.digest(self._engine.model)
        if digest in self._journal:
            tally.num_resumed += 1
            return
        match await self._engine.send(item):
            case Sent(num_tokens):
                self._journal.add(digest)
                tally.num_sent += 1
                tally.num_tokens += num_tokens
                if isinstance(item, Document):
                    self.sent_documents.add(item.id)
            case TooLong(reason):
                tally.num_too_long += 1
                self.progress.explain(item.source, reason)
            case TooShort(reason):
                tally.num_too_short += 1
                self.progress.explain(item.source, reason)
            case Refused(reason):
                tally.num_failed += 1
                self.progress.explain(item.source, reason)

    async def _keep_refreshing(self) -> None:
        while self._tier:
            await asyncio.sleep(REFRESH_S)
            await self._tier.refresh()
