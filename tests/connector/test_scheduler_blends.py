"""The life of a blended request in the scheduler half, against a real server and step by step."""

from types import SimpleNamespace

import pytest

from cachetier.core.messages import TIER_HOST
from cachetier_connector.break_even import Choice
from cachetier_connector.documents import Documents
from cachetier_connector.plan import tokens_to_bytes
from tests.connector.engines import FakeRequest, step_of
from tests.connector.servers import BLOCK, CHUNK, TIMEOUT_S, eventually, stats_of, tokens_of
from tests.connector.test_scheduler_half import Scheduling, stored

DOCUMENT = tokens_of(70, 4 * CHUNK + 20)
BLEND = {"cachetier": {"blend": True}}
# The prompt: 200 tokens, of which 128 are held; the document; 50 tokens more. Blocks 100 to 116.
NUM_TOKENS, BLOCKS = 526, list(range(100, 117))
EXACT, LOADED, END = 128, (216, 456), 456


class Blending(Scheduling):
    """A scheduler half whose server knows a document, and one request for which it is blended."""

    def __init__(self, tier, name: str) -> None:
        super().__init__(tier, name, blend="request", blend_guard=0.0)
        start = tokens_of(71, 200)
        tier.store(start[:EXACT])
        tier.store(DOCUMENT)
        documents = Documents(tier.link, TIMEOUT_S, reads_pools=False)
        documents.register(tier.namespace, "", "d", tokens_to_bytes(DOCUMENT), CHUNK)
        self.request = self.asking("r", [*start, *DOCUMENT, *tokens_of(72, 50)])
        self.before = stats_of(tier.server)

    def asking(self, name: str, tokens: list[int], params: dict = BLEND) -> FakeRequest:
        hashes = [bytes([number]) * 8 for number in range(len(tokens) // BLOCK)]
        status = SimpleNamespace(name="FINISHED_STOPPED")
        return FakeRequest(name, tokens, kv_transfer_params=params, block_hashes=hashes, status=status)

    def load(self) -> None:
        """Let the request arrive and its loads start."""
        assert self.arrive(self.request) == END
        self.half.update_state_after_alloc(self.request, BLOCKS, END)
        self.half.build_plan(step_of())

    def blend(self) -> None:
        """Carry its blend out."""
        self.load()
        self.half.learn_of_blends({"r": {0: [EXACT], 1: [END]}}, {}, "")
        self.half.build_plan(step_of())
        self.half.learn_of_blends({}, {"r": 88}, "")
        self.half.update_from_workers(["r"], set())

    def gained(self, *path: str) -> int:
        """Return by how much a counter has grown."""
        now, before = stats_of(self.server), self.before
        for name in path:
            now, before = now[name], before[name]
        return now - before


@pytest.fixture
def blending(tier, request):
    blending = Blending(tier, request.node.name)
    yield blending
    blending.half.stop()


def test_a_request_is_loaded_then_computed_then_reported_and_only_its_exact_chunks_are_stored(blending):
    half, request, hashes = blending.half, blending.request, list(blending.request.block_hashes)
    assert blending.arrive(request) == END
    assert blending.leases() == 2
    half.update_state_after_alloc(request, BLOCKS, END)
    assert half.tiers_of(request) == {TIER_HOST: EXACT}, "what is approximate is no hit of the prefix"
    plan = half.build_plan(step_of())
    assert [(op.part, op.start, op.end, op.shift) for op in plan.loads] == [(0, 0, EXACT, 0), (1, *LOADED, 200)]
    assert plan.blends == []
    assert request.block_hashes[:6] == hashes[:6]
    assert not set(request.block_hashes[6:]) & set(hashes)

    half.learn_of_blends({"r": {0: [EXACT]}}, {}, "")
    [op] = half.build_plan(step_of()).blends
    assert (op.runs, op.is_last, op.block_ids) == ([(EXACT, LOADED[0])], False, BLOCKS)
    assert half.build_plan(step_of()).blends == []
    assert blending.leases() == 2
    half.learn_of_blends({"r": {1: [END]}}, {}, "")
    assert eventually(lambda: blending.leases() == 0), "nothing is read any more"
    [op] = half.build_plan(step_of()).blends
    assert (op.runs, op.is_last, op.block_ids) == ([], True, BLOCKS)

    half.learn_of_blends({}, {"r": 88}, "")
    half.update_from_workers(["r"], set())
    eventually(lambda: blending.gained("requests", "blended") == 1)
    assert blending.gained("tokens", "blend", "loaded") == 240
    assert blending.gained("tokens", "blend", "computed") == 88
    assert blending.gained("tokens", "hit", "host") == EXACT
    assert blending.gained("loads_failed") == 0

    plan = half.build_plan(step_of({"r": (BLOCKS, END, NUM_TOKENS - END)}))
    assert stored(plan) == [(2, 1, BLOCKS[4:6])]
    for number in range(2 * CHUNK):
        request.decode(number)
        assert stored(half.build_plan(step_of(running={"r": ([], NUM_TOKENS + number, 1)}))) == []
    half.request_finished(request)
    assert half.build_plan(step_of()).stores_before == []
    assert half._requests == {}
    assert blending.gained("tokens", "hit", "host") == EXACT


def test_a_blended_request_that_was_preempted_is_not_blended_again_and_stores_nothing_approximate(blending):
    blending.blend()
    half, request = blending.half, blending.request
    half.build_plan(step_of({"r": (BLOCKS, END, NUM_TOKENS - END)}))
    half.build_plan(step_of(preempted={"r"}))
    assert blending.ask(request) == EXACT
    assert half._requests["r"].ticket.documents == []
    half.update_state_after_alloc(request, BLOCKS, EXACT)
    [load] = half.build_plan(step_of()).loads
    assert load.part is None
    half.update_from_workers(["r"], set())
    resumed = step_of(running={"r": (BLOCKS, EXACT, NUM_TOKENS - EXACT)}, resumed={"r"})
    assert all(op.position + len(op.tokens) // (4 * CHUNK) <= 3 for op in half.build_plan(resumed).stores_after)
    half.request_finished(request)
    assert eventually(lambda: blending.leases() == 0)
    assert blending.gained("requests", "blended") == 1


def test_what_could_not_be_loaded_is_computed_and_counted_as_a_failed_load(blending):
    blending.load()
    blending.half.learn_of_blends({"r": {0: [EXACT], 1: [300]}}, {}, "")
    eventually(lambda: blending.gained("loads_failed") == 1)
    [op] = blending.half.build_plan(step_of()).blends
    assert op.runs == [(EXACT, LOADED[0]), (300, END)]
    assert eventually(lambda: blending.leases() == 0)


def test_a_pass_that_failed_leaves_the_rest_to_vllm(blending):
    blending.load()
    half, request = blending.half, blending.request
    half.learn_of_blends({"r": {0: [EXACT], 1: [END]}}, {}, "")
    half.build_plan(step_of())
    half.update_from_workers(["r"], set(BLOCKS))
    assert blending.ask(request) == 0
    assert half._requests["r"].loading is None
    eventually(lambda: blending.gained("loads_failed") == 1)
    assert eventually(lambda: blending.leases() == 0)


@pytest.mark.parametrize("moment", ["matched", "refused", "loading", "loaded", "computing"])
def test_a_request_that_ends_early_leaves_no_lease_and_nothing_behind(blending, moment):
    half, request, parts = blending.half, blending.request, {"r": {0: [EXACT], 1: [END]}}
    assert blending.arrive(request) == END
    assert blending.leases() == 2
    if moment == "refused":  # vLLM had no room for it
        half.update_state_after_alloc(request, [], 0)
        assert half._requests["r"].blend is None
    elif moment != "matched":
        half.update_state_after_alloc(request, BLOCKS, END)
        half.build_plan(step_of())
    if moment in ("loaded", "computing"):
        half.learn_of_blends(parts, {}, "")
    if moment == "computing":
        assert half.build_plan(step_of()).blends[0].is_last
    half.request_finished(request)
    plan = half.build_plan(step_of())
    assert plan.stores_before == []
    if moment == "loading":
        assert plan.blends == []
        half.learn_of_blends(parts, {}, "")
        plan = half.build_plan(step_of())
    if moment in ("loading", "loaded"):
        [op] = plan.blends
        assert (op.runs, op.is_last) == ([], True), "a worker has to report its end, or vLLM would keep the blocks"
    if moment in ("loading", "loaded", "computing"):
        assert "r" in half._requests
        half.update_from_workers(["r"], set())
    assert half._requests == {}
    assert half.build_plan(step_of()).blends == []
    assert eventually(lambda: blending.leases() == 0)


def test_without_asking_or_after_a_worker_has_refused_only_the_prefix_is_loaded(blending):
    tokens = blending.request.prompt_token_ids
    assert blending.arrive(blending.asking("plain", tokens, {})) == EXACT
    assert blending.leases() == 1
    matched = blending.asking("matched", tokens)
    blending.half.on_new_request(matched)
    blending.half.learn_of_blends({}, {}, "keys differ")
    assert blending.ask(matched) == EXACT, "its documents were found before the worker was heard"
    assert blending.arrive(blending.request) == EXACT
    assert blending.half._requests["r"].ticket.documents == []


def test_of_documents_only_what_is_worth_it_is_loaded_and_the_rest_given_back(blending):
    half, request = blending.half, blending.request
    choices = [Choice(2, None), Choice(3, 1.5)]  # of the prefix, then of the documents
    half._break_even.choose = lambda hit: choices.pop(0)
    assert blending.arrive(request) == 200 + 3 * CHUNK
    assert blending.ask(request) == 200 + 3 * CHUNK, "decided once"
    half.update_state_after_alloc(request, BLOCKS, 200 + 3 * CHUNK)
    plan = half.build_plan(step_of())
    assert [(op.start, op.end, op.patience_s) for op in plan.loads] == [(0, EXACT, None), (216, 392, 1.5)]
    eventually(lambda: blending.gained("tokens_cut") == CHUNK)
    half.request_finished(request)


@pytest.mark.parametrize(("length", "is_long_enough"), [(300, True), (100, False)])
def test_a_document_is_registered_when_its_request_ends_and_is_never_blended_itself(blending, length, is_long_enough):
    tokens = [*tokens_of(74, 20), *DOCUMENT][:length]
    asking = blending.asking("d", tokens, {"cachetier": {"document": "new", "blend": True}})
    assert blending.arrive(asking) == 0
    blending.half.build_plan(step_of({"d": (BLOCKS[:10], 0, length)}))
    assert blending.gained("documents") == 0
    blending.half.request_finished(asking)
    blending.half.on_new_request(blending.asking("next", tokens_of(75, 99)))
    eventually(blending.half._requests["next"].ticket.done.is_set)  # what was queued before it has been done
    assert blending.gained("documents") == is_long_enough
