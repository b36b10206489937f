"""How long the engine takes to compute a stretch of a prompt: learnt from the steps that compute long ones.

Belongs to the scheduler's thread; pure, the caller names the time. A step begins when it is planned, or when the one
before it has ended if it is planned earlier than that (asynchronous scheduling), and has ended when its output arrives.
A token costs the engine something by itself and something for each token before it, so a step's time is explained by
two numbers, its tokens and its pairs of tokens, summed over all its requests: that a step is shared does not matter.

The two costs minimise the sum of relative errors over the latest steps, by iteratively reweighted least squares
(Schlossmacher 1973): a few steps that took much longer, as the first ones of an engine do, leave no trace.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

STEP_TOKENS_MIN = 256  # of one request; shorter steps cost what a step costs, not what its tokens do
STEPS_REMEMBERED = 32
STEPS_UNDER_WAY_MAX = 64
LENGTHS_COMPARED = 8  # steps shorter than this part of the longest say little about its like
FIT_ROUNDS = 12
ERROR_MIN = 1e-3  # of a step: nothing is measured better, and a weight must be finite
PAIRS_PENALTY = 0.003  # of the normal equations: equal steps cannot tell the two costs apart, then tokens get it all


class PrefillWork(NamedTuple):
    """What a step computes: tokens, and pairs of a token with one before it."""

    tokens: int
    pairs: float


class _Step(NamedTuple):
    tokens: int
    pairs: float
    seconds: float


@dataclass(frozen=True, slots=True)
class PrefillModel:
    """Seconds a token, and seconds for each token before it."""

    s_per_token: float
    s_per_pair: float

    def seconds(self, start: int, end: int) -> float:
        """Return how long tokens `[start, end)` of a prompt take."""
        return self.s_per_token * (end - start) + self.s_per_pair * (end * end - start * start) / 2


def work_of(output: "SchedulerOutput") -> PrefillWork | None:
    """Return what a step computes, None if no request computes enough in it to tell its price."""
    scheduled = output.num_scheduled_tokens
    if max(scheduled.values(), default=0) < STEP_TOKENS_MIN:
        return None
    cached = output.scheduled_cached_reqs
    computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
    computed |= zip(cached.req_ids, cached.num_computed_tokens, strict=True)
    pairs = sum(count * (2 * computed[request] + count) for request, count in scheduled.items()) / 2
    return PrefillWork(sum(scheduled.values()), pairs)


class PrefillRate:
    """Learns a `PrefillModel` from steps as they are planned and as their outputs arrive."""

    def __init__(self) -> None:
        self._under_way: dict[int, tuple[float, PrefillWork | None]] = {}
        self._last_end_s = 0.0
        self._steps: deque[_Step] = deque(maxlen=STEPS_REMEMBERED)
        self._model: PrefillModel | None = None

    def begin(self, step: int, work: PrefillWork | None, now: float) -> None:
        """Note that a step was planned. Every step counts: it delays the next one."""
        self._under_way[step] = (now, work)
        if len(self._under_way) > STEPS_UNDER_WAY_MAX:  # outputs that never came
            del self._under_way[next(iter(self._under_way))]

    def end(self, step: int, now: float) -> None:
        """Note that the output of a step arrived."""
        planned_s, work = self._under_way.pop(step, (now, None))
        if work is not None:
            self.learn(work, now - max(planned_s, self._last_end_s))
        self._last_end_s = now

    def learn(self, work: PrefillWork, seconds: float) -> None:
        """Add what a step took."""
        if seconds > 0:
            self._steps.append(_Step(work.tokens, work.pairs, seconds))
            self._model = None

    @property
    def model(self) -> PrefillModel | None:
        """What is known by now, None while no step was long enough."""
        if self._model is None and self._steps:
            self._model = _fit(self._steps)
        return self._model


def _fit(steps: Sequence[_Step]) -> PrefillModel:
    """Return the costs, neither below 0, that explain the longer ones of `steps` best."""
    longest = max(step.tokens for step in steps)
    steps = [step for step in steps if step.tokens * LENGTHS_COMPARED >= longest]
    model = _least_squares(steps, [step.seconds**-2 for step in steps])
    for _ in range(FIT_ROUNDS):
        expected_s = [_explained_s(model, step) for step in steps]
        weights = [
            1 / expected / max(abs(step.seconds - expected), ERROR_MIN * expected)
            for step, expected in zip(steps, expected_s, strict=True)
        ]
        model = _least_squares(steps, weights)
    return model


def _explained_s(model: PrefillModel, step: _Step) -> float:
    return model.s_per_token * step.tokens + model.s_per_pair * step.pairs


def _least_squares(steps: Sequence[_Step], weights: Sequence[float]) -> PrefillModel:
    tt = tp = pp = ts = ps = 0.0
    for (tokens, pairs, seconds), weight in zip(steps, weights, strict=True):
        tt += weight * tokens * tokens
        tp += weight * tokens * pairs
        pp += weight * pairs * pairs
        ts += weight * tokens * seconds
        ps += weight * pairs * seconds
    pp *= 1 + PAIRS_PENALTY
    s_per_pair = max(0.0, (tt * ps - tp * ts) / (tt * pp - tp * tp))
    s_per_token = (ts - tp * s_per_pair) / tt
    return PrefillModel(s_per_token, s_per_pair) if s_per_token >= 0 else PrefillModel(0.0, ps / pp)
