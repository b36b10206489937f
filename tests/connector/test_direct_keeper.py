"""The worker's word that it reads segment files: measured once, told to every server, and believed when all say it."""

import threading

from cachetier_connector.direct_keeper import DirectKeeper
from tests.connector.servers import CHUNK, Blocks, Tier, connect, eventually, stats_of, tokens_of
from tests.service.running import RunningServer


class MeasuredEngine:
    """An engine that finds direct reads as fast as it was told."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.folders: list[str] = []
        self.may_end = threading.Event()

    def measure_direct(self, folder: str) -> float:
        self.folders.append(folder)
        assert self.may_end.wait(5)
        return self.bytes_per_s


def keeper_of(server, engine, num_workers):
    """Return a keeper whose engine has measured, and its link."""
    link = connect(server)
    keeper = DirectKeeper(engine, link, num_workers)
    keeper.tend()
    engine.may_end.set()
    eventually(lambda: keeper._bytes_per_s == engine.bytes_per_s)
    return keeper, link


def test_once_all_workers_said_so_matches_name_segment_files_and_a_new_server_is_told_too(tmp_path):
    tokens = [tokens_of(seed, 2 * CHUNK) for seed in range(4)]
    with RunningServer(tmp_path / "data") as server:
        tier = Tier(server)
        for seed, each in enumerate(tokens):
            tier.store(each, seed=seed)
        tier.link.close()
    with RunningServer(tmp_path / "data") as server:
        tier, engines = Tier(server), [MeasuredEngine(1e9), MeasuredEngine(2e9)]
        first, first_link = keeper_of(server, engines[0], 2)
        second, second_link = keeper_of(server, engines[1], 2)
        first.tend()
        assert tier.match(tokens[0]).segments == []
        second.tend()
        assert len(tier.match(tokens[1]).segments) == 1
        second_link.close()
        eventually(lambda: stats_of(server)["sessions"] == 2)
        assert tier.match(tokens[2]).segments == []
        second_link.connect()
        second.tend()
        second.tend()
        assert len(tier.match(tokens[3]).segments) == 1
        assert [len(engine.folders) for engine in engines] == [1, 1]
        assert engines[0].folders[0].startswith(str(tmp_path))
        for link in (first_link, second_link, tier.link):
            link.close()


def test_a_worker_without_faster_direct_reads_says_nothing(tmp_path):
    with RunningServer(tmp_path / "data") as server:
        link = connect(server)
        keeper = DirectKeeper(Blocks().engine, link, 1)
        for _ in range(3):
            keeper.tend()
        assert keeper._told is None
        link.close()
