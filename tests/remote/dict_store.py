"""The reference: values in a dict, and the faults that tests of the store want of it."""

import threading
import time
from collections.abc import Sequence

from cachetier.remote.base import FrameMemory, Head, Outcome, Place, RemoteStore, Value


class Shared:
    """What all nodes have in common, and what is wrong with it.

    Attributes:
        values: the bytes of each value.
        is_dead: every call fails.
        delay_s: every call takes so long.
        is_full: nothing can be put.
        keeps_all: nothing can be deleted.
        gate: gets wait for it.
        calls: names of the calls, in order.
    """

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.is_dead = self.is_full = self.keeps_all = False
        self.delay_s = 0.0
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[str] = []


class DictStore(RemoteStore):
    """One node's way to what is shared."""

    def __init__(self, shared: Shared, memory: FrameMemory) -> None:
        self._shared = shared
        self._memory = memory

    def exists(self, keys: Sequence[str]) -> list[Outcome]:
        return [head.outcome for head in self._begin("exists", keys) or self.read_heads(keys, 0)]

    def read_heads(self, keys: Sequence[str], num_bytes: int) -> list[Head]:
        if failed := self._begin("read_heads", keys):
            return failed
        values = [self._shared.values.get(key) for key in keys]
        return [Head(Outcome.MISSING) if v is None else Head(Outcome.DONE, v[:num_bytes]) for v in values]

    def put(self, values: Sequence[Value]) -> list[Outcome]:
        if self._begin("put", values):
            return [Outcome.FAILED] * len(values)
        if self._shared.is_full:
            return [Outcome.FULL] * len(values)
        for value in values:
            body = b"".join((value.header, *(self._memory.view(*extent) for extent in value.frames)))
            self._shared.values.setdefault(value.key, body)
        return [Outcome.DONE] * len(values)

    def get(self, places: Sequence[Place]) -> list[Outcome]:
        self._shared.gate.wait(20)
        if self._begin("get", places):
            return [Outcome.FAILED] * len(places)
        return [self._get(place) for place in places]

    def delete(self, keys: Sequence[str]) -> list[Outcome]:
        if self._begin("delete", keys) or self._shared.keeps_all:
            return [Outcome.FAILED] * len(keys)
        for key in keys:
            self._shared.values.pop(key, None)
        return [Outcome.DONE] * len(keys)

    def close(self) -> None:
        self._shared.gate.set()

    def _begin(self, call: str, items: Sequence[object]) -> list[Head]:
        self._shared.calls.append(call)
        time.sleep(self._shared.delay_s)
        return [Head(Outcome.FAILED)] * len(items) if self._shared.is_dead else []

    def _get(self, place: Place) -> Outcome:
        value = self._shared.values.get(place.key)
        if value is None:
            return Outcome.MISSING
        start = place.header_bytes
        for extent in place.frames:
            self._memory.view(*extent)[:] = value[start : start + extent.length_bytes]
            start += extent.length_bytes
        return Outcome.DONE
