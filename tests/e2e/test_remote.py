"""Two nodes in network namespaces, each with a server and a real engine, share a Mooncake Store; then its master is
killed and a link is cut: answers stay right, deadlines are kept, and nothing needs a restart."""

import time

import pytest

from tests.e2e.harness import PATIENT, Engine, Server, assert_same_answers, running
from tests.e2e.net_nodes import HUB_ADDRESS, inside, network, why_not
from tests.e2e.stand import NOISE, PLAIN, loadable, prompt_of, storable
from tests.remote.masters import Master

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

LONG = 3000
# What a broken store may add to an answer: one look-up's deadline, one load's patience, and a busy machine's noise.
LOOK_UP_MS, MATCH_MS, LOAD_MS = 500, 1500, 1500
DELAY_S = 5.0


class Node:
    """A server in its namespace, and an engine."""

    def __init__(self, folder, namespace: str, remote: str, secret: str, **settings) -> None:
        folder.mkdir()
        options = ("--remote", remote, "--secret-file", secret, "--remote-deadline-ms", str(LOOK_UP_MS))
        self.server = Server(folder, *options, prefix=inside(namespace))
        self._folder, self._settings = folder, settings
        self._num_asked = 0

    def start_engine(self) -> None:
        """Start the engine, and let it pay its one-off costs."""
        connector = {"server": f"unix:{self.server.socket}", **self._settings}
        self.engine = Engine(self._folder / "engine.log", connector)
        self.plain([prompt_of(1, 300)])

    def named(self, prompts: list[dict], **more) -> list[dict]:
        """Return the prompts with ids that are new to the engine."""
        self._num_asked += len(prompts)
        return [prompt | more | {"id": f"r{self._num_asked}-{number}"} for number, prompt in enumerate(prompts)]

    def ask(self, prompts: list[dict]) -> list[dict]:
        """Complete prompts with nothing in vLLM's own cache."""
        self.engine.reset()
        return self.engine.generate(self.named(prompts))

    def plain(self, prompts: list[dict]) -> list[dict]:
        """Complete prompts without the tier."""
        self.engine.reset()
        return self.engine.generate(self.named(prompts, params=PLAIN))

    def produce(self, prompts: list[dict]) -> None:
        """Complete prompts, and wait until all that is stored of them is in the remote store."""
        before = self.server.peek()
        self.ask(prompts)
        due = sum(map(storable, prompts))
        stats = self.server.wait_for(lambda s: s["tokens"]["stored"] - before["tokens"]["stored"] >= due)
        chunk_bytes = stats["bytes"]["host"]["used"] // stats["chunks_host"]
        put = before["bytes"]["remote"]["put"] + due // 64 * chunk_bytes * 0.9  # frames are a little smaller
        self.server.wait_for(lambda s: s["bytes"]["remote"]["put"] >= put)

    def wait_until(self, *, is_available: bool) -> None:
        """Wait until the server uses the remote store, or leaves it alone."""
        self.server.wait_for(lambda stats: stats["remote_available"] == is_available, 30)

    def remote_hits(self) -> int:
        """Return how many tokens came from the remote store."""
        return self.server.wait_for(lambda stats: stats["leases"] == 0)["tokens"]["hit"]["remote"]


def assert_loaded_from_afar(node: Node, prompts: list[dict], expected: list[dict]) -> None:
    """Ask prompts of which another node has stored everything."""
    before = node.remote_hits()
    answers = node.ask(prompts)
    assert [answer["cached"] for answer in answers] == [loadable(prompt) for prompt in prompts], node.server.peek()
    assert node.remote_hits() - before == sum(map(loadable, prompts))
    assert_same_answers(answers, expected, NOISE)


def assert_computed_in_time(answers: list[dict], expected: list[dict]) -> None:
    """Right answers, none much later than without the tier."""
    assert_same_answers(answers, expected, NOISE)
    for answer, plain in zip(answers, expected, strict=True):
        assert answer["seconds"] < plain["seconds"] + DELAY_S


def test_two_nodes_share_what_one_has_stored_also_after_the_master_was_killed_and_a_link_was_cut(tmp_path):
    if reason := why_not():
        pytest.skip(reason)
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef" * 4)
    with network() as net:
        first, second = net.add_node("first"), net.add_node("second")
        master = Master(tmp_path / "master.log", HUB_ADDRESS, inside(net.hub))
        producer = Node(tmp_path / "first", first, master.url, str(secret), **PATIENT)
        consumer = Node(
            tmp_path / "second", second, master.url, str(secret), match_deadline_ms=MATCH_MS, load_deadline_ms=LOAD_MS
        )
        with running(producer.server, consumer.server):
            producer.start_engine()
            consumer.start_engine()
            try:
                _play(net, master, producer, consumer)
            finally:
                producer.engine.kill()
                consumer.engine.kill()
                master.kill()


def assert_found_again(producer: Node, consumer: Node, seed: int) -> None:
    """Produce prompts until one is loaded from afar: stores find each other again after some seconds, by themselves."""
    deadline, before = time.monotonic() + 60, consumer.remote_hits()
    while consumer.remote_hits() == before:
        assert time.monotonic() < deadline, "the nodes do not find each other again"
        seed += 1
        fresh = [prompt_of(seed, 500)]
        producer.ask(fresh)
        assert_same_answers(consumer.ask(fresh), consumer.plain(fresh), NOISE)


def _play(net, master, producer, consumer) -> None:
    for node in (producer, consumer):
        node.wait_until(is_available=True)
    prompts = [prompt_of(seed, length) for seed, length in ((10, 700), (11, 300), (12, LONG))]
    expected = consumer.plain(prompts)
    producer.produce(prompts)
    assert_loaded_from_afar(consumer, prompts, expected)

    # The master is killed: both go on alone, and find each other again when there is one.
    later = [prompt_of(seed, 500) for seed in (20, 21, 22)]
    expected = consumer.plain(later)
    master.kill()
    assert_computed_in_time(consumer.ask(later[:1]), expected[:1])
    consumer.wait_until(is_available=False)
    assert_computed_in_time(consumer.ask(later[1:]), expected[1:])
    producer.ask([prompt_of(23, 500)])
    master.start()
    for node in (producer, consumer):
        node.wait_until(is_available=True)
    assert_found_again(producer, consumer, seed=100)

    # The producer's link is cut while the consumer loads from it.
    long = [prompt_of(40, LONG)]
    expected = consumer.plain(long)
    producer.produce(long)
    assert net.slow_down("first", 8000), "the kernel cannot slow a link down"
    got = consumer.server.peek()["bytes"]["remote"]["got"]
    consumer.engine.reset()
    consumer.engine.start("generate", prompts=consumer.named(long))
    consumer.server.wait_for(lambda stats: stats["leases"])
    time.sleep(0.2)
    net.cut("first")
    [answer] = consumer.engine.finish()
    assert_computed_in_time([answer], expected)
    assert consumer.server.peek()["bytes"]["remote"]["got"] - got < 5 << 20, "the cut came too late"
    for prompt in (prompt_of(41, 500), prompt_of(42, 500)):
        assert_computed_in_time(consumer.ask([prompt]), consumer.plain([prompt]))
    net.speed_up("first")
    net.join("first")
    for node in (producer, consumer):
        node.wait_until(is_available=True)
    assert_found_again(producer, consumer, seed=200)
    for node in (producer, consumer):
        stats = node.server.peek()
        assert stats["checksum_failures"] == 0
        assert stats["remote_failures"] > 0
