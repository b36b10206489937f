"""What every `RemoteStore` must do: a test class to be subclassed, with fixtures `store` and `memory`."""

import random
import threading

import pytest

from cachetier.remote.base import Extent, FrameMemory, Head, Outcome, Place, RemoteStore, Value

PAGE = 4096
HEADER = random.Random(1).randbytes(PAGE)
FRAMES = (Extent(0, 3 * PAGE), Extent(8 * PAGE, 2 * PAGE))
ELSEWHERE = (Extent(32 * PAGE, 3 * PAGE), Extent(64 * PAGE, 2 * PAGE))


def fill(memory: FrameMemory, seed: int, frames: tuple[Extent, ...] = FRAMES) -> list[bytes]:
    """Write random bytes into frames and return them."""
    contents = [random.Random(f"{seed} {extent}").randbytes(extent.length_bytes) for extent in frames]
    for extent, content in zip(frames, contents, strict=True):
        memory.view(*extent)[:] = content
    return contents


def read(memory: FrameMemory, frames: tuple[Extent, ...]) -> list[bytes]:
    """Return what is in frames."""
    return [bytes(memory.view(*extent)) for extent in frames]


class RemoteStoreSuite:
    """The contract of `cachetier.remote.base`."""

    def test_what_was_put_comes_back_to_other_frames_as_it_was(self, store: RemoteStore, memory: FrameMemory) -> None:
        contents = fill(memory, 1)
        assert store.put([Value("a/1", HEADER, FRAMES)]) == [Outcome.DONE]
        fill(memory, 2)
        assert store.get([Place("a/1", PAGE, ELSEWHERE)]) == [Outcome.DONE]
        assert read(memory, ELSEWHERE) == contents

    def test_heads_are_the_first_bytes(self, store: RemoteStore, memory: FrameMemory) -> None:
        contents = fill(memory, 1)
        store.put([Value("a/1", HEADER, FRAMES)])
        assert store.read_heads(["a/1"], PAGE) == [Head(Outcome.DONE, HEADER)]
        assert store.read_heads(["a/1"], 2 * PAGE) == [Head(Outcome.DONE, HEADER + contents[0][:PAGE])]

    def test_each_key_of_a_batch_has_its_own_outcome(self, store: RemoteStore, memory: FrameMemory) -> None:
        contents = fill(memory, 1)
        store.put([Value(f"a/{number}", bytes([number]) * PAGE, FRAMES) for number in (1, 3)])
        keys = [f"a/{number}" for number in range(5)]
        is_there = [number in (1, 3) for number in range(5)]
        outcomes = [Outcome.DONE if each else Outcome.MISSING for each in is_there]
        assert store.exists(keys) == outcomes
        heads = [bytes([number]) * PAGE if each else b"" for number, each in enumerate(is_there)]
        assert store.read_heads(keys, PAGE) == [Head(*pair) for pair in zip(outcomes, heads, strict=True)]
        targets = [tuple(Extent(at + 128 * PAGE * number, size) for at, size in FRAMES) for number in range(5)]
        places = [Place(key, PAGE, target) for key, target in zip(keys, targets, strict=True)]
        assert store.get(places) == outcomes
        assert read(memory, targets[1]) == read(memory, targets[3]) == contents

    def test_a_value_that_is_there_stays_as_it_is(self, store: RemoteStore, memory: FrameMemory) -> None:
        fill(memory, 1)
        value = Value("a/1", HEADER, FRAMES)
        assert store.put([value]) == store.put([value]) == [Outcome.DONE]

    def test_what_was_deleted_is_missing_and_can_be_put_again(self, store: RemoteStore, memory: FrameMemory) -> None:
        fill(memory, 1)
        store.put([Value("a/1", HEADER, FRAMES)])
        store.get([Place("a/1", PAGE, ELSEWHERE)])
        assert store.delete(["a/1", "a/2"]) == [Outcome.DONE, Outcome.DONE]
        assert store.exists(["a/1"]) == [Outcome.MISSING]
        contents = fill(memory, 3)
        assert store.put([Value("a/1", HEADER, FRAMES)]) == [Outcome.DONE]
        assert store.get([Place("a/1", PAGE, ELSEWHERE)]) == [Outcome.DONE]
        assert read(memory, ELSEWHERE) == contents

    def test_a_large_batch_is_done_whole(self, store: RemoteStore, memory: FrameMemory) -> None:
        keys = [f"many/{number}" for number in range(64)]
        contents = [fill(memory, number, ((Extent(8 * number * PAGE, 2 * PAGE)),)) for number in range(64)]
        values = [Value(key, HEADER, [Extent(8 * number * PAGE, 2 * PAGE)]) for number, key in enumerate(keys)]
        assert store.put(values) == [Outcome.DONE] * 64
        assert [head.data for head in store.read_heads(keys, PAGE)] == [HEADER] * 64
        targets = [(Extent((1024 + 8 * number) * PAGE, 2 * PAGE),) for number in range(64)]
        places = [Place(key, PAGE, target) for key, target in zip(keys, targets, strict=True)]
        assert store.get(places) == [Outcome.DONE] * 64
        assert [read(memory, target) for target in targets] == contents

    def test_several_threads_at_once_do_not_get_in_each_others_way(
        self, store: RemoteStore, memory: FrameMemory
    ) -> None:
        wrong: list[str] = []

        def work(number: int) -> None:
            frames = (Extent(64 * number * PAGE, 2 * PAGE),)
            for turn in range(5):
                key, header = f"t/{number}/{turn}", bytes([16 * number + turn]) * PAGE
                contents = fill(memory, 100 * number + turn, frames)
                outcomes = store.put([Value(key, header, frames)])
                memory.view(*frames[0])[:] = bytes(2 * PAGE)
                outcomes += store.get([Place(key, PAGE, frames)])
                if set(outcomes) != {Outcome.DONE} or read(memory, frames) != contents:
                    wrong.append(key)
                if store.read_heads([key], PAGE) != [Head(Outcome.DONE, header)]:
                    wrong.append(key)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    @pytest.mark.parametrize("call", ["exists", "read_heads", "put", "get", "delete"])
    def test_an_empty_batch_is_no_mistake(self, store: RemoteStore, call: str) -> None:
        arguments = ([], PAGE) if call == "read_heads" else ([],)
        assert getattr(store, call)(*arguments) == []


def all_failed(store: RemoteStore) -> bool:
    """Tell whether every call says that the store is broken."""
    return (
        store.exists(["a", "b"])
        == store.get([Place("a", PAGE, FRAMES), Place("b", PAGE, FRAMES)])
        == store.put([Value("a", HEADER, FRAMES), Value("b", HEADER, FRAMES)])
        == store.delete(["a", "b"])
        == [head.outcome for head in store.read_heads(["a", "b"], PAGE)]
        == [Outcome.FAILED] * 2
    )
