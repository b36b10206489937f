"""Who waits for chunks is answered when there is news, and blocks nobody until then."""

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from cachetier.client import Client, Session
from cachetier.core.errors import CachetierError
from cachetier.core.messages import Match, MatchReply, Wait
from cachetier.core.wait_messages import AWAIT_MAX_S, AwaitChunks, AwaitChunksReply, EndPromise
from tests.service.running import SMALL, TIMEOUT_S, RunningServer, TinyEngine, tokens_of


class Consumer:
    """An engine that waits, on one connection, and asks for news on another."""

    def __init__(self, socket_path: str, namespace: bytes) -> None:
        self.client, self.other, self.namespace = Client(socket_path), Client(socket_path), namespace
        self.session = Session(self.client, "test", "consumer", TIMEOUT_S)
        self.asked: list[tuple[float, AwaitChunksReply]] = []

    def match(self, tokens: bytes) -> MatchReply:
        wait = Wait(number=7, for_promised=True)
        message = Match(session=self.session.id, namespace=self.namespace, tokens=tokens, wait=wait)
        return self.client.call(message, TIMEOUT_S)

    def ask(self, within_s: float = AWAIT_MAX_S) -> None:
        start_s = time.monotonic()
        reply = self.other.call(AwaitChunks(session=self.session.id, within_s=within_s), TIMEOUT_S)
        self.asked.append((time.monotonic() - start_s, reply))

    def begin_to_ask(self) -> threading.Thread:
        thread = threading.Thread(target=self.ask)
        thread.start()
        time.sleep(0.2)
        return thread

    def close(self) -> None:
        self.session.close()
        self.client.close()
        self.other.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("news") / "data", *SMALL) as running:
        yield running


@pytest.fixture
def producer(server: RunningServer) -> Iterator[TinyEngine]:
    made = TinyEngine(server.socket_path)
    yield made
    made.close()


@pytest.fixture
def consumer(server: RunningServer, producer: TinyEngine) -> Iterator[Consumer]:
    made = Consumer(server.socket_path, producer.namespace)
    yield made
    made.close()


def promise(producer: TinyEngine, tokens: bytes) -> int:
    message = Match(session=producer.session.id, namespace=producer.namespace, tokens=tokens, lease=False, promise=True)
    return producer.client.call(message, TIMEOUT_S).promise


def test_news_comes_with_the_commit_and_meanwhile_others_are_served(producer: TinyEngine, consumer: Consumer) -> None:
    tokens = tokens_of(1, 3)
    assert promise(producer, tokens)
    assert consumer.match(tokens).num_pending == 3
    thread = consumer.begin_to_ask()
    start_s = time.monotonic()
    producer.match(tokens_of(2, 3))
    assert time.monotonic() - start_s < 1
    producer.store(tokens)
    thread.join()
    [(seconds, reply)] = consumer.asked
    assert 0.2 <= seconds < 2
    assert [(news.number, news.match.num_chunks, news.match.num_pending) for news in reply.news] == [(7, 3, 0)]
    assert producer.holds_right_bytes(reply.news[0].match)


def test_news_comes_when_a_promise_ends(producer: TinyEngine, consumer: Consumer) -> None:
    tokens = tokens_of(3, 3)
    number = promise(producer, tokens)
    consumer.match(tokens)
    thread = consumer.begin_to_ask()
    producer.client.call(EndPromise(session=producer.session.id, promise=number, num_chunks=0, within_s=0), TIMEOUT_S)
    thread.join()
    [(seconds, reply)] = consumer.asked
    assert seconds < 2
    assert [(news.match.num_chunks, news.match.num_pending) for news in reply.news] == [(0, 0)]


def test_without_news_the_answer_comes_in_time(producer: TinyEngine, consumer: Consumer) -> None:
    tokens = tokens_of(4, 3)
    promise(producer, tokens)
    consumer.match(tokens)
    producer.store(tokens_of(5, 2))  # others' chunks wake, and are no news
    consumer.ask(within_s=0.4)
    [(seconds, reply)] = consumer.asked
    assert 0.4 <= seconds < 2
    assert reply.news == []


def test_the_server_stops_while_somebody_waits(tmp_path) -> None:
    with RunningServer(tmp_path / "data") as server:
        producer = TinyEngine(server.socket_path)
        consumer = Consumer(server.socket_path, producer.namespace)
        promise(producer, tokens_of(6, 2))
        consumer.match(tokens_of(6, 2))

        def ask_in_vain() -> None:
            with contextlib.suppress(CachetierError):
                consumer.ask()

        thread = threading.Thread(target=ask_in_vain)
        thread.start()
        time.sleep(0.2)
        start_s = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start_s < 4
        thread.join()
        producer.close()
        consumer.close()
