"""`cachetier warm`: send prompts to a running engine so that their KV is in the tier before anyone needs it.

One event loop: a reader thread fills a bounded queue (standard input may block it), as many workers as `--concurrency`
send. An interruption cancels what is in flight; the journal knows what was answered.
"""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import xxhash

from cachetier.cli.warm_engine import Engine, Refused, Sent, TooLong
from cachetier.cli.warm_feed import PromptFeed
from cachetier.cli.warm_input import STDIN, Prompt, Rejected, check_inputs, read_prompts
from cachetier.cli.warm_journal import Journal
from cachetier.cli.warm_progress import REFRESH_S, Progress, TierCounters
from cachetier.core.errors import CachetierError

EXIT_SENT, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "warm",
        help="send prompts to a running engine so that their KV is stored",
        description="Send prompts to a running vLLM OpenAI server so that their KV is stored. Exit code: 0 all sent, "
        "1 some failed, 130 interrupted. The engine's API key, if it wants one, is taken from VLLM_API_KEY.",
    )
    parser.add_argument("--url", required=True, metavar="http://HOST:PORT", help="the engine")
    parser.add_argument("--model", metavar="NAME", help="model to ask for (default: the only one that is served)")
    parser.add_argument("--concurrency", type=_positive, default=8, metavar="N", help="prompts in flight (default 8)")
    parser.add_argument("--socket", metavar="PATH", help="the cachetier server: show tokens stored and hit")
    parser.add_argument("--max-tokens", type=_positive, default=1, metavar="N", help="tokens to generate (default 1)")
    parser.add_argument("--no-resume", action="store_true", help="send again what an interrupted run sent")
    parser.add_argument(
        "--journal",
        metavar="FILE",
        help="remember here what was sent, for good: later runs send only what is new (default: a file of its own for "
        "each engine, model and inputs, deleted when everything was sent)",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help='text file, folder (its *.txt and *.md), .jsonl file of {"messages": [...]}, {"prompt": "..."} or '
        '{"token_ids": [...]}, each with an optional "cache_salt"; - for JSONL on standard input',
    )


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    try:
        return asyncio.run(_warm(args))
    except (CachetierError, OSError) as error:
        print(f"cachetier warm: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:  # before the first prompt; later ones end through `WarmUp.stop`
        return EXIT_INTERRUPTED


def default_journal(url: str, model: str, inputs: list[str]) -> str:
    """Return the journal of a run that names none: one for each engine, model and list of inputs."""
    places = [name if name == STDIN else os.path.realpath(name) for name in inputs]
    name = xxhash.xxh3_128_hexdigest("\n".join([url, model, *places]).encode())
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "cachetier", f"warm-{name}.journal")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


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


async def _warm(args: argparse.Namespace) -> int:
    check_inputs(args.inputs)
    tier = TierCounters(args.socket) if args.socket else None
    async with Engine(args.url, max_tokens=args.max_tokens) as engine:
        model = await engine.choose_model(args.model)
        if tier:
            await tier.start()
        path = args.journal or default_journal(engine.url, model, args.inputs)
        journal = Journal(path, resume=not args.no_resume)
        warmup = WarmUp(engine, journal, Progress(tier), tier)
        is_complete = False
        try:
            with _interrupts(warmup.stop):
                await warmup.send_all(read_prompts(args.inputs), args.concurrency)
            is_complete = not warmup.is_interrupted and not warmup.progress.tally.num_failed
        finally:
            journal.close(remove=is_complete and not args.journal)
            warmup.progress.close()
            print(warmup.progress.summary())
    if warmup.is_interrupted:
        print("interrupted; the same command goes on from here")
        return EXIT_INTERRUPTED
    return EXIT_FAILED if warmup.progress.tally.num_failed else EXIT_SENT


class WarmUp:
    """One run: reader thread, workers, and the refreshing of the tier's counters.

    Attributes:
        progress: what became of the prompts so far.
        is_interrupted: `stop` was called.
    """

    def __init__(self, engine: Engine, journal: Journal, progress: Progress, tier: TierCounters | None) -> None:
        self.progress = progress
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
            case TooLong(reason):
                tally.num_too_long += 1
                self.progress.explain(item.source, reason)
            case Refused(reason):
                tally.num_failed += 1
                self.progress.explain(item.source, reason)

    async def _keep_refreshing(self) -> None:
        while self._tier:
            await asyncio.sleep(REFRESH_S)
            await self._tier.refresh()
