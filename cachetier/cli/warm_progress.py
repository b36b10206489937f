"""What a warm-up shows: the counts, the progress bar, and what the tier stored and hit meanwhile.

The engine's answers say how many tokens were sent. How many of them the tier stored or already held only the tier
knows: with its socket at hand, the difference of its counters is shown. Other traffic on the tier counts in.
"""

import asyncio
import dataclasses
import sys
import time

import aiohttp
import msgspec
from tqdm import tqdm

from cachetier.core.errors import UnavailableError

REFRESH_S = 1.0
SETTLE_S = 3.0  # stores end behind the engine's back, shortly after the answer
REASONS_SHOWN = 10


class HitTokens(msgspec.Struct, frozen=True):
    """Tokens loaded, by tier."""

    gpu: int = 0
    host: int = 0
    disk: int = 0

    @property
    def total(self) -> int:
        """Of all tiers."""
        return self.gpu + self.host + self.disk


class Tokens(msgspec.Struct, frozen=True):
    """The tier's token counters; since its start, or a difference of two readings."""

    stored: int = 0
    hit: HitTokens = HitTokens()

    def plus(self, other: "Tokens", sign: int = 1) -> "Tokens":
        """Return the sum, or with `sign` -1 the difference."""
        hit = HitTokens(
            self.hit.gpu + sign * other.hit.gpu,
            self.hit.host + sign * other.hit.host,
            self.hit.disk + sign * other.hit.disk,
        )
        return Tokens(self.stored + sign * other.stored, hit)

    def as_tuple(self) -> tuple[int, int, int, int]:
        """Return stored, hit in device memory, hit in host memory, hit on disk."""
        return self.stored, self.hit.gpu, self.hit.host, self.hit.disk


class _Stats(msgspec.Struct, frozen=True):
    tokens: Tokens


class TierCounters:
    """What the tier behind a Unix socket stored and hit since `start`; survives a restart of its server.

    Attributes:
        gained: tokens since `start`.
    """

    def __init__(self, socket: str) -> None:
        self._socket = socket
        self._last = Tokens()
        self.gained = Tokens()

    async def start(self) -> None:
        """Take the counters to start from.

        Raises:
            UnavailableError: no cachetier server listens on the socket.
        """
        try:
            self._last = await self._read()
        except (OSError, aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            raise UnavailableError(f"no cachetier server answers on {self._socket}: {error}") from error

    async def refresh(self) -> None:
        """Read the counters; a server that does not answer right now changes nothing."""
        try:
            now = await self._read()
        except (OSError, aiohttp.ClientError, TimeoutError, msgspec.DecodeError):
            return
        difference = now.plus(self._last, -1)
        has_restarted = min(difference.as_tuple()) < 0
        self.gained = self.gained.plus(now if has_restarted else difference)
        self._last = now

    async def settle(self) -> None:
        """Refresh until the counters stand still for a while, `SETTLE_S` at most."""
        deadline = time.monotonic() + SETTLE_S
        before = None
        while before != self.gained and time.monotonic() < deadline:
            before = self.gained
            await asyncio.sleep(0.3)
            await self.refresh()

    async def _read(self) -> Tokens:
        connector = aiohttp.UnixConnector(path=self._socket)
        timeout = aiohttp.ClientTimeout(total=5)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout, raise_for_status=True) as http,
            http.get("http://cachetier/v1/stats") as reply,
        ):
            return msgspec.json.decode(await reply.read(), type=_Stats).tokens


@dataclasses.dataclass(slots=True)
class Tally:
    """Prompts (or documents) by what became of them, and tokens of those that were sent."""

    num_sent: int = 0
    num_resumed: int = 0
    num_too_long: int = 0
    num_too_short: int = 0
    num_empty: int = 0
    num_failed: int = 0
    num_tokens: int = 0


class Progress:
    """A tally with a bar on standard error; without a terminal only failures and the summary are printed."""

    def __init__(self, tier: TierCounters | None, noun: str) -> None:
        """`noun` says what is sent, in the plural."""
        self.tally = Tally()
        self._noun = noun
        self._tier = tier
        self._started_at = time.monotonic()
        self._num_reasons = 0
        self._bar = tqdm(desc="warm", unit=f" {noun}", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def advance(self) -> None:
        """Show that one prompt more was dealt with."""
        self._bar.set_postfix(self._figures(), refresh=False)
        self._bar.update()

    def explain(self, source: str, reason: str) -> None:
        """Print why a prompt was not sent; after `REASONS_SHOWN` of them they are only counted."""
        self._num_reasons += 1
        if self._num_reasons <= REASONS_SHOWN:
            self._bar.write(f"{source}: {reason}", file=sys.stderr)
        elif self._num_reasons == REASONS_SHOWN + 1:
            self._bar.write("further ones are only counted", file=sys.stderr)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def summary(self) -> str:
        """Return the result in a few lines."""
        tally, seconds = self.tally, time.monotonic() - self._started_at
        rate = tally.num_tokens / seconds if seconds else 0.0
        lines = [
            f"sent {tally.num_sent} {self._noun}, {tally.num_tokens} tokens, in {seconds:.1f} s ({rate:.0f} tokens/s)"
        ]
        if self._tier:
            gained = self._tier.gained
            hit = gained.hit
            hits = f"{hit.gpu} from device memory, {hit.host} from host memory, {hit.disk} from disk"
            lines.append(f"tier stored {gained.stored} tokens; hit {hit.total}: {hits}")
        skipped = {
            "sent by an earlier run or twice in the input": tally.num_resumed,
            "longer than the model's context": tally.num_too_long,
            "too short to be a document": tally.num_too_short,
            "empty": tally.num_empty,
        }
        lines += [f"skipped {count}: {reason}" for reason, count in skipped.items() if count]
        lines += [f"failed {tally.num_failed}"] if tally.num_failed else []
        return "\n".join(lines)

    def _figures(self) -> dict[str, str]:
        tally = self.tally
        figures = {"tokens": _short(tally.num_tokens)}
        if self._tier:
            hit = self._tier.gained.hit
            figures |= {"stored": _short(self._tier.gained.stored), "hit": _short(hit.total)}
        num_skipped = tally.num_resumed + tally.num_too_long + tally.num_too_short + tally.num_empty
        figures |= {"skipped": str(num_skipped)} if num_skipped else {}
        return figures | ({"failed": str(tally.num_failed)} if tally.num_failed else {})


def _short(count: int) -> str:
    return str(tqdm.format_sizeof(count)) if count >= 1000 else str(count)
