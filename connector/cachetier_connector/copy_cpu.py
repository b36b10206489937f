"""The copy engine of vLLM's CPU backend.

Its attention kernels pack the K rows of a block, and some the V rows, in an order that depends on the instruction set
(AVX: K transposed; AMX: both in pairs). The packing is learnt at start-up, by having vLLM write blocks whose values
name their place, so that no kernel's layout is built in here.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from cachetier.client import ArenaView
from cachetier.core.checksum import checksum_of, page_digests
from cachetier.core.errors import ConfigError
from cachetier.core.layout import KVLayout, Shard, digests_offset, frame_bytes
from cachetier_blend.rotation import rotate
from cachetier_connector.copy_base import CopyEngine, LoadRun
from cachetier_connector.plan import ChunkSource, LoadOp
from cachetier_connector.shard_reader import ShardReader

# Has the backend write K and V rows, both `[block_tokens, 1, head_size]` in the model's dtype, into one zeroed block
# and returns it: `[1, 1, block_tokens, 2 * head_size]` in the KV cache's dtype.
WriteBlock = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of `tensor` whose elements are integers of the same size, which copies never round."""
    return tensor.view(_INTEGER_OF_SIZE[tensor.element_size()])


def learn_packing(
    write_block: WriteBlock, block_tokens: int, head_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the backend puts each element of a block's K rows and of its V rows.

    Writes one block for each binary digit of the elements' numbers: zero and non-zero survive any conversion.

    Returns:
        Two int64 `[block_tokens, head_size]`: offsets in elements from the start of a block's (one head's) K half, and
        from the start of its V half.

    Raises:
        ConfigError: the backend does something else than reorder rows within each half.
    """
    numbers = torch.arange(block_tokens * head_size)
    found = torch.zeros(2, numbers.numel(), dtype=torch.int64)
    for digit in range(int(numbers[-1]).bit_length()):
        rows = (numbers >> digit & 1).view(block_tokens, 1, head_size).to(dtype)
        halves = as_integers(write_block(rows, rows.clone())).reshape(2, -1)
        found += (halves != 0).to(torch.int64) << digit
    if not all(torch.equal(half.sort().values, numbers) for half in found):
        raise ConfigError("vLLM's CPU attention does not just reorder K and V rows; cachetier cannot serve it")
    keys, values = found.argsort(dim=1).view(2, block_tokens, head_size)
    return keys, values


class _Rows:
    """The K (or V) rows of one layer's paged blocks, addressed by block and token whatever their packing."""

    def __init__(self, cache: torch.Tensor, half: int, offsets: torch.Tensor) -> None:
        """Wrap half 0 (K) or 1 (V) of `cache`, integers `[blocks, heads, block_tokens, 2 * head_size]`."""
        num_blocks, num_heads, block_tokens, width = cache.shape
        flat = cache.view(num_blocks, num_heads, 2, block_tokens * width // 2)[:, :, half]
        token_step, element_step = int(offsets[1, 0]), int(offsets[0, 1])
        tokens, elements = torch.arange(block_tokens)[:, None], torch.arange(width // 2)[None]
        self._offsets: torch.Tensor | None = None
        if torch.equal(offsets, tokens * token_step + elements * element_step):
            self._rows = flat.as_strided(
                (num_blocks, num_heads, block_tokens, width // 2),
                (flat.stride(0), flat.stride(1), token_step, element_step),
            )
        else:
            self._rows, self._offsets = flat, offsets

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return the rows of all tokens of `blocks`, int64 `[n]`, one after the other: `[heads, tokens, head_size]`.

        Whole blocks with few, large operations: cutting them at the borders of chunks costs several times as much.
        """
        if self._offsets is None:
            rows = self._rows.transpose(0, 1)[:, blocks]
        else:
            rows = self._rows[blocks].transpose(0, 1)[:, :, self._offsets]
        return rows.flatten(1, 2)

    def write(self, piece: "_Piece", rows: torch.Tensor) -> None:
        """Copy `rows`, `[heads, tokens, head_size]`, to the slots of `piece`."""
        block, start, end = piece.block, piece.slot, piece.slot + piece.num_tokens
        if self._offsets is None:
            self._rows[block, :, start:end] = rows
        else:
            self._rows[block][:, self._offsets[start:end]] = rows


class _Piece(NamedTuple):
    """Tokens that lie in one block and in one chunk."""

    block: int
    slot: int
    chunk: int
    token: int
    num_tokens: int


def _pieces(
    block_ids: Sequence[int], block_tokens: int, first_token: int, chunk_tokens: int, skip_tokens: int, num_tokens: int
) -> list[_Piece]:
    """Cut tokens at the borders of blocks (counted from `first_token`) and of chunks (counted from `skip_tokens`)."""
    pieces, done = [], 0
    while done < num_tokens:
        block, slot = divmod(first_token + done, block_tokens)
        chunk, token = divmod(skip_tokens + done, chunk_tokens)
        length = min(block_tokens - slot, chunk_tokens - token, num_tokens - done)
        pieces.append(_Piece(block_ids[block], slot, chunk, token, length))
        done += length
    return pieces


def _write_object(payload: memoryview, arena: ArenaView, offset: int) -> int:
    """Write an object and the digests of its pages into the frame at `offset`; return its checksum."""
    digests = page_digests(payload)
    frame = arena.frame(offset, frame_bytes(len(payload)))
    frame[: len(payload)] = payload
    start = digests_offset(len(payload))
    frame[start : start + len(digests)] = digests
    return checksum_of(digests)


class CpuCopyEngine(CopyEngine):
    """Gathers and scatters with strided copies, which release the interpreter's lock while they copy.

    A snapshot is a copy, so blocks are free for others at once.
    """

    def __init__(
        self,
        caches: Sequence[torch.Tensor],
        packing: tuple[torch.Tensor, torch.Tensor],
        layout: KVLayout,
        shard: Shard,
    ) -> None:
        """Serve the paged blocks of one rank.

        Args:
            caches: of each layer, in order, `[blocks, heads, block_tokens, K | V]` in the KV cache's dtype.
            packing: of K and of V rows, from `learn_packing`.
            layout: of the model's KV cache group.
            shard: what of it this rank holds.
        """
        integers = [as_integers(cache) for cache in caches]
        self._layers = [
            tuple(_Rows(cache, half, offsets) for half, offsets in enumerate(packing)) for cache in integers
        ]
        self._layout, self._shard = layout, shard
        self._dtype, self._kv_dtype = integers[0].dtype, caches[0].dtype
        num_heads, block_tokens, width = integers[0].shape[1:]
        self._num_heads: int = int(num_heads)
        self._block_tokens: int = int(block_tokens)
        self._head_size = width // 2
        self._row_bytes: int = int(width) * integers[0].element_size()

    @property
    def block_tokens(self) -> int:
        return self._block_tokens

    @property
    def keeps_blocks(self) -> bool:
        return False

    def shard_bytes(self, chunk_tokens: int) -> int:
        return self._num_heads * len(self._layers) * chunk_tokens * self._row_bytes

    def use_arena(self, arena: ArenaView) -> None:
        """Nothing: the mapping is all that it takes."""

    def snapshot(self, block_ids: Sequence[int], first_token: int, num_chunks: int, chunk_tokens: int) -> torch.Tensor:
        return self.gather(block_ids, first_token, num_chunks, chunk_tokens)

    def fill(
        self,
        snapshot: torch.Tensor,
        numbers: Sequence[int],
        arena: ArenaView,
        frames: Sequence[int],
        is_wanted: Callable[[], bool],
    ) -> list[int | None]:
        return [
            _write_object(memoryview(snapshot[number].numpy()), arena, frame) if is_wanted() else None
            for number, frame in zip(numbers, frames, strict=True)
        ]

    def fence(self) -> None:
        """Nothing: what the engine has launched has run."""

    def open_load(self, arena: ArenaView, load: LoadOp, fence: None) -> "CpuLoadRun":
        return CpuLoadRun(self, self._layout, self._shard, arena, load)

    def read_keys(self, layer: int, block_ids: Sequence[int], num_tokens: int) -> torch.Tensor:
        return self._layers[layer][0].read(torch.tensor(block_ids))[:, :num_tokens].view(self._kv_dtype)

    def stop(self) -> None:
        """Nothing is held."""

    def gather(self, block_ids: Sequence[int], first_token: int, num_chunks: int, chunk_tokens: int) -> torch.Tensor:
        """Return the chunks that `snapshot` describes: uint8 `[num_chunks, shard_bytes]`."""
        shards = torch.empty(num_chunks, self.shard_bytes(chunk_tokens), dtype=torch.uint8)
        rows = self._as_rows(shards, chunk_tokens)
        blocks, end_token = torch.tensor(block_ids), first_token + num_chunks * chunk_tokens
        for layer, halves in enumerate(self._layers):
            for half, paged in enumerate(halves):
                read = paged.read(blocks)[:, first_token:end_token].unflatten(1, (num_chunks, chunk_tokens))
                rows[:, :, layer, :, half] = read.transpose(0, 1)
        return shards

    def scatter(
        self,
        shards: torch.Tensor,
        chunk_tokens: int,
        skip_tokens: int,
        block_ids: Sequence[int],
        first_token: int,
        num_tokens: int,
    ) -> None:
        """Copy tokens of consecutive chunks into paged blocks; visible to the engine when this returns.

        Args:
            shards: uint8 `[num_chunks, shard_bytes]`.
            chunk_tokens: tokens a chunk.
            skip_tokens: tokens at the start of the first chunk that are not wanted.
            block_ids: consecutive blocks of one request.
            first_token: where the first wanted token goes, counted from the start of the first block.
            num_tokens: how many tokens to write. No other slot is touched.
        """
        rows = self._as_rows(shards, chunk_tokens)
        for piece in _pieces(block_ids, self._block_tokens, first_token, chunk_tokens, skip_tokens, num_tokens):
            part = rows[piece.chunk, :, :, piece.token : piece.token + piece.num_tokens]
            for layer, halves in enumerate(self._layers):
                for half, paged in enumerate(halves):
                    paged.write(piece, part[:, layer, :, half])

    def rotate(self, shards: torch.Tensor, chunk_tokens: int, shift: int) -> None:
        """Turn the K rows of `shards`, uint8 `[num_chunks, shard_bytes]`, into those of tokens `shift` further on."""
        assert self.rotary is not None, "chunks are only shifted once it is known how keys are rotated"
        keys = self._as_rows(shards, chunk_tokens)[..., 0, :]
        keys.copy_(as_integers(rotate(keys.view(self._kv_dtype), shift, self.rotary)))

    def _as_rows(self, shards: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
        """Return a view of `shards`: `[chunks, heads, layers, tokens, 2, head_size]`, integers."""
        return shards.view(self._dtype).view(
            shards.shape[0], self._num_heads, len(self._layers), chunk_tokens, 2, self._head_size
        )


class CpuLoadRun(LoadRun):
    """Carries out each group before `push` returns."""

    def __init__(self, engine: CpuCopyEngine, layout: KVLayout, wanted: Shard, arena: ArenaView, load: LoadOp) -> None:
        self._engine, self._load = engine, load
        self._reader = ShardReader(arena, layout, wanted, load.tilings, load.chunk_tokens)
        self._num_good = 0
        self._corrupt_key: bytes | None = None

    @property
    def corrupt_key(self) -> bytes | None:
        return self._corrupt_key

    def push(self, group: Sequence[ChunkSource]) -> None:
        if self._corrupt_key is not None:
            return
        load = self._load
        shards = torch.empty(len(group), self._engine.shard_bytes(load.chunk_tokens), dtype=torch.uint8)
        num_good = self._read(group, shards)
        if load.shift:
            self._engine.rotate(shards[:num_good], load.chunk_tokens, load.shift)
        group_start = (load.first_chunk + self._num_good) * load.chunk_tokens + load.shift
        start, end = max(load.start, group_start), min(load.end, group_start + num_good * load.chunk_tokens)
        if end > start:
            self._engine.scatter(shards, load.chunk_tokens, start - group_start, load.block_ids, start, end - start)
        self._num_good += num_good

    def finish(self) -> int:
        return self._num_good

    def _read(self, group: Sequence[ChunkSource], shards: torch.Tensor) -> int:
        """Copy and verify the chunks of `group`; return how many, from the first on, are good."""
        for number, chunk in enumerate(group):
            if not self._reader.read(chunk, memoryview(shards[number].numpy())):
                self._corrupt_key = chunk.key
                return number
        return len(group)
