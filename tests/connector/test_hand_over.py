"""Waiting for chunks: what a scheduler half promises, waits for and loads piece by piece, against a real server."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from cachetier.core.engine_messages import ListEngines
from cachetier.core.messages import RESERVE_FILL, Commit, Release, Reserve, ReserveReply
from cachetier.core.messages import LeaseUse as Use
from cachetier.core.wait_messages import EndPromise
from cachetier_connector.plan import LoadOp, tokens_to_bytes
from tests.connector.engines import FakeRequest, step_of
from tests.connector.scheduling import Scheduling
from tests.connector.servers import CHUNK, TIMEOUT_S, WHOLE, Tier, eventually, stats_of, tokens_of
from tests.service.running import RunningServer

BLOCKS = list(range(11))
NUM_TOKENS = 5 * CHUNK + 10


def reserved(tier: Tier, tokens: list[int]) -> ReserveReply:
    """Return the frames of chunks that are being stored from now on."""
    return tier.link.call(
        lambda session: Reserve(
            session=session, namespace=tier.namespace, tokens=tokens_to_bytes(tokens), tiling=WHOLE, shard=0
        ),
        TIMEOUT_S,
    )


def committed(tier: Tier, reply: ReserveReply) -> None:
    """Have all these chunks count as stored; no test here looks at their bytes."""
    checksums = [1] * reply.outcomes.count(RESERVE_FILL)
    tier.link.call(lambda session: Commit(session=session, lease=reply.lease, checksums=checksums), TIMEOUT_S)


class Waiting(Scheduling):
    """A scheduler half with one request of five chunks and a bit, of which another engine has promised the chunks."""

    def __init__(self, tier: Tier, name: str, *, num_held: int = 0, role: str = "consumer", **settings) -> None:
        super().__init__(tier, name, role=role, **({"wait_deadline_ms": 60_000} | settings))
        self.tier, self.tokens = tier, tokens_of(sum(name.encode()), NUM_TOKENS)
        self.store(num_held)
        self.promise = tier.match(self.tokens, lease=False, promise=True).promise
        self.request = FakeRequest("r", self.tokens)
        self.before = stats_of(tier.server)

    def begin(self, num_expected: int = 5 * CHUNK) -> list[LoadOp]:
        """Let the request arrive and get blocks; return what is loaded at once."""
        assert self.arrive(self.request) == num_expected
        self.half.update_state_after_alloc(self.request, BLOCKS, num_expected)
        return self.half.build_plan(step_of()).loads

    def store(self, num_chunks: int) -> None:
        """Store leading chunks that are not yet."""
        committed(self.tier, reserved(self.tier, self.tokens[: num_chunks * CHUNK]))

    def next_load(self) -> LoadOp:
        """Return the next load that is planned."""
        [load] = eventually(lambda: self.half.build_plan(step_of()).loads)
        return load

    def end_promise(self, num_chunks: int = 0) -> None:
        promise = self.promise
        self.tier.link.call(
            lambda session: EndPromise(session=session, promise=promise, num_chunks=num_chunks, within_s=60), TIMEOUT_S
        )

    def finish_load(self, bad_blocks: set[int] = frozenset()) -> dict:
        """Let the workers report that the load has ended; return what was counted since the beginning."""
        self.half.update_from_workers(["r"], set(bad_blocks))
        after = eventually(lambda: (stats := stats_of(self.server))["leases"] == 0 and stats)
        hit = after["tokens"]["hit"]["host"] - self.before["tokens"]["hit"]["host"]
        return {"hit": hit, "waited": after["tokens"]["waited"] - self.before["tokens"]["waited"]}


@pytest.fixture
def waiting(tier, request) -> Iterator[Waiting]:
    waiting = Waiting(tier, request.node.name, num_held=1)
    yield waiting
    waiting.half.stop()


def piece(load: LoadOp) -> tuple[int, int, int, bool]:
    """Return from and to which token a load goes, how many chunks it has and whether it is the last."""
    return load.start, load.end, len(load.chunks.tiling_of), load.is_last


def test_a_promised_prompt_is_loaded_in_pieces_as_it_is_stored(waiting):
    assert list(map(piece, waiting.begin())) == [(0, CHUNK, 1, False)]
    assert waiting.half.build_plan(step_of()).loads == []
    waiting.store(3)
    assert piece(waiting.next_load()) == (CHUNK, 3 * CHUNK, 2, False)
    waiting.store(5)
    assert piece(waiting.next_load()) == (3 * CHUNK, 5 * CHUNK, 2, True)
    assert waiting.half.build_plan(step_of()).loads == []
    assert waiting.finish_load() == {"hit": 5 * CHUNK, "waited": 4 * CHUNK}


def test_the_sources_that_vllm_is_told_cover_all_that_is_waited_for(waiting):
    waiting.begin()
    assert waiting.half.tiers_of(waiting.request) == {1: 5 * CHUNK}


def test_what_was_stored_since_the_match_is_loaded_at_once(waiting):
    assert waiting.arrive(waiting.request) == 5 * CHUNK
    waiting.store(5)
    tracked = waiting.half._requests["r"]
    eventually(lambda: tracked.ticket.news is not None)
    assert waiting.ask(waiting.request, num_computed=2 * CHUNK - 32) == 3 * CHUNK + 32
    waiting.half.update_state_after_alloc(waiting.request, BLOCKS, 3 * CHUNK + 32)
    loads = waiting.half.build_plan(step_of()).loads
    assert list(map(piece, loads)) == [(2 * CHUNK - 32, 5 * CHUNK, 4, True)]
    assert waiting.finish_load() == {"hit": 3 * CHUNK + 32, "waited": 3 * CHUNK + 32}


def test_a_wait_that_is_in_vain_is_given_up_at_once_and_the_rest_computed(waiting):
    waiting.begin()
    waiting.store(2)
    assert piece(waiting.next_load()) == (CHUNK, 2 * CHUNK, 1, False)
    waiting.end_promise()
    assert piece(waiting.next_load()) == (2 * CHUNK, 5 * CHUNK, 0, True)
    assert waiting.finish_load({4, 5, 6, 7, 8, 9}) == {"hit": 2 * CHUNK, "waited": CHUNK}
    assert waiting.ask(waiting.request) == 0
    assert stats_of(waiting.server)["loads_failed"] == waiting.before["loads_failed"] + 1


def test_chunks_that_come_with_the_end_of_a_promise_are_still_loaded(waiting):
    waiting.begin()
    waiting.store(3)
    waiting.end_promise(num_chunks=3)
    loads = eventually(lambda: [*map(piece, waiting.half.build_plan(step_of()).loads)])
    while not loads[-1][-1]:
        loads += eventually(lambda: [*map(piece, waiting.half.build_plan(step_of()).loads)])
    assert loads == [(CHUNK, 3 * CHUNK, 2, False), (3 * CHUNK, 5 * CHUNK, 0, True)]


def test_without_progress_a_request_waits_for_no_longer_than_its_deadline(tier, request):
    waiting = Waiting(tier, request.node.name, wait_deadline_ms=600)
    assert waiting.begin() == []
    start_s = time.monotonic()
    time.sleep(0.4)
    waiting.store(1)
    assert piece(waiting.next_load()) == (0, CHUNK, 1, False)
    assert piece(waiting.next_load()) == (CHUNK, 5 * CHUNK, 0, True)
    assert 1.0 <= time.monotonic() - start_s < 4
    waiting.half.stop()


def test_an_aborted_request_ends_its_load_in_the_next_step_and_gives_its_lease_back_after_it(waiting):
    waiting.begin()
    waiting.half.request_finished(waiting.request)
    waiting.store(3)
    assert waiting.leases() == 1
    [load] = waiting.half.build_plan(step_of()).loads
    assert piece(load) == (CHUNK, 5 * CHUNK, 0, True)
    waiting.finish_load()
    assert waiting.half._requests == {}


def test_after_a_piece_has_failed_nothing_more_is_waited_for_and_the_first_failure_counts(waiting):
    waiting.begin()
    waiting.store(2)
    waiting.next_load()
    waiting.half.update_from_workers([], {3})
    waiting.half.update_from_workers([], {1})
    [load] = waiting.half.build_plan(step_of()).loads
    assert piece(load) == (2 * CHUNK, 5 * CHUNK, 0, True)
    assert waiting.finish_load({4, 5, 6, 7, 8, 9}) == {"hit": 32, "waited": 0}


def test_after_a_reset_all_that_was_loaded_is_computed_again(waiting):
    waiting.begin()
    waiting.half.reset()
    [load] = waiting.half.build_plan(step_of()).loads
    assert piece(load) == (0, 5 * CHUNK, 0, True)


def test_when_the_server_dies_nobody_waits_for_it(tmp_path, request):
    with RunningServer(tmp_path / "data") as server:
        waiting = Waiting(Tier(server, request.node.name), request.node.name, num_held=1)
        waiting.begin()
        waiting.store(2)
        assert piece(waiting.next_load()) == (CHUNK, 2 * CHUNK, 1, False)
        server.kill()
        assert piece(waiting.next_load()) == (2 * CHUNK, 5 * CHUNK, 0, True)
        waiting.half.stop()


def test_when_the_server_stands_still_nobody_waits_for_it(tmp_path, request):
    with RunningServer(tmp_path / "data") as server:
        waiting = Waiting(Tier(server, request.node.name), request.node.name, num_held=1)
        waiting.half._matcher._waiter._max_blocking_s = 0.3
        waiting.begin()
        os.kill(server.process.pid, signal.SIGSTOP)
        assert piece(waiting.next_load()) == (CHUNK, 5 * CHUNK, 0, True)
        os.kill(server.process.pid, signal.SIGCONT)
        waiting.half.stop()


@pytest.mark.parametrize("is_stored", [True, False])
def test_who_could_compute_waits_only_for_what_is_being_stored(tier, request, is_stored):
    waiting = Waiting(tier, request.node.name, role="both", load_deadline_ms=60_000)
    reply = reserved(tier, waiting.tokens[: 2 * CHUNK])
    assert reply.outcomes == bytes([RESERVE_FILL]) * 2
    assert waiting.begin(2 * CHUNK) == []
    if is_stored:
        committed(tier, reply)
        assert piece(waiting.next_load()) == (0, 2 * CHUNK, 2, True)
    else:
        tier.link.call(lambda session: Release(session=session, uses=[Use(lease=reply.lease)]), TIMEOUT_S)
        assert piece(waiting.next_load()) == (0, 2 * CHUNK, 0, True)
    waiting.half.stop()


def test_a_producer_promises_what_it_will_store_and_takes_back_what_it_will_not(tier, request):
    producer = Scheduling(tier, request.node.name, role="producer", store_deadline_ms=60_000)
    tokens = tokens_of(77, NUM_TOKENS)
    of_request = FakeRequest("r", tokens)
    producer.half.on_new_request(of_request)
    eventually(lambda: tier.match(tokens, lease=False).num_pending == 5)
    producer.half.build_plan(step_of({"r": (BLOCKS, 0, 2 * CHUNK + 5)}))
    producer.half.request_finished(of_request)
    eventually(lambda: tier.match(tokens, lease=False).num_pending == 2)
    producer.half.stop()
    eventually(lambda: tier.match(tokens, lease=False).num_pending == 0)


@pytest.mark.parametrize(("role", "params"), [("both", {}), ("consumer", {}), ("producer", {"store": False})])
def test_nobody_else_promises_anything(tier, request, role, params):
    other = Scheduling(tier, request.node.name, role=role)
    tokens = tokens_of(78, NUM_TOKENS)
    other.arrive(FakeRequest("r", tokens, kv_transfer_params={"cachetier": params}))
    assert tier.match(tokens, lease=False).num_pending == 0
    other.half.stop()


def test_a_producers_request_that_ends_before_its_match_leaves_no_promise(tier, request):
    producer = Scheduling(tier, request.node.name, role="producer")
    tokens = tokens_of(79, NUM_TOKENS)
    of_request = FakeRequest("r", tokens)
    producer.half._matcher._submit(lambda: time.sleep(0.2))
    producer.half.on_new_request(of_request)
    ticket = producer.half._requests["r"].ticket
    producer.half.request_finished(of_request)
    eventually(ticket.done.is_set)
    eventually(lambda: tier.match(tokens, lease=False).num_pending == 0)
    producer.half.stop()


def test_a_request_that_names_who_computes_its_prompt_waits_for_the_promise(tier, request):
    producer = Scheduling(tier, request.node.name, role="producer")
    consumer = Scheduling(tier, request.node.name, role="consumer")
    eventually(lambda: producer.name in str(tier.link.call(lambda _: ListEngines(), TIMEOUT_S)))
    tokens, found = tokens_of(81, NUM_TOKENS), []
    for name in ("nobody", producer.name):
        params = {"cachetier": {"prefill": name}}
        found.append(consumer.arrive(FakeRequest(name, tokens, kv_transfer_params=params)))
    assert found == [0, 5 * CHUNK]
    producer.half.stop()
    consumer.half.stop()
