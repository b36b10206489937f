"""Requests that keep coming while a test does harm to the server, and what is to be said about their answers."""

import itertools
import random
import threading
import time
from collections import defaultdict
from typing import NamedTuple, Self

from tests.e2e.harness import Engine, Server, assert_same_answers, logprob_distance

WITHOUT_CACHE = {"cachetier": {"load": False, "store": False}}
EXTRA_WAIT_MAX_S = 1.0
NOISE_MIN = 0.02

_numbers = itertools.count()


class Asked(NamedTuple):
    """One prompt, answered with the cache, and without it before and after that."""

    prompt: dict
    since: float
    before: dict
    answer: dict
    after: dict


def prompts_in_pairs(count: int, seed: int, longest: int = 1200) -> list[list[dict]]:
    """Return `count` pairs of prompts; those of a pair share a prefix of an odd number of tokens."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        first, second = ([rng.randrange(20, 4000) for _ in range(rng.randrange(300, longest))] for _ in range(2))
        shared = rng.randrange(100, 300) | 1
        pairs.append([{"tokens": first}, {"tokens": first[:shared] + second[shared:]}])
    return pairs


def ask(engine: Engine, prompts: list[dict], **more) -> list[dict]:
    """Send `prompts` at once to an engine whose own prefix cache is empty; return the answers."""
    engine.reset()
    return engine.generate([{**prompt, "id": f"r{next(_numbers)}", **more} for prompt in prompts], at_once=True)


def loadable(prompt: dict, chunk_tokens: int = 64) -> int:
    """Return how many tokens of a prompt can come from the tier when all of it was stored."""
    length = len(prompt["tokens"])
    return min(length // chunk_tokens * chunk_tokens, length - 1)


def hit_tokens(stats: dict) -> int:
    """Return the tokens that were loaded, from whichever tier."""
    return stats["tokens"]["hit"]["host"] + stats["tokens"]["hit"]["disk"]


class Traffic:
    """A thread that asks pair after pair, until the `with` block ends and every pair was asked twice."""

    def __init__(self, engine: Engine, pairs: list[list[dict]]) -> None:
        self.engine, self.pairs = engine, pairs
        self._is_over = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self.asked: list[Asked] = []

    def __enter__(self) -> Self:
        """Ask everything once without the cache, because an engine is slow at what it does for the first time."""
        self._alone = {id(prompt): self._ask_alone(prompt) for pair in self.pairs for prompt in pair}
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            for number, pair in enumerate(itertools.cycle(self.pairs)):
                if self._is_over.is_set() and number >= 2 * len(self.pairs):
                    break
                before = ask(self.engine, pair, params=WITHOUT_CACHE)
                since = time.monotonic()
                answers = ask(self.engine, pair)
                after = ask(self.engine, pair, params=WITHOUT_CACHE)
                self.asked += map(Asked, pair, [since] * len(pair), before, answers, after)
        except BaseException as failure:
            self._failure = failure

    def _ask_alone(self, prompt: dict) -> dict:
        return ask(self.engine, [prompt], params=WITHOUT_CACHE)[0]

    @property
    def noise(self) -> float:
        """How far the plain engine's own log-probabilities differ between a prompt alone and with another one."""
        alone = [self._alone[id(asked.prompt)] for asked in self.asked]
        return max(NOISE_MIN, logprob_distance([asked.after for asked in self.asked], alone))

    def assert_right(self, prompts: list[dict], answers: list[dict]) -> None:
        """`answers` are those that the engine gives without the cache."""
        assert_same_answers(answers, [self._alone[id(prompt)] for prompt in prompts], self.noise)

    def num_asked_between(self, start: float, end: float) -> int:
        """Return how many requests started in a span of time."""
        return sum(start <= asked.since < end for asked in self.asked)

    def assert_all_is_well(self) -> None:
        """Every answer is the plain one, and nobody waited more than a second longer than without the cache.

        The machine is shared: the same prompt without the cache takes now this long, now that long. By as much as that
        differed for one of the prompts in this very run, the longest wait may miss its bound.
        """
        self.assert_right([asked.prompt for asked in self.asked], [asked.answer for asked in self.asked])
        times = defaultdict(list)
        for asked in self.asked:
            times[id(asked.prompt)] += [asked.before["first_token_s"], asked.after["first_token_s"]]
        spread_s = max(max(values) - min(values) for values in times.values())
        extra_s = [
            asked.answer["first_token_s"] - (asked.before["first_token_s"] + asked.after["first_token_s"]) / 2
            for asked in self.asked
        ]
        assert max(extra_s) <= EXTRA_WAIT_MAX_S + spread_s, (
            f"extra waits {[round(extra, 2) for extra in extra_s]} s; without the cache alone they differ by "
            f"{spread_s:.2f} s"
        )


def assert_hits_come_back(server: Server, traffic: Traffic, chunk_tokens: int = 64) -> None:
    """Within ten seconds everything that was asked is loaded as far as it can be, and that is counted."""
    prompts = list(itertools.chain(*traffic.pairs))
    deadline = time.monotonic() + 10
    while True:
        before = server.peek()
        answers = [ask(traffic.engine, [prompt])[0] for prompt in prompts]
        traffic.assert_right(prompts, answers)
        if [answer["cached"] for answer in answers] == [loadable(prompt, chunk_tokens) for prompt in prompts]:
            break
        assert time.monotonic() < deadline, "hits did not come back"
    after = server.wait_for(lambda stats: stats["leases"] == 0)
    assert hit_tokens(after) - hit_tokens(before) == sum(loadable(prompt, chunk_tokens) for prompt in prompts)
