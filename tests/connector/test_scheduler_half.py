"""The scheduler half: which chunks are handed over when, against a real server and step by step."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from msgspec.structs import replace

from bench.gpu.profile import SCHEDULED
from cachetier.client import Client
from cachetier.core.engine_messages import SetRole
from cachetier_connector import requests
from cachetier_connector.break_even import Choice
from cachetier_connector.plan import StepPlan, tokens_to_bytes
from tests.connector.engines import FakeRequest, step_of
from tests.connector.scheduling import Scheduling
from tests.connector.servers import CHUNK, TIMEOUT_S, eventually, stats_of, tokens_of


@pytest.fixture
def scheduling(tier, request) -> Iterator[Scheduling]:
    scheduling = Scheduling(tier, request.node.name)
    yield scheduling
    scheduling.half.stop()


def stored(plan: StepPlan, *, before: bool = False) -> list[tuple[int, int, list[int]]]:
    """Return (first chunk, number of chunks, blocks) of every store in `plan`."""
    return [
        (op.position, len(op.tokens) // (4 * CHUNK), op.block_ids)
        for op in (plan.stores_before if before else plan.stores_after)
    ]


def test_chunks_are_handed_over_in_the_step_that_completes_them(scheduling):
    request = FakeRequest("r", tokens_of(1, 200))
    assert scheduling.arrive(request) == 0
    half = scheduling.half
    assert stored(half.build_plan(step_of({"r": ([5, 6, 7, 8], 0, 100)}))) == [(0, 1, [5, 6])]
    assert stored(half.build_plan(step_of(running={"r": ([9, 10, 11], 100, 100)}))) == [(1, 2, [7, 8, 9, 10])]
    for number in range(200, 257):
        request.decode(number)
        plan = half.build_plan(step_of(running={"r": ([12] if number == 224 else [], number, 1)}))
        assert stored(plan) == ([(3, 1, [11, 12])] if number == 255 else [])
    half.request_finished(request)
    plan = half.build_plan(step_of())
    assert (plan.stores_before, plan.finished) == ([], ["r"])
    assert half._requests == {}


def test_an_idle_engine_waits_a_moment_for_the_match_and_a_busy_one_asks_again(tier, scheduling, monkeypatch):
    monkeypatch.setattr("cachetier_connector.scheduler_half.IDLE_WAIT_S", 5.0)
    tokens = tokens_of(50, 2 * CHUNK)
    tier.store(tokens)
    half, asked = scheduling.half, []
    for number, scheduled in enumerate(({"other": ([9], 0, 1)}, {})):  # what the step before computed
        half.build_plan(step_of(scheduled))
        request = FakeRequest(f"r{number}", tokens)
        ready = threading.Event()
        half._matcher._submit(ready.wait)  # the match stands behind it
        half.on_new_request(request)
        if number:
            threading.Timer(0.2, ready.set).start()
        asked.append(half.get_num_new_matched_tokens(request, 0)[0])
        ready.set()
        assert scheduling.ask(request) == 2 * CHUNK - 1
        half.request_finished(request)
    assert asked == [None, 2 * CHUNK - 1]


def test_a_request_whose_match_is_late_is_computed_and_counted(tier, scheduling, monkeypatch):
    tokens = tokens_of(51, 2 * CHUNK)
    tier.store(tokens)
    half, ready, before = scheduling.half, threading.Event(), stats_of(tier.server)
    monkeypatch.setattr(half._matcher, "is_late", lambda ticket: True)
    half._matcher._submit(ready.wait)
    request = FakeRequest("r", tokens)
    half.on_new_request(request)
    assert half.get_num_new_matched_tokens(request, 0) == (0, False)
    ready.set()
    eventually(lambda: stats_of(tier.server)["matches_late"] == before["matches_late"] + 1)
    assert scheduling.leases() == 0
    assert scheduling.ask(request) == 0, "it is not matched again"


def test_an_idle_engine_waits_for_one_match_a_step(scheduling, monkeypatch):
    monkeypatch.setattr("cachetier_connector.scheduler_half.IDLE_WAIT_S", 0.3)
    half, ready = scheduling.half, threading.Event()
    half.build_plan(step_of())
    half._matcher._submit(ready.wait)
    requests = [FakeRequest(f"r{number}", tokens_of(51, 100)) for number in range(4)]
    for request in requests:
        half.on_new_request(request)
    start = time.monotonic()
    assert [half.get_num_new_matched_tokens(request, 0)[0] for request in requests] == [None] * 4
    assert 0.3 <= time.monotonic() - start < 1.0  # four waits would be 1.2
    ready.set()


def test_the_first_op_starts_the_chain_and_the_tokens_are_those_of_its_chunks(scheduling):
    tokens = tokens_of(2, 200)
    request = FakeRequest("r", tokens, cache_salt="salt")
    scheduling.arrive(request)
    first = scheduling.half.build_plan(step_of({"r": ([5, 6, 7, 8], 0, 100)})).stores_after[0]
    second = scheduling.half.build_plan(step_of(running={"r": ([9, 10, 11], 100, 100)})).stores_after[0]
    assert (first.parent, first.salt) == (b"", "salt")
    assert first.tokens == tokens_to_bytes(tokens[:CHUNK])
    assert second.tokens == tokens_to_bytes(tokens[CHUNK : 3 * CHUNK])
    keys = scheduling.half._requests["r"].ticket.reply.keys
    assert second.parent == keys[:16]


def test_the_log_says_once_where_the_time_before_a_loaded_request_was_scheduled_went(tier, scheduling, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(requests.log, "debug", lambda text, *values: lines.append(text % values))
    tokens = tokens_of(35, 200)
    tier.store(tokens[: 2 * CHUNK])
    half, request = scheduling.half, FakeRequest("r", tokens)
    scheduling.arrive(request)
    half.update_state_after_alloc(request, [5, 6, 7, 8], 2 * CHUNK)
    half.build_plan(step_of())
    time.sleep(0.05)
    half.update_from_workers(["r"], set())
    assert not lines
    for _ in range(2):  # vLLM's newer runner calls a request that was preempted new
        half.build_plan(step_of({"r": ([5, 6, 7, 8, 9, 10, 11], 128, 72)}))
    [line] = lines
    matched, planned, loaded, scheduled = map(float, SCHEDULED.search(line).groups())
    assert 0 < matched <= planned <= loaded - 50 <= scheduled - 50


def test_what_is_held_is_loaded_up_to_the_last_token_and_only_the_rest_is_stored(tier, scheduling):
    tokens = tokens_of(3, 200)
    tier.store(tokens[: 2 * CHUNK])
    half, request = scheduling.half, FakeRequest("r", tokens)
    assert scheduling.arrive(request) == 2 * CHUNK
    half.update_state_after_alloc(request, [5, 6, 7, 8], 2 * CHUNK)
    plan = half.build_plan(step_of())
    assert [(op.start, op.end, op.block_ids) for op in plan.loads] == [(0, 2 * CHUNK, [5, 6, 7, 8])]
    half.update_from_workers(["r"], set())
    plan = half.build_plan(step_of({"r": ([5, 6, 7, 8, 9, 10, 11], 128, 72)}))
    assert stored(plan) == [(2, 1, [9, 10])]
    assert eventually(lambda: scheduling.leases() == 0)
    exact = FakeRequest("exact", tokens[: 2 * CHUNK])
    assert scheduling.arrive(exact) == 2 * CHUNK - 1
    half.request_finished(exact)


def test_a_preempted_request_that_ends_has_no_blocks_to_store_from(scheduling):
    """With asynchronous scheduling the last token of a step may arrive after the request lost its blocks."""
    request = FakeRequest("r", tokens_of(4, 63))
    scheduling.arrive(request)
    half = scheduling.half
    half.build_plan(step_of({"r": ([5, 6], 0, 63)}))
    half.build_plan(step_of(running={"r": ([], 63, 1)}))  # computes the token that is still being sampled
    request.decode(1)
    half.build_plan(step_of({"other": ([5, 6], 0, 64)}, preempted={"r"}))
    request.decode(2)
    half.request_finished(request)
    assert half.build_plan(step_of()).stores_before == []


def test_a_resumed_request_stores_from_its_new_blocks_what_was_not_handed_over(scheduling):
    request = FakeRequest("r", tokens_of(5, 150))
    scheduling.arrive(request)
    half = scheduling.half
    assert stored(half.build_plan(step_of({"r": ([1, 2], 0, 64)}))) == [(0, 1, [1, 2])]
    half.build_plan(step_of(preempted={"r"}))
    assert scheduling.ask(request) == 0
    resumed = step_of(running={"r": ([20, 21, 22, 23, 24], 0, 150)}, resumed={"r"})
    assert stored(half.build_plan(resumed)) == [(1, 1, [22, 23])]


def test_a_chunk_that_is_complete_when_its_request_ends_is_stored_before_the_next_forward_pass(scheduling):
    """Its last token was not known when the step that computes it was planned."""
    request = FakeRequest("r", tokens_of(6, 63))
    scheduling.arrive(request)
    half = scheduling.half
    half.build_plan(step_of({"r": ([5, 6], 0, 63)}))
    assert half.build_plan(step_of(running={"r": ([], 63, 1)})).stores_after == []
    request.decode(1)
    request.decode(2)
    half.request_finished(request)
    assert stored(half.build_plan(step_of()), before=True) == [(0, 1, [5, 6])]


def test_the_last_sampled_token_is_not_taken_for_computed(scheduling):
    request = FakeRequest("r", tokens_of(7, 63))
    scheduling.arrive(request)
    half = scheduling.half
    half.build_plan(step_of({"r": ([5, 6], 0, 63)}))
    half.build_plan(step_of(running={"r": ([], 63, 1)}))  # scheduled, but the request has ended by then
    request.decode(1)
    half.request_finished(request)
    assert half.build_plan(step_of()).stores_before == []


def test_a_load_that_failed_is_stored_again_from_where_it_failed_and_not_tried_again(tier, scheduling):
    tokens = tokens_of(8, 300)
    tier.store(tokens[: 4 * CHUNK])
    half, request = scheduling.half, FakeRequest("r", tokens)
    assert scheduling.arrive(request) == 256
    half.update_state_after_alloc(request, list(range(8)), 256)
    half.build_plan(step_of())
    before = stats_of(tier.server)
    half.update_from_workers(["r"], {4, 5, 6, 7})
    assert scheduling.ask(request) == 0
    assert stored(half.build_plan(step_of({"r": (list(range(10)), 128, 172)}))) == [(2, 2, [4, 5, 6, 7])]
    eventually(lambda: stats_of(tier.server)["loads_failed"] > before["loads_failed"])
    after = eventually(lambda: (stats := stats_of(tier.server))["leases"] == 0 and stats)
    assert after["tokens"]["hit"]["host"] - before["tokens"]["hit"]["host"] == 128
    assert eventually(lambda: scheduling.leases() == 0)


def test_bad_blocks_are_remembered_until_the_load_ends(tier, scheduling):
    tokens = tokens_of(9, 200)
    tier.store(tokens[: 2 * CHUNK])
    half, request = scheduling.half, FakeRequest("r", tokens)
    scheduling.arrive(request)
    half.update_state_after_alloc(request, [5, 6, 7, 8], 128)
    half.update_from_workers([], {7, 8})
    half.update_from_workers(["r"], set())
    assert stored(half.build_plan(step_of({"r": ([5, 6, 7, 8, 9, 10, 11], 64, 136)})))[0][0] == 1


def test_a_request_that_is_aborted_while_it_waits_to_be_scheduled_gives_its_lease_back(tier, scheduling):
    """So what the match had read from disk for it leaves the promoter's queue."""
    tokens = tokens_of(31, 200)
    tier.store(tokens[: 2 * CHUNK])
    request = FakeRequest("r", tokens)
    assert scheduling.arrive(request) == 2 * CHUNK
    assert scheduling.leases() == 1
    scheduling.half.request_finished(request)
    assert eventually(lambda: scheduling.leases() == 0)
    assert scheduling.half.build_plan(step_of()).loads == []
    assert scheduling.half._requests == {}


def test_a_request_that_ends_while_it_loads_gives_its_lease_back_when_the_load_ends(tier, scheduling):
    tokens = tokens_of(10, 200)
    tier.store(tokens[: 2 * CHUNK])
    half, request = scheduling.half, FakeRequest("r", tokens)
    scheduling.arrive(request)
    half.update_state_after_alloc(request, [5, 6, 7, 8], 128)
    half.request_finished(request)
    assert half.build_plan(step_of()).stores_before == []
    assert scheduling.leases() == 1
    half.update_from_workers(["r"], set())
    assert eventually(lambda: scheduling.leases() == 0)
    assert half._requests == {}


def test_a_request_that_ends_before_it_was_scheduled_leaves_nothing_behind(tier, scheduling):
    tokens = tokens_of(11, 200)
    tier.store(tokens[: 2 * CHUNK])
    request = FakeRequest("r", tokens)
    scheduling.half.on_new_request(request)
    scheduling.half.request_finished(request)
    assert scheduling.half._requests == {}
    assert eventually(lambda: scheduling.leases() == 0)


def test_after_a_reset_nothing_of_before_is_stored_or_found(tier, scheduling):
    tokens = tokens_of(12, 200)
    tier.store(tokens[: 2 * CHUNK])
    half, running = scheduling.half, FakeRequest("running", tokens_of(13, 200))
    scheduling.arrive(running)
    half.build_plan(step_of({"running": ([1, 2, 3], 0, 60)}))
    half.reset()
    assert half.build_plan(step_of(running={"running": ([4], 60, 68)})).stores_after == []
    half.request_finished(running)
    assert half.build_plan(step_of()).stores_before == []
    assert scheduling.arrive(FakeRequest("new", tokens)) == 0
    assert scheduling.half._requests["new"].ticket.namespace != tier.namespace


@pytest.mark.parametrize(
    "attributes",
    [
        {"prompt_embeds": torch.zeros(200, 4)},
        {"resumable": True},
        {"kv_transfer_params": {"cachetier": {"load": False, "store": False}}},
    ],
)
def test_a_request_that_is_none_of_our_business_is_left_alone(tier, scheduling, attributes):
    tokens = tokens_of(14, 200)
    tier.store(tokens[: 2 * CHUNK])
    request = FakeRequest("r", tokens, **attributes)
    assert scheduling.arrive(request) == 0
    scheduling.half.update_state_after_alloc(request, [1, 2], 0)
    plan = scheduling.half.build_plan(step_of({"r": (list(range(7)), 0, 200)}))
    assert (plan.loads, plan.stores_after) == ([], [])
    scheduling.half.request_finished(request)
    assert scheduling.half.build_plan(step_of()).finished == []


@pytest.mark.parametrize(("role", "loads", "stores"), [("consumer", True, False), ("producer", False, True)])
@pytest.mark.parametrize("is_changed", [False, True])
def test_the_role_bounds_what_requests_do(tier, request, role, loads, stores, is_changed):
    tokens = tokens_of(15, 200)
    tier.store(tokens[: 2 * CHUNK])
    scheduling = Scheduling(tier, request.node.name, role="both" if is_changed else role)
    if is_changed:
        name, client = scheduling.name, Client(tier.server.socket_path)
        eventually(lambda: client.call(SetRole(name=name, role=role), TIMEOUT_S).is_known)
        eventually(lambda: (scheduling.half._role.loads, scheduling.half._role.stores) == (loads, stores))
    asking = FakeRequest("r", tokens)
    assert scheduling.arrive(asking) == (2 * CHUNK if loads else 0)
    eventually(scheduling.half._requests["r"].ticket.done.is_set)
    plan = scheduling.half.build_plan(step_of({"r": (list(range(7)), 0, 200)}))
    assert len(plan.stores_after) == stores
    scheduling.half.stop()


def test_who_only_stores_waits_for_its_match_too_or_a_short_prefill_would_end_before_it(tier, request):
    scheduling = Scheduling(tier, request.node.name, role="producer")
    half, asked, ready = scheduling.half, FakeRequest("r", tokens_of(70, 2 * CHUNK)), threading.Event()
    half.build_plan(step_of({"other": ([9], 0, 1)}))
    half._matcher._submit(ready.wait)  # the match stands behind it
    half.on_new_request(asked)
    assert half.get_num_new_matched_tokens(asked, 0) == (None, False)
    ready.set()
    assert scheduling.ask(asked) == 0
    assert stored(half.build_plan(step_of({"r": ([1, 2, 3, 4], 0, 2 * CHUNK)}))) == [(0, 2, [1, 2, 3, 4])]
    half.stop()


def test_inputs_count_from_the_first_chunk_of_an_op(scheduling):
    from types import SimpleNamespace

    image = SimpleNamespace(identifier="image", mm_position=SimpleNamespace(offset=70, length=10))
    request = FakeRequest("r", tokens_of(16, 200), mm_features=[image])
    scheduling.arrive(request)
    half = scheduling.half
    half.build_plan(step_of({"r": ([1, 2], 0, 64)}))
    op = half.build_plan(step_of(running={"r": ([3, 4, 5, 6, 7], 64, 136)})).stores_after[0]
    assert (op.position, [number for number, _ in op.extras]) == (1, [0])


@pytest.mark.parametrize("num_wanted", [30, CHUNK, 2 * CHUNK - 40])
def test_a_hit_that_vllm_shortens_from_its_end_is_loaded_from_its_start(tier, scheduling, num_wanted):
    tokens = tokens_of(17, 200)
    tier.store(tokens[: 2 * CHUNK])
    half, request = scheduling.half, FakeRequest("r", tokens)
    scheduling.arrive(request)
    assert scheduling.ask(request, num_computed=32) == 2 * CHUNK - 32
    half.update_state_after_alloc(request, [5, 6, 7, 8], num_wanted)
    [load] = half.build_plan(step_of()).loads
    assert (load.start, load.end, load.first_chunk) == (32, 32 + num_wanted, 0)
    assert len(load.chunks.unpack(load.tilings)) == -(-load.end // CHUNK)
    half.update_from_workers(["r"], set())


@pytest.fixture
def keeping(tier, request) -> Iterator[Scheduling]:
    """The scheduler half of an engine whose stores read the blocks later."""
    scheduling = Scheduling(tier, request.node.name, device="cuda")
    yield scheduling
    scheduling.half.stop()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_vllm_keeps_blocks_only_where_stores_read_them_later(tier, request, device):
    half = (scheduling := Scheduling(tier, request.node.name, device=device)).half
    storing, short = FakeRequest("storing", tokens_of(20, 100)), FakeRequest("short", tokens_of(21, 50))
    for asking in (storing, short):
        scheduling.arrive(asking)
    half.build_plan(step_of({"storing": ([1, 2, 3, 4], 0, 100), "short": ([5, 6], 0, 50)}))
    assert half.request_finished(storing) == (device == "cuda")
    assert not half.request_finished(short)
    plan = half.build_plan(step_of())
    assert plan.finished == ["storing", "short"]
    assert plan.held == (["storing"] if device == "cuda" else [])
    half.stop()


def test_blocks_are_kept_for_a_chunk_that_is_handed_over_only_when_its_request_ends(keeping):
    half, request = keeping.half, FakeRequest("r", tokens_of(22, 63))
    keeping.arrive(request)
    half.build_plan(step_of({"r": ([5, 6], 0, 63)}))
    half.build_plan(step_of(running={"r": ([], 63, 1)}))
    request.decode(1)
    request.decode(2)
    assert half.request_finished(request)
    plan = half.build_plan(step_of())
    assert (len(plan.stores_before), plan.held) == (1, ["r"])


def test_a_request_that_ends_while_it_loads_is_reported_by_its_load_alone(tier, keeping):
    """vLLM frees its blocks when the load is reported, and must not be told a second time."""
    tokens = tokens_of(23, 200)
    tier.store(tokens[: 2 * CHUNK])
    half, request = keeping.half, FakeRequest("r", tokens)
    keeping.arrive(request)
    half.update_state_after_alloc(request, [5, 6, 7, 8], 128)
    assert not half.request_finished(request)
    plan = half.build_plan(step_of())
    assert (plan.finished, plan.held) == (["r"], [])
    half.update_from_workers(["r"], set())


def test_after_a_preemption_nothing_is_kept_and_all_chunks_are_handed_over_again(keeping):
    """What was queued of them may have been dropped."""
    half, request = keeping.half, FakeRequest("r", tokens_of(24, 150))
    keeping.arrive(request)
    assert stored(half.build_plan(step_of({"r": ([1, 2, 3, 4], 0, 128)}))) == [(0, 2, [1, 2, 3, 4])]
    assert half.build_plan(step_of(preempted={"r"})).preempted == ["r"]
    assert keeping.ask(request) == 0
    resumed = step_of(running={"r": ([20, 21, 22, 23, 24], 0, 150)}, resumed={"r"})
    [op] = half.build_plan(resumed).stores_after
    assert (op.position, op.parent, op.block_ids) == (0, b"", [20, 21, 22, 23])
    half.build_plan(step_of(preempted={"r"}))
    assert not half.request_finished(request)
    plan = half.build_plan(step_of())
    assert (plan.stores_before, plan.held) == ([], [])


def test_a_request_that_was_preempted_and_ended_between_two_steps_is_cancelled_too(keeping):
    """As when all running requests are preempted because the prefix cache is reset."""
    half, request = keeping.half, FakeRequest("r", tokens_of(25, 150))
    keeping.arrive(request)
    half.build_plan(step_of({"r": ([1, 2, 3, 4, 5], 0, 150)}))
    half.request_finished(request)
    assert half.build_plan(step_of(preempted={"r"})).preempted == ["r"]


def test_of_a_hit_only_the_part_that_is_worth_it_is_loaded_and_what_is_held_is_not_stored(tier, scheduling):
    tokens = tokens_of(20, 5 * CHUNK + 10)
    tier.store(tokens[: 3 * CHUNK])
    half, request, before = scheduling.half, FakeRequest("r", tokens), stats_of(tier.server)
    half._break_even.choose = lambda hit: Choice(1, 1.5)
    assert scheduling.arrive(request) == CHUNK
    assert scheduling.ask(request, 32) == CHUNK - 32, "decided once: what was cut off the lease must not be used"
    half.update_state_after_alloc(request, [1, 2], CHUNK - 32)
    [load] = half.build_plan(step_of()).loads
    assert (load.start, load.end, load.patience_s) == (32, CHUNK, 1.5)
    half.update_from_workers(["r"], set())
    plan = half.build_plan(step_of({"r": (list(range(11)), CHUNK, len(tokens) - CHUNK)}))
    assert stored(plan) == [(3, 2, [6, 7, 8, 9])]
    eventually(lambda: stats_of(tier.server)["tokens_cut"] == before["tokens_cut"] + 2 * CHUNK)
    after = eventually(lambda: (stats := stats_of(tier.server))["leases"] == 0 and stats)
    assert after["hits_cut"] == before["hits_cut"] + 1
    assert after["tokens"]["hit"]["host"] == before["tokens"]["hit"]["host"] + CHUNK - 32


@pytest.mark.parametrize("segments", [[], ["/data/segments/0"]])
def test_the_disk_works_while_a_request_waits_unless_the_engine_is_to_read_itself(tier, scheduling, segments):
    tokens = tokens_of(23, 3 * CHUNK)
    tier.store(tokens[: 2 * CHUNK])
    half, request, asked = scheduling.half, FakeRequest("r", tokens), []
    half._break_even.choose = lambda hit: asked.append(hit) or Choice(2, None)
    half.on_new_request(request)
    ticket = half._requests["r"].ticket
    assert ticket.done.wait(5)
    ticket.reply = replace(ticket.reply, segments=segments)
    ticket.replied_s -= 60
    assert scheduling.ask(request) == 2 * CHUNK
    assert (asked[0].elapsed_s > 50) == (not segments)


def test_steps_and_loads_teach_what_the_next_hit_is_worth(tier, scheduling):
    tokens = tokens_of(21, 5 * CHUNK)
    tier.store(tokens[: 4 * CHUNK])
    half, known = scheduling.half, scheduling.half._break_even
    step = half.build_plan(step_of({"other": ([], 0, 300)})).step
    half.learn(step, {})
    assert known.prefill.model is not None
    for number in range(2):
        request = FakeRequest(str(number), tokens)
        assert scheduling.arrive(request) == 4 * CHUNK, "memory counts as fast until a load was slow"
        half.update_state_after_alloc(request, list(range(8)), 4 * CHUNK)
        half.learn(0, {request.request_id: 400.0})
        half.learn(0, {request.request_id: 300.0})
        half.update_from_workers([request.request_id], set())
        assert known.load.tokens_per_s == pytest.approx(4 * CHUNK / 400)
        known.load._rates.clear()
    known.load.learn(1000, 1000.0)
    assert scheduling.arrive(FakeRequest("last", tokens)) == 0
    eventually(lambda: stats_of(tier.server)["tokens_per_s"]["prefill"] > 0)


def test_a_load_that_failed_or_came_from_elsewhere_does_not_tell_how_fast_memory_is(tier, scheduling):
    tokens = tokens_of(22, 5 * CHUNK)
    tier.store(tokens[: 4 * CHUNK])
    half, request = scheduling.half, FakeRequest("r", tokens)
    assert scheduling.arrive(request) == 4 * CHUNK
    half.update_state_after_alloc(request, list(range(8)), 4 * CHUNK)
    half.learn(0, {"r": 1.0, "gone": 1.0})
    half.update_from_workers(["r"], {3})
    assert half._break_even.load.tokens_per_s is None


def test_a_step_without_tokens_is_no_step(scheduling):
    half = scheduling.half
    assert [half.build_plan(step).step for step in (step_of(), step_of({"r": ([1], 0, 9)}), step_of())] == [0, 1, 0]
