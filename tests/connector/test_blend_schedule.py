"""Which requests are blended, and what all ranks compute for them in which step."""

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cachetier_blend.plan import BlendPlan, Run, merge
from cachetier_connector import blend_schedule
from cachetier_connector.blend_schedule import BlendSchedule, make_private
from cachetier_connector.load_ops import blend_loads
from cachetier_connector.plan import BlendOp, LoadOp
from cachetier_connector.requests import TrackedRequest
from cachetier_connector.wishes import Wishes
from tests.connector.blends import facts_of, request_of, tracked_of
from tests.connector.servers import BLOCK

TWO = [(40, 256), (320, 192)]  # of 550 tokens, 56 to 296 and 336 to 512 are loaded
TWO_COMPUTED = [(0, 56), (296, 336)]


def begin(schedule: BlendSchedule, tracked: TrackedRequest, exact_end: int = 0, start: int = 0) -> list[LoadOp]:
    """Plan the blend of a request and hand its loads over; return them."""
    tracked.blend = schedule.plan(tracked, exact_end)
    assert tracked.blend is not None
    loads = blend_loads(tracked, start)
    schedule.begin(tracked, start, loads)
    return loads


def loaded(schedule: BlendSchedule, tracked: TrackedRequest, loads: list[LoadOp], num_ranks: int = 1) -> None:
    """Let every rank report all loads of a request as complete."""
    parts = {number: [load.end] * num_ranks for number, load in enumerate(loads)}
    assert schedule.learn({tracked.id: parts}, {}) == [tracked]


def begun(schedule: BlendSchedule, name: str, documents=TWO, num_tokens: int = 550, **more) -> TrackedRequest:
    """Return a request that is blended and completely loaded."""
    tracked = tracked_of(name, num_tokens, documents, **more)
    loaded(schedule, tracked, begin(schedule, tracked))
    return tracked


def steps(schedule: BlendSchedule, count: int = 200) -> list[list[BlendOp]]:
    """Return the ops of the next steps up to the first without any."""
    return list(itertools.takewhile(bool, (schedule.next_ops() for _ in range(count))))


def num_in(runs) -> int:
    return sum(end - start for start, end in runs)


class TestWhoIsBlended:
    @pytest.mark.parametrize(
        ("mode", "wish", "expected"),
        [
            ("off", None, False),
            ("off", True, False),
            ("request", None, False),
            ("request", True, True),
            ("request", False, False),
            ("always", None, True),
            ("always", True, True),
            ("always", False, False),
        ],
    )
    def test_configuration_and_request_decide(self, mode, wish, expected):
        schedule = BlendSchedule(facts_of(blend=mode))
        assert schedule.wants(request_of("r", 500), Wishes(blend=wish)) is expected

    def test_a_wish_that_the_engine_does_not_grant_is_answered_in_the_log(self, monkeypatch):
        lines = []
        monkeypatch.setattr(blend_schedule.log, "warning", lambda text, *values: lines.append(text % values))
        schedule = BlendSchedule(facts_of(blend="off"))
        schedule.wants(request_of("r", 500), Wishes())
        assert lines == []
        schedule.wants(request_of("r", 500), Wishes(blend=True))
        assert "request r" in lines[0]
        assert '"blend": "request"' in lines[0]

    def test_documents_adapters_and_images_are_computed_by_vllm_alone(self):
        schedule, asks = BlendSchedule(facts_of()), Wishes(blend=True)
        assert not schedule.wants(request_of("r", 500), asks._replace(document="a"))
        assert not schedule.wants(request_of("r", 500, lora_request=object()), asks)
        image = SimpleNamespace(identifier="i", mm_position=SimpleNamespace(offset=0, length=9))
        assert not schedule.wants(request_of("r", 500, mm_features=[image]), asks)

    def test_an_engine_that_cannot_blend_says_why_once_and_blends_nothing(self, monkeypatch):
        lines = []
        monkeypatch.setattr(blend_schedule.log, "warning", lambda text, *values: lines.append(text % values))
        assert not BlendSchedule(facts_of(blend_refusal="it has no positions")).wants(
            request_of("r", 500), Wishes(blend=True)
        )
        assert len(lines) == 1
        assert "it has no positions" in lines[0]
        BlendSchedule(facts_of(blend="off", blend_refusal="it has no positions"))
        assert len(lines) == 1, "who does not want to blend need not know"

    def test_after_a_worker_has_refused_nothing_is_planned(self):
        schedule = BlendSchedule(facts_of())
        assert schedule.plan(tracked_of("r", 550, TWO), 0) is not None
        schedule.refusal = "keys differ"
        assert schedule.plan(tracked_of("r", 550, TWO), 0) is None
        assert not schedule.wants(request_of("r", 500), Wishes(blend=True))


class TestPlanning:
    def test_documents_are_loaded_behind_their_first_tokens_and_the_rest_is_computed(self):
        plan = BlendSchedule(facts_of()).plan(tracked_of("r", 550, TWO), 0)
        assert [(load.start, load.end) for load in plan.loads] == [(56, 296), (336, 512)]
        assert (list(plan.computes), plan.end, plan.approximate_from) == (TWO_COMPUTED, 512, 56)

    def test_a_request_that_may_not_or_cannot_be_blended_has_no_plan(self):
        schedule = BlendSchedule(facts_of())
        for change in ({"may_blend": False}, {"ticket": None}):
            tracked = tracked_of("r", 550, TWO)
            for name, value in change.items():
                setattr(tracked, name, value)
            assert schedule.plan(tracked, 0) is None
        assert schedule.plan(tracked_of("r", 550, []), 0) is None

    @pytest.mark.parametrize(("offset", "is_worth_it"), [(100, True), (512, True), (513, False), (900, False)])
    def test_less_than_a_quarter_loaded_is_not_worth_a_blend(self, offset, is_worth_it):
        """Of a document with 192 tokens 176 are loaded: a quarter of 704."""
        schedule, tracked = BlendSchedule(facts_of()), tracked_of("r", offset + 200, [(offset, 192)])
        assert (schedule.plan(tracked, 0) is not None) == is_worth_it

    def test_what_is_held_exactly_does_not_count_against_it(self):
        schedule, tracked = BlendSchedule(facts_of()), tracked_of("r", 1200, [(900, 192)], prefix=512)
        assert schedule.plan(tracked, 0) is None
        assert schedule.plan(tracked, 512) is not None

    @pytest.mark.parametrize(("num_tokens", "is_planned"), [(511, False), (512, True), (513, True)])
    def test_approximate_tokens_never_begin_in_the_last_incomplete_block(self, num_tokens, is_planned):
        """It has no hash that could be made private; vLLM would make one of exact ones."""
        schedule = BlendSchedule(facts_of(block_tokens=512))
        assert (schedule.plan(tracked_of("r", num_tokens, [(40, 256)]), 0) is not None) == is_planned

    @pytest.mark.parametrize(
        ("setting", "wish", "first"), [("link", None, 56), ("none", None, 40), ("none", "link", 56)]
    )
    def test_the_first_tokens_of_a_document_are_loaded_only_if_nothing_is_selected(self, setting, wish, first):
        schedule = BlendSchedule(facts_of(settings={"blend_select": setting}))
        plan = schedule.plan(tracked_of("r", 550, TWO, Wishes(blend=True, select=wish)), 0)
        assert plan.loads[0].start == first


class TestExactness:
    @pytest.mark.parametrize(("first_token", "num_kept"), [(0, 0), (31, 0), (32, 1), (100, 3), (319, 9), (320, 10)])
    def test_blocks_before_the_first_approximate_token_keep_their_hashes_and_others_get_new_ones(
        self, first_token, num_kept
    ):
        request, other = request_of("r", 340), request_of("r", 340)
        before = list(request.block_hashes)
        make_private(request, first_token, BLOCK)
        make_private(other, first_token, BLOCK)
        assert request.block_hashes[:num_kept] == before[:num_kept]
        for number in range(num_kept, 10):
            assert request.block_hashes[number] != before[number]
            assert len(request.block_hashes[number]) == len(before[number])
        assert len({*request.block_hashes[num_kept:], *other.block_hashes[num_kept:]}) == 2 * (10 - num_kept)

    def test_a_blend_that_begins_makes_everything_from_its_first_loaded_token_private(self):
        schedule, tracked = BlendSchedule(facts_of()), tracked_of("r", 550, TWO)
        before = list(tracked.request.block_hashes)
        begin(schedule, tracked)
        assert tracked.exact_end == 56
        same = [one == other for one, other in zip(before, tracked.request.block_hashes, strict=True)]
        assert same == [True] + [False] * 16


class TestLearning:
    @pytest.mark.parametrize("seed", range(20))
    def test_parts_of_several_ranks_may_end_in_any_order_and_in_any_steps(self, seed):
        schedule, rng = BlendSchedule(facts_of(tensor_parallel=3)), random.Random(seed)
        tracked = tracked_of("r", 700, TWO, prefix=64)
        loads = begin(schedule, tracked, exact_end=64)
        assert [load.part for load in loads] == [0, 1, 2]
        reports = [(part, load.end) for part, load in enumerate(loads) for _ in range(3)]
        rng.shuffle(reports)
        ops = []
        while reports:
            at_once = [reports.pop() for _ in range(min(len(reports), rng.randrange(1, 4)))]
            parts = {part: [end for number, end in at_once if number == part] for part, _ in at_once}
            ops += schedule.next_ops()
            assert not ops or not [part for part, _ in [*reports, *at_once] if part < 2], "what stands before it"
            assert schedule.learn({"r": parts, "unknown": {0: [1]}}, {"unknown": 7}) == ([] if reports else [tracked])
        assert not schedule.failed(tracked)
        ops += [op for [op] in steps(schedule)]
        runs = [run for op in ops for run in op.runs]
        assert runs == [(296, 336)], "tokens 0 to 64 were loaded, and with them the first of the first document"
        assert [op.is_last for op in ops] == [False] * (len(ops) - 1) + [True]

    def test_what_one_rank_could_not_load_is_computed_by_all(self):
        schedule, tracked = BlendSchedule(facts_of(tensor_parallel=2)), tracked_of("r", 550, TWO)
        begin(schedule, tracked)
        assert schedule.learn({"r": {0: [296, 104], 1: [512, 512]}}, {}) == [tracked]
        assert schedule.failed(tracked)
        [[op]] = steps(schedule)
        assert op.runs == [(0, 56), (104, 336)]

    def test_what_no_rank_could_load_is_computed_as_a_whole(self):
        schedule, tracked = BlendSchedule(facts_of()), tracked_of("r", 550, TWO)
        begin(schedule, tracked)
        schedule.learn({"r": {0: [56], 1: [336]}}, {})
        [[op]] = steps(schedule)
        assert op.runs == [(0, 512)]

    def test_a_prefix_that_could_not_be_loaded_is_computed_too(self):
        schedule, tracked = BlendSchedule(facts_of()), tracked_of("r", 700, [(300, 256)], prefix=128)
        loads = begin(schedule, tracked, exact_end=128, start=32)
        assert [(load.start, load.end) for load in loads] == [(32, 128), (316, 556)]
        schedule.learn({"r": {0: [64], 1: [556]}}, {})
        assert schedule.failed(tracked)
        [[op]] = steps(schedule)
        assert (op.runs, op.loaded_from) == ([(64, 316)], 32)

    def test_the_end_tells_how_much_was_loaded_and_computed_in_all_steps(self):
        schedule = BlendSchedule(facts_of())
        tracked = begun(schedule, "r")
        schedule.learn({}, {"r": 56})
        schedule.learn({}, {"r": 40, "unknown": 1})
        assert schedule.end(tracked) == (240 + 176, 96)
        assert schedule.next_ops() == []


class TestPieces:
    @given(
        st.integers(1, 300),
        st.integers(1, 5),
        st.lists(st.integers(1, 3), min_size=1, max_size=4),
    )
    def test_all_is_computed_once_in_order_and_no_step_exceeds_a_forward_pass(self, max_tokens, max_runs, counts):
        """`counts`: how many documents stand in each request."""
        schedule = BlendSchedule(facts_of(pass_tokens_max=max_tokens, pass_runs_max=max_runs))
        requests: dict[str, TrackedRequest] = {}
        plans: dict[str, BlendPlan] = {}
        for number, count in enumerate(counts):
            documents = [(30 + 300 * index, 256) for index in range(count)]
            tracked = begun(schedule, f"r{number}", documents, 300 * count + 90)
            requests[tracked.id], plans[tracked.id] = tracked, tracked.blend
        found: dict[str, list[BlendOp]] = {name: [] for name in requests}
        for ops in steps(schedule, 3000):
            assert sum(num_in(op.runs) for op in ops) <= max_tokens
            assert sum(len(op.runs) for op in ops) <= max_runs
            names = [op.request_id for op in ops]
            assert names == sorted(set(names)), "one op for each, in the order in which they began"
            for op in ops:
                found[op.request_id].append(op)
        for name, ops in found.items():
            assert [op.is_last for op in ops] == [False] * (len(ops) - 1) + [True]
            runs = [Run(*run) for op in ops for run in op.runs]
            assert runs == sorted(runs)
            assert num_in(runs) == num_in(plans[name].computes)
            assert merge(runs) == list(plans[name].computes)
            for op in ops:
                first, end = op.runs[0][0], op.runs[-1][1]
                assert op.first_token == first
                assert np.frombuffer(op.tokens, np.int32).tolist() == requests[name].request.all_token_ids[first:end]
                assert op.block_ids == requests[name].block_ids

    def test_the_first_request_is_not_overtaken_by_a_smaller_one(self):
        schedule = BlendSchedule(facts_of(pass_tokens_max=100))
        for name, offset in (("one", 60), ("two", 90), ("three", 10)):  # they compute 76, 106 and 26 tokens
            begun(schedule, name, [(offset, 256)], 400)
        in_steps = [[(op.request_id, num_in(op.runs)) for op in ops] for ops in steps(schedule)]
        assert in_steps == [[("one", 76), ("two", 24)], [("two", 82), ("three", 18)], [("three", 8)]]

    @given(
        st.integers(100, 400),
        st.lists(st.tuples(st.integers(0, 500), st.sampled_from([192, 256])), min_size=1, max_size=5),
        st.randoms(use_true_random=False),
    )
    def test_a_run_is_computed_once_all_ranks_have_loaded_what_stands_before_it(self, max_tokens, shape, rng):
        """`shape`: how many tokens stand before each document, and how many of it are held."""
        schedule, documents, end = BlendSchedule(facts_of(tensor_parallel=2, pass_tokens_max=max_tokens)), [], 0
        for gap, held in shape:
            documents.append((end + gap, held))
            end += gap + held
        tracked = tracked_of("r", end + 40, documents)
        assume(schedule.plan(tracked, 0) is not None)
        loads = begin(schedule, tracked)
        # Each rank loads up to the end of a part, or not so far.
        ends = {part: [rng.choice([load.end, load.end - 64]) for _ in range(2)] for part, load in enumerate(loads)}
        reports = [(part, rank) for part in ends for rank in range(2)]
        rng.shuffle(reports)
        known: set[tuple[int, int]] = set()
        runs: list[Run] = []
        while True:
            for op in schedule.next_ops():
                assert runs == [] or not op.runs or op.runs[0][0] >= runs[-1].end
                for start, _ in op.runs:
                    behind = [part for part, load in enumerate(loads) if load.start < start]
                    assert {(part, rank) for part in behind for rank in range(2)} <= known
                runs += [Run(*run) for run in op.runs]
                assert not (op.is_last and reports)
                if op.is_last:
                    break
            else:
                if reports:
                    part, rank = reports.pop()
                    known.add((part, rank))
                    schedule.learn({"r": {part: [ends[part][rank]]}}, {})
                continue
            break
        missing = [Run(min(ends[part]), load.end) for part, load in enumerate(loads)]
        assert merge(runs) == merge([*tracked.blend.computes, *missing])
        assert num_in(runs) == num_in(merge(runs))

    def test_enough_for_a_pass_does_not_wait_for_later_parts(self):
        schedule, tracked = BlendSchedule(facts_of()), tracked_of("r", 1500, [(300, 256), (820, 256), (1180, 256)])
        loads = begin(schedule, tracked)
        [op] = schedule.next_ops()
        assert (op.runs, op.is_last) == ([(0, 316)], False)
        assert schedule.next_ops() == []
        schedule.learn({"r": {1: [loads[1].end]}}, {})
        assert schedule.next_ops() == [], "the part before it is still being loaded"
        schedule.learn({"r": {0: [loads[0].end]}}, {})
        [op] = schedule.next_ops()
        assert (op.runs, op.is_last) == ([(556, 836), (1076, 1196)], False)
        schedule.learn({"r": {2: [loads[2].end]}}, {})
        [op] = schedule.next_ops()
        assert (op.runs, op.is_last) == ([], True)

    def test_all_that_a_request_lacks_before_its_last_part_is_enough(self):
        schedule, tracked = BlendSchedule(facts_of()), tracked_of("r", 700, [(100, 256), (420, 256)])
        loads = begin(schedule, tracked)
        assert schedule.next_ops() == []
        schedule.learn({"r": {0: [loads[0].end]}}, {})
        assert [op.runs for op in schedule.next_ops()] == [[(0, 116), (356, 436)]]
        assert schedule.next_ops() == []

    def test_a_request_with_nothing_to_compute_gets_an_op_all_the_same(self):
        """A worker reports its end."""
        schedule = BlendSchedule(facts_of(settings={"blend_select": "none"}))
        tracked = tracked_of("r", 400, [(64, 256)], prefix=64)
        loaded(schedule, tracked, begin(schedule, tracked, exact_end=64))
        [op] = schedule.next_ops()
        assert (op.runs, op.tokens, op.is_last) == ([], b"", True)

    def test_a_request_that_is_aborted_gets_one_last_op_without_runs(self):
        schedule = BlendSchedule(facts_of(pass_tokens_max=20))
        working, loading = begun(schedule, "working"), tracked_of("loading", 550, TWO)
        loads = begin(schedule, loading)
        [op] = schedule.next_ops()
        assert not op.is_last
        working.is_finished = loading.is_finished = True
        [op] = schedule.next_ops()
        assert (op.request_id, op.runs, op.is_last, op.select) == ("working", [], True, None)
        assert schedule.next_ops() == [], "the loads of the other one still write to its blocks"
        loaded(schedule, loading, loads)
        [op] = schedule.next_ops()
        assert (op.request_id, op.runs, op.is_last) == ("loading", [], True)
        assert schedule.next_ops() == []


class TestQuery:
    QUERY = Wishes(blend=True, select="query")

    def ops_of(self, wishes=QUERY, documents=TWO, num_tokens=550, settings=None, **changes) -> list[BlendOp]:
        schedule = BlendSchedule(facts_of(settings=settings or {}, **changes))
        begun(schedule, "r", documents, num_tokens, wishes=wishes)
        return [op for [op] in steps(schedule)]

    def test_the_last_tokens_are_computed_for_their_queries_and_choose_among_all_that_was_loaded(self):
        [op] = self.ops_of()
        assert op.runs == [*TWO_COMPUTED, (512, 549)]
        assert op.select.loads == [(56, 296), (336, 512)]
        assert op.select.computed == [(296, 336), (512, 549)], "those before the first load saw nothing approximate"
        assert op.select.budget == 0.15
        assert op.first_token == 0

    def test_only_the_last_piece_selects_and_it_has_the_tokens_to_choose_from(self):
        *ops, last = self.ops_of(pass_tokens_max=60)
        assert [op.select for op in ops] == [None] * len(ops)
        assert (last.select.loads[0], last.runs[-1][1]) == ((56, 296), 549)
        assert last.first_token == 56
        assert len(last.tokens) == 4 * (549 - 56)

    def test_the_request_may_set_another_budget_and_the_configuration_the_default(self):
        assert self.ops_of(self.QUERY._replace(budget=0.5))[0].select.budget == 0.5
        settings = {"blend_select": "query", "blend_budget": 0.3}
        assert self.ops_of(Wishes(blend=True), settings=settings)[0].select.budget == 0.3
        assert self.ops_of(Wishes(blend=True, select="link"), settings=settings)[0].select is None

    def test_without_a_budget_or_without_tokens_behind_the_documents_nothing_is_selected(self):
        assert self.ops_of(self.QUERY._replace(budget=0))[0].select is None
        assert self.ops_of(num_tokens=512)[0].select is None
        assert self.ops_of(num_tokens=513)[0].select is None
        assert self.ops_of(num_tokens=514)[0].select is not None

    def test_an_aborted_request_selects_nothing(self):
        schedule = BlendSchedule(facts_of())
        begun(schedule, "r", wishes=self.QUERY).is_finished = True
        [op] = schedule.next_ops()
        assert op.select is None
