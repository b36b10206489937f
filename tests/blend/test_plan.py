"""The planner: where every token of a blended prompt comes from."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachetier_blend.plan import (
    LOADED_TOKENS_MIN,
    BlendPlan,
    DocumentHit,
    DocumentLoad,
    Run,
    choose_runs,
    cut_runs,
    merge,
    plan_blend,
    subtract,
)

SINK = 16
HITS = st.builds(DocumentHit, start=st.integers(0, 3000), num_tokens=st.integers(0, 1500))
RUNS = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 60)).map(lambda run: Run(run[0], run[0] + run[1])))


def tokens_of(runs: object) -> Counter[int]:
    """Return how often each token is in `runs`."""
    return Counter(token for run in runs for token in range(run.start, run.end))  # type: ignore[attr-defined]


@st.composite
def disjoint_loads(draw: st.DrawFn) -> list[DocumentLoad]:
    """Return ascending, disjoint loads, some of which touch."""
    loads, end = [], 0
    for index, (gap, length) in enumerate(
        draw(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 300)), max_size=6))
    ):
        loads.append(DocumentLoad(index, end + gap, end + gap + length))
        end += gap + length
    return loads


class TestPlanBlend:
    @settings(max_examples=1500, deadline=None)
    @given(
        documents=st.lists(HITS, max_size=8),
        exact_end=st.integers(0, 3000),
        more_tokens=st.integers(1, 3000),
        sink_tokens=st.integers(0, 40),
    )
    def test_every_token_is_in_exactly_one_run(self, documents, exact_end, more_tokens, sink_tokens):
        num_tokens = exact_end + more_tokens
        plan = plan_blend(exact_end=exact_end, documents=documents, num_tokens=num_tokens, sink_tokens=sink_tokens)
        if plan is None:
            # No hit is worth it even alone.
            for hit in documents:
                start, end = max(exact_end, hit.start + sink_tokens), min(hit.start + hit.num_tokens, num_tokens - 1)
                assert end - start < LOADED_TOKENS_MIN
            return
        assert tokens_of([*plan.loads, *plan.computes]) == Counter(range(exact_end, plan.end))
        assert plan.end == plan.loads[-1].end < num_tokens
        assert plan.approximate_from == plan.loads[0].start
        for runs in (plan.loads, plan.computes):
            assert all(before.end <= after.start for before, after in pairwise(runs))
        for load in plan.loads:
            hit = documents[load.document]
            assert load.end - load.start >= LOADED_TOKENS_MIN
            assert hit.start + sink_tokens <= load.start
            assert load.end <= hit.start + hit.num_tokens
        assert len({load.document for load in plan.loads}) == len(plan.loads)

    @settings(max_examples=1000, deadline=None)
    @given(documents=st.lists(HITS, max_size=6), exact_end=st.integers(0, 2000), num_tokens=st.integers(2001, 5000))
    def test_what_is_held_and_free_is_loaded_but_sinks(self, documents, exact_end, num_tokens):
        plan = plan_blend(exact_end=exact_end, documents=documents, num_tokens=num_tokens, sink_tokens=SINK)
        loaded = tokens_of(plan.loads) if plan else Counter()
        for hit in documents:
            held = range(max(exact_end, hit.start + SINK), min(hit.start + hit.num_tokens, num_tokens - 1))
            free = sum(token not in loaded for token in held)
            assert free < LOADED_TOKENS_MIN

    def test_documents_side_by_side_are_loaded_without_their_sinks(self):
        plan = plan_blend(exact_end=10, documents=[DocumentHit(20, 640), DocumentHit(660, 320)], num_tokens=1100)
        loads = (DocumentLoad(0, 36, 660), DocumentLoad(1, 676, 980))
        assert plan == BlendPlan(loads, (Run(10, 36), Run(660, 676)), end=980, approximate_from=36)

    def test_the_document_that_starts_first_wins_and_the_other_goes_on_behind_it(self):
        hits = [DocumentHit(400, 640), DocumentHit(100, 640)]
        plan = plan_blend(exact_end=0, documents=hits, num_tokens=2000)
        assert plan is not None
        assert plan.loads == (DocumentLoad(1, 116, 740), DocumentLoad(0, 740, 1040))
        assert plan.computes == (Run(0, 116),)

    def test_sinks_that_are_held_exactly_are_not_computed(self):
        plan = plan_blend(exact_end=116, documents=[DocumentHit(100, 640)], num_tokens=2000)
        assert plan == BlendPlan((DocumentLoad(0, 116, 740),), (), end=740, approximate_from=116)
        plan = plan_blend(exact_end=110, documents=[DocumentHit(100, 640)], num_tokens=2000)
        assert plan == BlendPlan((DocumentLoad(0, 116, 740),), (Run(110, 116),), end=740, approximate_from=116)

    def test_the_last_token_of_the_prompt_is_left_to_the_engine(self):
        plan = plan_blend(exact_end=0, documents=[DocumentHit(0, 640)], num_tokens=640)
        assert plan is not None
        assert plan.end == 639

    @pytest.mark.parametrize(
        ("held", "is_used"), [(SINK + LOADED_TOKENS_MIN, True), (SINK + LOADED_TOKENS_MIN - 1, False)]
    )
    def test_a_document_with_too_little_to_load_is_computed(self, held, is_used):
        plan = plan_blend(exact_end=0, documents=[DocumentHit(5, held)], num_tokens=2000, sink_tokens=SINK)
        assert (plan is not None) == is_used

    def test_a_document_that_is_not_used_leaves_its_tokens_to_the_next(self):
        hits = [DocumentHit(0, 128), DocumentHit(64, 640)]
        plan = plan_blend(exact_end=0, documents=hits, num_tokens=2000)
        assert plan is not None
        assert plan.loads == (DocumentLoad(1, 80, 704),)


class TestChooseRuns:
    @settings(max_examples=1000, deadline=None)
    @given(loads=disjoint_loads(), block_tokens=st.integers(1, 64), budget=st.floats(0, 1), data=st.data())
    def test_the_best_pieces_are_chosen_within_the_budget(self, loads, block_tokens, budget, data):
        pieces = [
            Run(start, min(start + block_tokens, load.end))
            for load in loads
            for start in range(load.start, load.end, block_tokens)
        ]
        scores = data.draw(st.lists(st.integers(0, 9), min_size=len(pieces), max_size=len(pieces)))
        runs = choose_runs(loads, scores, block_tokens, budget)
        chosen = tokens_of(runs)
        spent, limit = chosen.total(), budget * sum(load.end - load.start for load in loads)
        assert spent <= limit
        assert all(before.end < after.start for before, after in pairwise(runs))
        best_first = sorted(range(len(pieces)), key=lambda number: (-scores[number], number))
        is_chosen = [chosen[pieces[number].start] > 0 for number in best_first]
        num_chosen = sum(is_chosen)
        assert is_chosen[:num_chosen] == [True] * num_chosen
        assert tokens_of(pieces[number] for number in best_first[:num_chosen]) == chosen
        if num_chosen < len(pieces):
            following = pieces[best_first[num_chosen]]
            assert int(spent) + following.end - following.start > limit - 1e-9

    def test_neighbours_become_one_run(self):
        loads = [DocumentLoad(0, 16, 80), DocumentLoad(1, 80, 144)]
        assert choose_runs(loads, [0, 5, 7, 1], 32, 0.5) == [Run(48, 112)]

    def test_scores_of_other_loads_are_refused(self):
        with pytest.raises(ValueError, match="zip"):
            choose_runs([DocumentLoad(0, 16, 80)], [1.0], 32, 0.5)


class TestCutRuns:
    @settings(max_examples=1000, deadline=None)
    @given(loads=disjoint_loads(), max_tokens=st.integers(1, 400), max_runs=st.integers(1, 5))
    def test_pieces_keep_order_and_limits(self, loads, max_tokens, max_runs):
        runs = [Run(load.start, load.end) for load in loads]
        pieces = cut_runs(runs, max_tokens, max_runs)
        for piece in pieces:
            assert 1 <= len(piece) <= max_runs
            assert 1 <= tokens_of(piece).total() <= max_tokens
        flat = [run for piece in pieces for run in piece]
        assert [token for run in flat for token in range(*run)] == [token for run in runs for token in range(*run)]
        # A piece that ends early has as many runs as it may.
        assert all(tokens_of(piece).total() == max_tokens or len(piece) == max_runs for piece in pieces[:-1])

    def test_a_long_run_is_split_and_the_next_fills_the_piece(self):
        runs = [Run(0, 250), Run(300, 350), Run(400, 401)]
        assert cut_runs(runs, 100, 2) == [
            [Run(0, 100)],
            [Run(100, 200)],
            [Run(200, 250), Run(300, 350)],
            [Run(400, 401)],
        ]


class TestSets:
    @settings(max_examples=1000, deadline=None)
    @given(runs=RUNS, holes=RUNS)
    def test_runs_are_sets_of_tokens(self, runs, holes):
        merged = merge(runs)
        assert tokens_of(merged) == Counter(set(tokens_of(runs)))
        assert all(before.end < after.start for before, after in pairwise(merged))
        left = subtract(merged, holes)
        assert tokens_of(left) == Counter(set(tokens_of(runs)) - set(tokens_of(holes)))
        assert all(before.end < after.start for before, after in pairwise(left))

    def test_runs_that_touch_are_subtracted_from_one_by_one(self):
        assert subtract([Run(0, 10), Run(10, 20)], [Run(8, 12)]) == [Run(0, 8), Run(12, 20)]
