"""A router, for tests: what it knows of a node's tier it has from KV events alone."""

from collections import defaultdict
from typing import Any

import msgspec
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch


class Router:
    """A router as others are: it hashes tokens by itself and takes block hashes for names.

    It is less patient than those with blocks whose parent it does not know, or whose size is not its own, and with what
    the tier says twice. Of "GPU", which are vLLM's own blocks, there may be several with one text.
    """

    def __init__(self, block_tokens: int = 32) -> None:
        self.block_tokens = block_tokens
        self.text_of: dict[Any, tuple[int, ...]] = {None: ()}
        self.media: dict[tuple[int, ...], set[str]] = defaultdict(set)

    def learn(self, events: list[Any]) -> None:
        """Apply events that an engine published."""
        self.hear(msgspec.msgpack.encode(KVEventBatch(ts=0.0, events=events)))

    def hear(self, payload: bytes) -> None:
        """Apply a batch of events as it arrives."""
        for event in msgspec.msgpack.decode(payload, type=KVEventBatch).events:
            if isinstance(event, BlockRemoved):
                for name in event.block_hashes:
                    text = self.text_of[name]
                    assert event.medium in self.media[text] or event.medium == "GPU", "gone twice"
                    self.media[text].discard(event.medium)
                continue
            assert isinstance(event, BlockStored)
            assert event.block_size == self.block_tokens
            assert len(event.token_ids) == len(event.block_hashes) * event.block_size
            text = self.text_of[event.parent_block_hash]
            for number, name in enumerate(event.block_hashes):
                text += tuple(event.token_ids[number * event.block_size : (number + 1) * event.block_size])
                assert self.text_of.setdefault(name, text) == text, "one name for two texts"
                assert event.medium not in self.media[text] or event.medium == "GPU", "said twice"
                self.media[text].add(event.medium)

    def held(self, tokens: list[int], *media: str) -> int:
        """Return how many leading tokens of a prompt the engine's node has in any of `media`."""
        size = self.block_tokens
        ends = range(size, len(tokens) + 1, size)
        misses = (end - size for end in ends if self.media[tuple(tokens[:end])].isdisjoint(media))
        return next(misses, len(tokens) // size * size)
