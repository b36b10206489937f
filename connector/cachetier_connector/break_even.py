"""Which part of a hit is cheaper to load than to compute: a pure model of both, without vllm, I/O or threads.

A prompt's first token comes when the part that is loaded has been loaded and the rest has been computed, one after the
other. A load can end at any chunk, and takes as long as its last chunk needs to get from disk or the remote store into
host memory (the server says when it expects that, by that tier's measured speed) or as all of it needs from there into
the engine, whichever is longer, since the two overlap. What computing takes is `prefill_rate`'s.

What is not known speaks for loading: host memory is many times faster than any engine computes, and what the disk gives
is only learnt by reading. A wrong guess costs little, because the load of a hit has only so much patience with chunks
that are not there yet.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cachetier.core.messages import LATE_TIERS
from cachetier_connector.prefill_rate import PrefillModel, PrefillRate

LOADS_REMEMBERED = 8
LOAD_TOKENS_MIN = 256  # shorter loads cost what a load costs, not what its tokens do
MARGIN_S = 0.010  # a hit is cut where that saves this much,
MARGIN_SHARE = 0.1  # and this share of the time with the whole hit
PATIENCE_S = 0.25  # with chunks that arrive late: this much,
PATIENCE_SHARE = 0.5  # and this share of the time that the load should take;
PATIENCE_UNKNOWN_SHARE = 0.25  # of the time that computing would take, where the disk's speed is not known;
PATIENCE_UNMEASURED_S = 5.0  # or this, where the engine has not computed anything yet
NEWS_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """What is held of a prompt, when the scheduler asks.

    Attributes:
        num_tokens: of the prompt.
        num_computed: leading tokens that the engine has already.
        chunk_tokens: tokens a chunk.
        tiers: one byte a held chunk, as in `MatchReply`.
        ready_in_s: for each chunk of LATE_TIERS, in how many seconds from the match; empty if unknown.
        elapsed_s: since the match.
    """

    num_tokens: int
    num_computed: int
    chunk_tokens: int
    tiers: bytes
    ready_in_s: Sequence[float]
    elapsed_s: float

    def end_of(self, num_chunks: int) -> int:
        """Return up to which token `num_chunks` can be loaded: never the last one, whose logits must be computed."""
        return max(0, min(num_chunks * self.chunk_tokens, self.num_tokens - 1))

    @property
    def num_at_once(self) -> int:
        """Leading chunks that nobody has to wait for, as far as is known."""
        return num_at_hand(self.tiers) if self.ready_in_s else len(self.tiers)

    def arrivals_s(self) -> Iterator[float]:
        """Give for each chunk from `num_at_once` on in how many seconds from now it and all before it are in memory."""
        latest_s, ready_in_s = 0.0, iter(self.ready_in_s)
        for tier in self.tiers[self.num_at_once :]:
            if tier in LATE_TIERS:
                latest_s = max(latest_s, next(ready_in_s) - self.elapsed_s)
            yield latest_s


@dataclass(frozen=True, slots=True)
class Choice:
    """How much of a hit to load.

    Attributes:
        num_chunks: its leading chunks that are worth it.
        patience_s: how long the load may wait for chunks of LATE_TIERS, None: there are none.
    """

    num_chunks: int
    patience_s: float | None


class LoadRate:
    """Tokens a second from host memory into the engine: the best of the latest loads.

    Not their mean: a load is held up by other loads and by whatever else the machine does, and the question is not how
    busy it was but whether memory could ever be slower than computing.
    """

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=LOADS_REMEMBERED)

    def learn(self, num_tokens: int, seconds: float) -> None:
        """Add a load from host memory alone."""
        if num_tokens >= LOAD_TOKENS_MIN and seconds > 0:
            self._rates.append(num_tokens / seconds)

    def doubt(self) -> None:
        """Forget the oldest load: a rate by which nothing is loaded would otherwise never change again."""
        if self._rates:
            self._rates.popleft()

    @property
    def tokens_per_s(self) -> float | None:
        """The rate, None while nothing was loaded."""
        return max(self._rates, default=None)


def num_at_hand(tiers: bytes) -> int:
    """Return how many leading chunks are in memory already."""
    return next((number for number, tier in enumerate(tiers) if tier in LATE_TIERS), len(tiers))


def choose(hit: Hit, prefill: PrefillModel | None, load_tokens_per_s: float | None) -> Choice:
    """Return what part of `hit` to load, so that the prompt is computed soonest.

    Of chunks that are all there, all or none are worth it: each costs as much to load, and later ones more to compute.
    """
    num_chunks = len(hit.tiers)
    if prefill is None or hit.end_of(num_chunks) <= hit.num_computed:
        return Choice(num_chunks, PATIENCE_UNMEASURED_S if num_at_hand(hit.tiers) < num_chunks else None)
    s_per_token = 1 / load_tokens_per_s if load_tokens_per_s else 0.0
    best, best_load_s, best_s = 0, 0.0, prefill.seconds(hit.num_computed, hit.num_tokens)
    load_s, total_s = 0.0, best_s
    for number, arrival_s in enumerate((0.0, *hit.arrivals_s()), hit.num_at_once):
        end = hit.end_of(number)
        if end > hit.num_computed:
            load_s = max(arrival_s, s_per_token * (end - hit.num_computed))
            total_s = load_s + prefill.seconds(end, hit.num_tokens)
            if total_s <= best_s:
                best, best_load_s, best_s = number, load_s, total_s
    if total_s - best_s <= max(MARGIN_S, MARGIN_SHARE * total_s):  # what came last is the whole hit
        best, best_load_s = num_chunks, load_s
    return Choice(best, _patience_s(hit, best, best_load_s, prefill))


def _patience_s(hit: Hit, num_chunks: int, load_s: float, prefill: PrefillModel) -> float | None:
    if num_at_hand(hit.tiers) >= num_chunks:
        return None
    if not hit.ready_in_s:
        return PATIENCE_S + PATIENCE_UNKNOWN_SHARE * prefill.seconds(hit.num_computed, hit.end_of(num_chunks))
    return PATIENCE_S + (1 + PATIENCE_SHARE) * load_s


class BreakEven:
    """What one engine has learnt, and what it decides by it. Belongs to the scheduler's thread."""

    def __init__(self) -> None:
        self.prefill, self.load = PrefillRate(), LoadRate()
        self._told_s = -math.inf

    def choose(self, hit: Hit) -> Choice:
        """Return what part of `hit` to load."""
        choice = choose(hit, self.prefill.model, self.load.tokens_per_s)
        if choice.num_chunks < len(hit.tiers) and hit.tiers[choice.num_chunks] not in LATE_TIERS:
            self.load.doubt()
        return choice

    def news(self, num_tokens: int, now: float) -> tuple[float, float] | None:
        """Return the rates of computing a prompt of so many tokens and of loading; None: they were asked for lately."""
        model = self.prefill.model
        if model is None or now - self._told_s < NEWS_INTERVAL_S:
            return None
        self._told_s = now
        return num_tokens / model.seconds(0, num_tokens), self.load.tokens_per_s or 0.0
