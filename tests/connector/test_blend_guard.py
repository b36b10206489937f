"""Which ended requests are checked, what all ranks compute for them in which step, and when their blocks are free."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cachetier_connector import blend_guard
from cachetier_connector.blend_guard import HOLD_MAX_S, PIECE_TOKENS, RECENT, BlendGuard
from cachetier_connector.blender import compare_answers
from cachetier_connector.plan import BlendOp, CheckOp, StepPlan, Verdict
from cachetier_connector.requests import TrackedRequest
from cachetier_connector.scheduler_half import SchedulerHalf
from tests.connector.blends import facts_of, tracked_of
from tests.connector.engines import step_of
from tests.connector.servers import identity

LENGTH = "FINISHED_LENGTH_CAPPED"


class Clock:
    """Stands in for `time`."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(blend_guard, "time", clock)
    return clock


def guard_of(share: float = 1.0, **changes) -> BlendGuard:
    return BlendGuard(facts_of(settings={"blend_guard": share}, **changes))


def ended(name: str = "r", num_tokens: int = 550, first: int = 56, status: str = LENGTH, **changes) -> TrackedRequest:
    """Return a request that was blended from token `first` on and has ended, after it gave three tokens."""
    tracked = tracked_of(name, num_tokens, [])
    tracked.exact_end, tracked.is_blended = first, True
    for token in range(3):
        tracked.request.decode(token)
    tracked.request.status = SimpleNamespace(name=status)
    for field, value in changes.items():
        setattr(tracked, field, value)
    return tracked


def ops_of(guard: BlendGuard) -> list[CheckOp]:
    """Return all that is left to be computed."""
    ops = []
    while op := guard.next_op(is_free=True):
        ops.append(op)
    return ops


def runs_of(ops: list[CheckOp]) -> list[tuple[int, int, str]]:
    return [(op.start, op.start + len(op.tokens) // 4, op.answer) for op in ops]


class TestWhoIsChecked:
    @pytest.mark.parametrize("status", ["FINISHED_STOPPED", LENGTH, "FINISHED_REPETITION"])
    def test_a_blended_request_that_ends_by_itself(self, status):
        assert guard_of().begin(ended(status=status))

    @pytest.mark.parametrize(
        "request_", [ended(status="FINISHED_ABORTED"), ended(status="FINISHED_ERROR"), ended(is_blended=False)]
    )
    def test_no_request_that_was_aborted_failed_or_was_not_blended(self, request_):
        guard = guard_of()
        assert not guard.begin(request_)
        assert ops_of(guard) == []

    def test_none_whose_prompt_is_exact(self):
        """It was blended for the first time after a preemption, for what it had said itself."""
        assert not guard_of().begin(ended(first=550))

    @pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 0.25), (1.0, 1)])
    def test_as_many_as_configured(self, share, expected):
        guard, num_checked = guard_of(share), 0
        for _ in range(2000):
            num_checked += guard.begin(ended())
            guard.drop()
        assert num_checked / 2000 == pytest.approx(expected, abs=0.06)

    def test_one_at_a_time(self):
        guard = guard_of()
        assert guard.begin(ended("first"))
        assert not guard.begin(ended("second"))
        assert {op.request_id for op in ops_of(guard)} == {"first"}
        assert guard.begin(ended("third"))


class TestPieces:
    def test_first_the_blended_answer_then_everything_from_the_first_approximate_token_on(self):
        guard, tracked = guard_of(), ended(num_tokens=1400, first=56)
        guard.begin(tracked)
        ops = ops_of(guard)
        assert runs_of(ops) == [
            (1399, 1400, "blended"),
            (56, 56 + PIECE_TOKENS, ""),
            (56 + PIECE_TOKENS, 56 + 2 * PIECE_TOKENS, ""),
            (56 + 2 * PIECE_TOKENS, 1400, "full"),
        ]
        for op in ops:
            start, end = op.start, op.start + len(op.tokens) // 4
            assert np.frombuffer(op.tokens, np.int32).tolist() == tracked.request.prompt_token_ids[start:end]
            assert op.block_ids == tracked.block_ids

    def test_no_piece_is_larger_than_a_forward_pass(self):
        guard = guard_of(pass_tokens_max=200)
        guard.begin(ended(num_tokens=550, first=150))
        assert runs_of(ops_of(guard)) == [(549, 550, "blended"), (150, 350, ""), (350, 550, "full")]

    def test_they_wait_while_anything_is_blended(self):
        guard = guard_of()
        guard.begin(ended())
        assert guard.next_op(is_free=False) is None
        assert len(ops_of(guard)) == 2


class TestBlocks:
    def test_they_are_given_back_with_the_last_piece(self):
        guard = guard_of()
        guard.begin(ended())
        assert guard.next_op(is_free=True).answer == "blended"
        assert guard.take_ended() == []
        assert guard.next_op(is_free=True).answer == "full"
        assert guard.take_ended() == ["r"]
        assert guard.take_ended() == []

    @pytest.mark.parametrize("is_free", [True, False])
    def test_they_are_given_back_when_a_check_takes_too_long(self, clock, is_free):
        guard = guard_of()
        guard.begin(ended())
        guard.next_op(is_free=True)
        clock.now_s += HOLD_MAX_S + 1
        assert guard.next_op(is_free=is_free) is None
        assert guard.take_ended() == ["r"]
        assert ops_of(guard) == []


class TestWarning:
    @pytest.fixture
    def warnings(self, caplog, monkeypatch):
        monkeypatch.setattr(blend_guard.log, "propagate", True)
        monkeypatch.setattr(logging.getLogger("cachetier_connector"), "propagate", True)
        return lambda: [record.getMessage() for record in caplog.records]

    def test_it_comes_when_less_than_four_of_five_agree_and_once_a_minute(self, clock, warnings):
        guard = guard_of()
        for number in range(RECENT - 1):
            guard.learn(Verdict(0.1, number >= 5))
        assert warnings() == [], "of too few nothing is known"
        guard.learn(Verdict(0.1, True))
        assert len(warnings()) == 1
        assert f"last {RECENT}" in warnings()[0]
        assert "only 15" in warnings()[0]
        assert '"select": "query"' in warnings()[0]
        clock.now_s += 59
        guard.learn(Verdict(0.1, False))
        assert len(warnings()) == 1
        clock.now_s += 2
        guard.learn(Verdict(0.1, False))
        assert len(warnings()) == 2

    def test_none_comes_while_four_of_five_agree_or_again_agree(self, clock, warnings):
        guard = guard_of()
        for number in range(5 * RECENT):
            guard.learn(Verdict(9.0, number % 5 != 0))
        assert warnings() == []


class TestInSteps:
    """As the scheduler half hands it out."""

    @pytest.fixture
    def half(self):
        half = SchedulerHalf(facts_of(settings={"blend_guard": 1.0}), identity("guard"), lambda: "")
        yield half
        half.stop()

    @staticmethod
    def end(half: SchedulerHalf, tracked: TrackedRequest) -> bool:
        half._requests[tracked.id] = tracked
        tracked.may_store = False
        return half.request_finished(tracked.request)

    @staticmethod
    def step(half: SchedulerHalf, **more) -> StepPlan:
        return half.build_plan(step_of(**more))

    def test_vllm_keeps_the_blocks_until_all_is_computed(self, half):
        assert self.end(half, ended())
        plan = self.step(half)
        assert (plan.check.answer, plan.finished, plan.held) == ("blended", [], [])
        plan = self.step(half)
        assert (plan.check.answer, plan.finished, plan.held) == ("full", ["r"], ["r"])
        plan = self.step(half)
        assert (plan.check, plan.finished, plan.held) == (None, [], [])

    def test_an_unchecked_request_is_reported_at_once(self, half):
        assert not self.end(half, ended(status="FINISHED_ABORTED"))
        plan = self.step(half)
        assert (plan.check, plan.finished, plan.held) == (None, ["r"], [])

    def test_a_request_that_was_preempted_is_not_checked(self, half):
        tracked = ended()
        half._requests[tracked.id] = tracked
        self.step(half, preempted={"r"})
        assert not self.end(half, tracked)

    def test_nothing_is_checked_across_a_change_of_weights(self, half):
        later = ended("later")
        half._requests["later"] = later
        self.end(half, ended())
        half.reset()
        plan = self.step(half)
        assert (plan.check, plan.finished, plan.held) == (None, ["r"], ["r"])
        assert not self.end(half, later)

    def test_a_step_that_blends_checks_nothing(self, half, monkeypatch):
        self.end(half, ended())
        op = BlendOp(request_id="b", runs=[], first_token=0, tokens=b"", block_ids=[], loaded_from=0, is_last=True)
        monkeypatch.setattr(half._blends, "next_ops", lambda: [op])
        assert self.step(half).check is None
        monkeypatch.undo()
        assert self.step(half).check is not None


class TestComparing:
    def test_the_divergence_is_that_of_the_full_distribution_from_the_blended_one(self):
        full, blended = torch.tensor([[0.5, 0.25, 0.25]]).log() + 7, torch.tensor([[0.25, 0.5, 0.25]]).log() - 3
        kl, agrees = compare_answers(full, blended)
        assert kl == pytest.approx(0.25 * np.log(2), rel=1e-5)
        assert not agrees

    def test_it_is_not_symmetric(self):
        full, blended = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.6, 0.4]]).log()
        kl, agrees = compare_answers(full, blended)
        assert kl == pytest.approx(0.9 * np.log(1.5) + 0.1 * np.log(0.25), rel=1e-5)
        assert agrees

    def test_tokens_that_the_model_excludes_do_not_count(self):
        full, blended = torch.tensor([[0.9, 0.0, 0.1]]).log(), torch.tensor([[0.6, 0.0, 0.4]]).log()
        assert compare_answers(full, full.clone()) == (0.0, True)
        assert compare_answers(full, blended).kl == pytest.approx(0.9 * np.log(1.5) + 0.1 * np.log(0.25), rel=1e-5)

    def test_a_divergence_is_never_negative(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(50):
            logits = torch.randn(1, 4096, generator=generator)
            assert compare_answers(logits, logits + 1e-7 * torch.randn(1, 4096, generator=generator)).kl >= 0
