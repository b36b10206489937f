"""What it takes to show that any layout reads any other: blocks and parallelism differ, the stored bytes do not."""

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cachetier.core.checksum import object_checksum
from cachetier.core.layout import PAGE_BYTES, Shard, frame_bytes
from cachetier.storage.records import DiskChunk, peek_header_bytes, unpack_header
from tests.e2e.harness import PATIENT, Engine, Server, assert_same_answers, dumped_kv_of_ranks, running
from tests.e2e.stand import CHUNK, NOISE, loadable, prompt_of, whole_chunks

NUM_HEADS = NUM_LAYERS = 4  # of the model that the tests run
# The last incomplete chunk has room for the answers, so all that is stored is prompt.
START = prompt_of(1, 331)["tokens"]
PROMPTS = [prompt_of(2, 100), prompt_of(3, 300), prompt_of(4, 715, START), prompt_of(5, 1500, START)]
NUM_STORED = sum(map(loadable, PROMPTS)) - whole_chunks(len(START))


class Ranks(NamedTuple):
    """How several ranks share a model.

    Attributes:
        arguments: vLLM's.
        tiling: the shards they store, in the order of their ranks.
    """

    arguments: dict[str, int]
    tiling: tuple[Shard, ...]

    def joined(self, parts: list[np.ndarray], heads_axis: int) -> np.ndarray:
        """Return what each rank has of an array, put together; the axis after that of the heads is of the layers."""
        has_all_layers = self.tiling[0].layer_end == NUM_LAYERS
        return np.concatenate(parts, heads_axis if has_all_layers else heads_axis + 1)


ONE = Ranks({}, (Shard(0, NUM_HEADS, 0, NUM_LAYERS),))
TENSOR_2 = Ranks(
    {"tensor_parallel_size": 2},
    (Shard(0, NUM_HEADS // 2, 0, NUM_LAYERS), Shard(NUM_HEADS // 2, NUM_HEADS, 0, NUM_LAYERS)),
)
PIPELINE_2 = Ranks(
    {"pipeline_parallel_size": 2},
    (Shard(0, NUM_HEADS, 0, NUM_LAYERS // 2), Shard(0, NUM_HEADS, NUM_LAYERS // 2, NUM_LAYERS)),
)


def stored_objects(data_dir: Path) -> dict[tuple[int, bytes], tuple[DiskChunk, list[bytes]]]:
    """Return what the segment files of a server that was stopped hold, by position and content."""
    found = {}
    for path in sorted((data_dir / "segments").glob("*.seg")):
        data, offset = path.read_bytes(), 0
        while offset < len(data) and (size := peek_header_bytes(data[offset : offset + PAGE_BYTES])):
            header = unpack_header(data[offset : offset + size])
            assert header is not None
            chunk, start, objects = header.chunk, offset + size, []
            for object_bytes in chunk.object_bytes:
                objects.append(data[start : start + object_bytes])
                start += frame_bytes(object_bytes)
            assert [object_checksum(memoryview(payload)) for payload in objects] == list(chunk.checksums)
            found[chunk.position, chunk.content] = (chunk, objects)
            offset += header.record_bytes
    assert len(found) * CHUNK == NUM_STORED
    return found


class Layout:
    """One engine, whose server is swapped under it."""

    def __init__(self, folder: Path, server: Server, name: str, ranks: Ranks, block_tokens: int, **arguments) -> None:
        self._server, self._name, self._ranks, self._num_asked = server, name, ranks, 0
        self._dumps = folder / name
        self._dumps.mkdir()
        self.engine = Engine(
            folder / f"{name}.log",
            {"server": f"unix:{server.socket}"} | PATIENT,
            probe_dir=self._dumps,
            block_size=block_tokens,
            **ranks.arguments,
            **arguments,
        )
        self.engine.generate([{"id": "first", "tokens": list(range(50, 90))}])

    def swap_server(self, data_dir: Path) -> None:
        """Have the engine find another data directory behind the same socket."""
        self._server.restart_with(data_dir)
        self._server.wait_for(lambda stats: stats["sessions"] >= 1 + len(self._ranks.tiling))

    def ask(self) -> tuple[list[dict], list[np.ndarray]]:
        """Ask all prompts one by one; return answers and the KV that their blocks held."""
        self._num_asked += 1
        names = [f"{self._name}x{self._num_asked}x{number}" for number in range(len(PROMPTS))]
        prompts = [prompt | {"id": name} for prompt, name in zip(PROMPTS, names, strict=True)]
        answers = self.engine.generate(prompts, max_tokens=4)
        shapes = [
            (shard.head_end - shard.head_start, shard.layer_end - shard.layer_start) for shard in self._ranks.tiling
        ]
        kv = [self._ranks.joined(dumped_kv_of_ranks(self._dumps, name, shapes), heads_axis=1) for name in names]
        return answers, [rows[: loadable(prompt)] for rows, prompt in zip(kv, PROMPTS, strict=True)]

    def store(self) -> tuple[list[dict], list[np.ndarray]]:
        """Ask all prompts of a server that holds none of them, and wait until it holds them all."""
        before = self._server.peek()["tokens"]
        target, deadline_s = before["stored"] + NUM_STORED, time.monotonic() + 120
        result = self.ask()
        # Two ranks on two busy cores drop what they cannot store within a second; vLLM's own cache still has it.
        while (stats := self._server.peek())["tokens"]["stored"] < target:
            assert time.monotonic() < deadline_s, f"still {stats}"
            time.sleep(1)
            self.ask()
        assert stats["tokens"]["stored"] == before["stored"] + NUM_STORED
        hits = sum(stats["tokens"]["hit"].values()) - sum(before["hit"].values())
        assert hits <= whole_chunks(len(START)), "more was held than what prompts share with earlier ones"
        return result

    def load(self) -> tuple[list[dict], list[np.ndarray]]:
        """Ask all prompts of a server that holds them all: every token that can be loaded is, nothing is stored."""
        before, expected = self._server.peek()["tokens"], [loadable(prompt) for prompt in PROMPTS]
        self.engine.reset()
        answers, kv = self.ask()
        stats = self._server.wait_for(lambda stats: stats["leases"] == 0)
        assert [answer["cached"] for answer in answers] == expected
        hits = sum(stats["tokens"]["hit"].values()) - sum(before["hit"].values())
        # A block that vLLM's own cache still holds from the prompt before is not loaded again.
        assert NUM_STORED <= hits <= sum(expected)
        assert stats["tokens"]["stored"] == before["stored"]
        assert stats["checksum_failures"] == stats["loads_failed"] == 0
        return answers, kv


def assert_equal_kv(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for prompt, some, others in zip(PROMPTS, found, expected, strict=True):
        assert some.shape == others.shape
        assert np.array_equal(some, others), f"not the stored KV, prompt of {len(prompt['tokens'])} tokens"


def assert_any_layout_reads_any_other(tmp_path: Path, two: Ranks, can_differ: bool, **arguments) -> None:
    """Store with one rank and with two, load with either, store again, and compare every byte.

    Args:
        tmp_path: an empty folder.
        two: how two ranks share the model.
        can_differ: whether two ranks compute other bytes than one does, by rounding; then they must.
        arguments: vLLM's, for every engine.
    """
    by_one, by_two, again_by_two, again_by_one = (tmp_path / name for name in ("one", "two", "again2", "again1"))
    server = Server(tmp_path)
    server.restart_with(by_one)
    first = Layout(tmp_path, server, "first", ONE, block_tokens=128, **arguments)
    with running(server, first.engine):
        plain, kv_of_one = first.store()
        first.engine.stop()

        # One rank's KV in blocks of 128 is loaded by two ranks into blocks of 64, and stored by them once more.
        second = Layout(tmp_path, server, "second", two, block_tokens=64, **arguments)
        with running(second.engine):
            answers, kv = second.load()
            assert_equal_kv(kv, kv_of_one)
            assert_same_answers(answers, plain, NOISE)
            second.swap_server(again_by_two)
            _, kv = second.store()
            assert_equal_kv(kv, kv_of_one)

            # Two ranks' own KV.
            second.swap_server(by_two)
            second.engine.reset()
            _, kv_of_two = second.store()
            second.engine.stop()

        # Both are loaded by one rank into blocks of 32, and the first is stored once more.
        third = Layout(tmp_path, server, "third", ONE, block_tokens=32, **arguments)
        with running(third.engine):
            _, kv = third.load()
            assert_equal_kv(kv, kv_of_two)
            third.swap_server(again_by_two)
            answers, kv = third.load()
            assert_equal_kv(kv, kv_of_one)
            assert_same_answers(answers, plain, NOISE)
            third.swap_server(again_by_one)
            third.store()
            third.engine.stop()
        server.stop()

    original, halves, whole = (stored_objects(folder) for folder in (by_one, again_by_two, again_by_one))
    assert original.keys() == halves.keys() == whole.keys() == stored_objects(by_two).keys()
    for place, (chunk, objects) in original.items():
        assert chunk.tiling == ONE.tiling
        assert (whole[place][0].checksums, whole[place][1]) == (chunk.checksums, objects)
        assert halves[place][0].tiling == two.tiling
        parts = [as_units(half, shard) for half, shard in zip(halves[place][1], two.tiling, strict=True)]
        assert two.joined(parts, heads_axis=0).tobytes() == objects[0]
    differ = any(objects != original[place][1] for place, (_, objects) in stored_objects(by_two).items())
    assert differ or not can_differ, "one rank and two compute the same KV to the last bit: nothing told them apart"


def as_units(payload: bytes, shard: Shard) -> np.ndarray:
    """Return an object as `[heads, layers, tokens, row bytes]`."""
    heads, layers = shard.head_end - shard.head_start, shard.layer_end - shard.layer_start
    return np.frombuffer(payload, np.uint8).reshape(heads, layers, CHUNK, -1)
