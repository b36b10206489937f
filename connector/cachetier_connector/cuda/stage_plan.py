"""Which bytes of which objects are staged where, to get a rank's shard out of chunks that others cut: pure functions.

Only whole pages can be verified, so whole pages are staged: of each object the ranges of pages that hold a wanted
byte. A shard too large for a staging slot is moved in parts, each a shard of its own with its own plan.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

from cachetier.client import ArenaView
from cachetier.core.checksum import checksum_of, digests_match
from cachetier.core.errors import ConfigError
from cachetier.core.layout import (
    DIGEST_BYTES,
    PAGE_BYTES,
    KVLayout,
    Piece,
    Shard,
    digests_offset,
    frame_bytes,
    num_pages,
    round_up,
)
from cachetier_connector.cuda.transfers import Transfer, plan_rows, plan_transfers

STRIPE_BYTES = 32  # the digest kernel reads whole stripes


class ArenaMemory(NamedTuple):
    """Where an arena's data area is mapped, for copies that go by address."""

    address: int
    data_bytes: int

    @classmethod
    def of(cls, arena: ArenaView) -> "ArenaMemory":
        """Return that of `arena`, which must be kept as long as its address is used."""
        return cls(arena.address, arena.geometry.data_bytes)


class Frames(Protocol):
    """What frames stand in: an arena or a segment file."""

    def frame(self, offset: int, length_bytes: int) -> memoryview | bytes:
        """Return bytes of a frame."""


class StagedRange(NamedTuple):
    """Pages `[object_offset, object_offset + length_bytes)` of object number `of_object`, and where they are staged."""

    of_object: int
    object_offset: int
    staged_offset: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class StagePlan:
    """How one part of a shard is staged, the same for every chunk of a tiling.

    Attributes:
        part: the shard that is moved.
        object_bytes: size of each object of the tiling.
        ranges: what is staged, ascending and without gaps but those that fill a page.
        stage_bytes: staging memory a chunk, whole pages.
        unit_offsets: where the tokens of each (head, layer) of `part` start, from the start of a chunk's staged bytes.
        page_bytes: length of each staged page.
    """

    part: Shard
    object_bytes: tuple[int, ...]
    ranges: tuple[StagedRange, ...]
    stage_bytes: int
    unit_offsets: tuple[int, ...]
    page_bytes: tuple[int, ...]

    @classmethod
    def of(cls, layout: KVLayout, tiling: Sequence[Shard], part: Shard, chunk_tokens: int) -> "StagePlan":
        """Plan how to get `part` out of objects cut like `tiling`, which covers it."""
        unit_bytes = chunk_tokens * layout.row_bytes
        num_units = (part.head_end - part.head_start) * (part.layer_end - part.layer_start)
        sizes = tuple(layout.object_bytes(stored, chunk_tokens) for stored in tiling)
        ranges: list[StagedRange] = []
        unit_offsets, staged = [-1] * num_units, 0
        for index, stored in enumerate(tiling):
            pieces = sorted(layout.pieces(stored, part, chunk_tokens))
            for start, end, covered in _page_ranges(pieces, sizes[index]):
                ranges.append(StagedRange(index, start, staged, end - start))
                for piece in covered:
                    for done in range(0, piece.length_bytes, unit_bytes):
                        unit = (piece.wanted_offset + done) // unit_bytes
                        unit_offsets[unit] = staged + piece.object_offset + done - start
                staged += round_up(end - start, PAGE_BYTES)
        assert -1 not in unit_offsets, "the tiling does not cover the part"
        page_bytes = tuple(
            min(PAGE_BYTES, staged_range.length_bytes - offset)
            for staged_range in ranges
            for offset in range(0, staged_range.length_bytes, PAGE_BYTES)
        )
        if any(length % STRIPE_BYTES for length in page_bytes):
            raise ConfigError(f"cachetier cannot digest objects of {sizes} bytes on a device: not multiples of 32")
        return cls(part, sizes, tuple(ranges), staged, tuple(unit_offsets), page_bytes)

    def copies(self, frames: Sequence[int], arena: "ArenaMemory", staged: int) -> Iterator[tuple[int, int, int]]:
        """Yield host address, device address and bytes of what is staged of one chunk, staged at address `staged`.

        Raises:
            ValueError: a frame is outside of the arena.
        """
        for index, object_offset, staged_offset, length_bytes in self.ranges:
            frame = frames[index]
            if not 0 <= frame <= arena.data_bytes - frame_bytes(self.object_bytes[index]):
                raise ValueError(f"frame {frame} is outside of the arena")
            yield arena.address + frame + object_offset, staged + staged_offset, length_bytes

    def transfers(self, frames: Sequence[Sequence[int]], arena: "ArenaMemory", staged: int) -> list[Transfer]:
        """Return the copies of what is staged of consecutive chunks, from address `staged` on.

        Raises:
            ValueError: a frame is outside of the arena.
        """
        stage_bytes = self.stage_bytes
        if len(self.ranges) > 1:
            copies = [
                copy
                for number, of_chunk in enumerate(frames)
                for copy in self.copies(of_chunk, arena, staged + number * stage_bytes)
            ]
            return plan_transfers(copies, arena.address)
        [(index, object_offset, _, length_bytes)] = self.ranges
        starts = [of_chunk[index] for of_chunk in frames]
        last = arena.data_bytes - frame_bytes(self.object_bytes[index])
        if min(starts) < 0 or max(starts) > last:
            raise ValueError(f"a frame of {starts} is outside of the arena")
        origin = arena.address + object_offset
        return plan_rows([origin + start for start in starts], staged, stage_bytes, length_bytes, arena.address)

    def matches(self, computed: memoryview, frames: Sequence[int], checksums: Sequence[int], arena: Frames) -> bool:
        """Tell whether `computed`, the digests of a chunk's staged pages, are those that `checksums` vouch for.

        A whole object's digests are vouched for directly. For a part of one, the frame lists the digests of all of it.
        """
        listed: dict[int, bytes] = {}
        for index, object_offset, staged_offset, length_bytes in self.ranges:
            size = self.object_bytes[index]
            first = staged_offset // PAGE_BYTES * DIGEST_BYTES
            found = computed[first : first + num_pages(length_bytes) * DIGEST_BYTES]
            if length_bytes == size:
                if checksum_of(found) != checksums[index]:
                    return False
                continue
            if index not in listed:
                digests = bytes(arena.frame(frames[index] + digests_offset(size), num_pages(size) * DIGEST_BYTES))
                if not digests_match(digests, size, checksums[index]):
                    return False
                listed[index] = digests
            first = object_offset // PAGE_BYTES * DIGEST_BYTES
            if found != listed[index][first : first + len(found)]:
                return False
        return True


def plan_single_objects(layout: KVLayout, tiling: Sequence[Shard], wanted: Shard, chunk_tokens: int) -> list[StagePlan]:
    """Return plans whose parts make up `wanted`, each one range of one object: such a part can be used where it lies.

    Raises:
        ConfigError: the objects cannot be digested on a device.
    """
    parts: list[Shard] = []
    for stored in tiling:
        heads = range(max(stored.head_start, wanted.head_start), min(stored.head_end, wanted.head_end))
        layers = max(stored.layer_start, wanted.layer_start), min(stored.layer_end, wanted.layer_end)
        if not heads or layers[0] >= layers[1]:
            continue
        if layers == (stored.layer_start, stored.layer_end):
            parts.append(Shard(heads.start, heads.stop, *layers))
        else:
            parts += [Shard(head, head + 1, *layers) for head in heads]
    plans = [StagePlan.of(layout, tiling, part, chunk_tokens) for part in parts]
    assert all(len(plan.ranges) == 1 for plan in plans), "a part of more than one range"
    return plans


def plan_parts(
    layout: KVLayout, tiling: Sequence[Shard], wanted: Shard, chunk_tokens: int, slot_bytes: int
) -> list[StagePlan]:
    """Return plans whose parts make up `wanted`, as few as possible, each of which fits into `slot_bytes`.

    The parts of an object that is `wanted` itself share no page, so that the digests of an object can be made of them.

    Raises:
        ConfigError: not even one head of one layer fits.
    """
    is_own = list(tiling) == [wanted]
    for parts in _ways_to_cut(wanted):
        plans = [StagePlan.of(layout, tiling, part, chunk_tokens) for part in parts]
        is_apart = not is_own or all(
            sum(plan.page_bytes) == layout.object_bytes(plan.part, chunk_tokens) for plan in plans
        )
        if is_apart and all(plan.stage_bytes <= slot_bytes for plan in plans):
            return plans
    raise ConfigError(f"{chunk_tokens} tokens of one head and layer do not fit into {slot_bytes} bytes of staging")


def _ways_to_cut(wanted: Shard) -> Iterator[list[Shard]]:
    """Yield `wanted` cut into ever smaller parts: ranges of heads, then ranges of layers of each head."""
    num_heads, num_layers = wanted.head_end - wanted.head_start, wanted.layer_end - wanted.layer_start
    layers = (wanted.layer_start, wanted.layer_end)
    heads = [(wanted.head_start, wanted.head_end)]
    for count in range(1, num_heads + 1):
        heads = _even(wanted.head_start, num_heads, count)
        yield [Shard(*head, *layers) for head in heads]
    for count in range(2, num_layers + 1):
        yield [Shard(*head, *part) for head in heads for part in _even(wanted.layer_start, num_layers, count)]


def _even(start: int, length: int, count: int) -> list[tuple[int, int]]:
    cuts = [start + number * length // count for number in range(count + 1)]
    return list(pairwise(cuts))


def _page_ranges(pieces: Sequence[Piece], size: int) -> Iterator[tuple[int, int, list[Piece]]]:
    """Yield the ranges of whole pages of an object of `size` bytes that hold `pieces`, and the pieces in each."""
    start, end = 0, -1
    covered: list[Piece] = []
    for piece in pieces:
        first = piece.object_offset // PAGE_BYTES * PAGE_BYTES
        if first > end:
            if covered:
                yield start, end, covered
            start, covered = first, []
        end = min(round_up(piece.object_offset + piece.length_bytes, PAGE_BYTES), size)
        covered.append(piece)
    if covered:
        yield start, end, covered
