"""What a store that several nodes share has to do, and in which words it answers.

A *value* is one chunk: a header, which says everything that a hit has to compare, and behind it the frames of the
chunk's objects as they lie in the arena (docs/format.md). Headers travel as bytes; frames are named by where they lie
in the arena, so that a store can move them without a copy.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from cachetier.core.keys import ChainKey, NamespaceId

KEY_PREFIX = "cachetier/1"  # the number is the format's version


class Outcome(Enum):
    """What became of one key of a batch."""

    DONE = "done"
    MISSING = "missing"  # the store has no such value, or one that is shorter than what was asked for
    FULL = "full"  # the store has no room now
    FAILED = "failed"  # the store, or the way to it, is broken


class Extent(NamedTuple):
    """A byte range of the arena's data area; both numbers are multiples of 4 KiB."""

    offset: int
    length_bytes: int


class Value(NamedTuple):
    """A chunk to put."""

    key: str
    header: bytes
    frames: Sequence[Extent]


class Place(NamedTuple):
    """Where the frames of a value are to go."""

    key: str
    header_bytes: int
    frames: Sequence[Extent]


class Head(NamedTuple):
    """The first bytes of a value; `data` is empty unless the outcome is DONE."""

    outcome: Outcome
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class FrameMemory:
    """The arena, as a store sees it.

    Attributes:
        path: the file, for stores that map it in a process of their own.
        file_bytes: its size.
        data_offset: where in it the data area begins.
        view: gives the writable bytes of `[offset, offset + length)` of the data area.
    """

    path: str
    file_bytes: int
    data_offset: int
    view: Callable[[int, int], memoryview]


class RemoteStore(ABC):
    """A store of values, shared by the servers of several nodes.

    All methods are called from several threads at once, never from an event loop, and may block: for seconds when the
    store is gone, but not for ever (every implementation has time limits of its own). Who cannot wait gives the call
    up and leaves it to its thread. Frames that a call was given are the store's until the call returns, and nobody's
    business of the store afterwards.

    None of them raises for a store that is broken, slow or full: each key gets its own `Outcome`. After FAILED for a
    `get` the frames may hold anything.

    Values never change: putting a key that is there already is DONE, whichever value stays. A value appears whole or
    not at all, and may vanish at any time.
    """

    @abstractmethod
    def exists(self, keys: Sequence[str]) -> list[Outcome]:
        """Tell for each key whether the store has it: DONE, MISSING or FAILED."""

    @abstractmethod
    def read_heads(self, keys: Sequence[str], num_bytes: int) -> list[Head]:
        """Return the first `num_bytes` of each value."""

    @abstractmethod
    def put(self, values: Sequence[Value]) -> list[Outcome]:
        """Store values: DONE, FULL or FAILED each."""

    @abstractmethod
    def get(self, places: Sequence[Place]) -> list[Outcome]:
        """Fill the frames of each place with what stands in its value behind the header."""

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> list[Outcome]:
        """Remove values: DONE (also when there was none) or FAILED each."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back. Nothing is called afterwards; calls under way end soon, in any way."""


def key_of(namespace: NamespaceId, chunk: ChainKey) -> str:
    """Return under which key a chunk is stored."""
    return f"{KEY_PREFIX}/{namespace.hex()}/{chunk.hex()}"
