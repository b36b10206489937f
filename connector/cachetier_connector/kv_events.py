"""What the node's tier holds, told to routers as vLLM's KV events.

A thread with a link of its own, so that whatever becomes of it, matches do not wait, asks the server what changed and
turns that into vLLM's events; `take` runs on the scheduler's thread, in every step. An engine without steps publishes
nothing, so events wait here, and when many do, the server is asked for no more until they are taken.

A chunk is published as blocks of the engine's size, because routers drop blocks of any other; where blocks are larger
than chunks, as one block of the chunk's size. The hash of a chunk's last block is the chain key, so that the next chunk
names it as parent; those of the blocks before it are derived from the key, so that the key alone can remove them.
"""

import logging
import threading
from array import array
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import xxhash

from cachetier.core.event_messages import Change, FollowChanges, FollowChangesReply
from cachetier.core.keys import ModelIdentity
from cachetier.core.messages import TIER_DISK, TIER_HOST
from cachetier_connector.facts import EngineFacts
from cachetier_connector.link import ServerLink

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVCacheEvent

INTERVAL_S = 0.5
MORE_INTERVAL_S = 0.02  # so long the rest of the engine's process has its turn
CALL_TIMEOUT_S = 5.0
WAITING_MAX = 8192  # events that no step has taken yet
PUBLISHED_MAX = 1 << 20  # chunks; what comes beyond is not published
CHUNKS_PER_EVENT = 256
MEDIA = {TIER_HOST: "CPU", TIER_DISK: "STORAGE"}  # the words of vLLM's own tiers

log = logging.getLogger(__name__)


class TierEvents:
    """Follows the tier's changes while the engine publishes KV events; else does nothing."""

    def __init__(self, link: ServerLink, facts: EngineFacts, identity: ModelIdentity) -> None:
        """Do nothing yet.

        Args:
            link: used by the thread alone from now on.
            facts: of the engine.
            identity: of the model without an adapter.
        """
        self._link, self._facts, self._identity = link, facts, identity
        self._tiers: dict[bytes, set[int]] = {}  # of the chunks that are published now
        self._chunk_tokens = 0  # of these; another server may have another size
        self._waiting: deque[KVCacheEvent] = deque()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cachetier-events", daemon=True)

    def start(self) -> None:
        """Start the thread if the engine publishes events."""
        if self._facts.publishes_events:
            self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(CALL_TIMEOUT_S)

    def take(self) -> "list[KVCacheEvent]":
        """Return what is to be published, in order."""
        return [self._waiting.popleft() for _ in range(len(self._waiting))]

    def start_generation(self, generation: int) -> None:
        """From now on the engine has weights of another generation, and what is held of others' is of no use to it."""
        self._identity = msgspec.structs.replace(self._identity, generation=generation)

    def ask(self) -> bool:
        """Ask once what changed (on the thread); return whether there is more to be asked for at once."""
        if len(self._waiting) > WAITING_MAX or not self._link.probe() or (server := self._link.server) is None:
            return False
        namespace = self._link.namespace(self._identity, [self._facts.layout], CALL_TIMEOUT_S)
        if namespace is None:
            return False
        reply: FollowChangesReply | None = self._link.call(
            lambda session: FollowChanges(session=session, namespace=namespace), CALL_TIMEOUT_S
        )
        if reply is None:
            return False
        if reply.starts_anew:  # one by one, and not by AllBlocksCleared, which is of the engine's own blocks too
            gone = [Change(key, tier) for tier in MEDIA for key, tiers in self._tiers.items() if tier in tiers]
            self._publish(gone)
            self._chunk_tokens = server.chunk_tokens
        self._publish(reply.changes)
        return reply.has_more

    def _run(self) -> None:
        pause_s = 0.0
        while not self._stopping.wait(pause_s):
            pause_s = INTERVAL_S
            try:
                pause_s = MORE_INTERVAL_S if self.ask() else INTERVAL_S
            except Exception:  # the thread's boundary
                log.exception("cachetier: KV events of the tier could not be published")
        self._link.close()

    def _publish(self, changes: Sequence[Change]) -> None:
        """Queue events for what is news, chunks that follow one another in one event."""
        runs: list[list[Change]] = []
        for change in changes:
            if self._is_news(change):
                if runs and _continues(runs[-1], change):
                    runs[-1].append(change)
                else:
                    runs.append([change])
        chunk_tokens, block_tokens = self._chunk_tokens, self._facts.block_tokens
        if runs and chunk_tokens % block_tokens:
            block_tokens = chunk_tokens
        self._waiting.extend(_event_of(run, chunk_tokens, block_tokens) for run in runs)

    def _is_news(self, change: Change) -> bool:
        """Note a change; tell whether routers do not know it yet and can use it.

        They cannot place a block whose parent is unknown to them; nor could an engine load it.
        """
        tiers = self._tiers.get(change.key)
        if (tiers is not None and change.tier in tiers) == bool(change.tokens):
            return False
        if not change.tokens:
            assert tiers is not None
            tiers.discard(change.tier)
            if not tiers:
                del self._tiers[change.key]
        elif tiers is not None:
            tiers.add(change.tier)
        elif (change.parent and change.parent not in self._tiers) or len(self._tiers) >= PUBLISHED_MAX:
            return False
        else:
            self._tiers[change.key] = {change.tier}
        return True


def _continues(run: Sequence[Change], change: Change) -> bool:
    last = run[-1]
    if change.tier != last.tier or bool(change.tokens) != bool(last.tokens) or len(run) == CHUNKS_PER_EVENT:
        return False
    return not change.tokens or change.parent == last.key


def _event_of(run: Sequence[Change], chunk_tokens: int, block_tokens: int) -> "KVCacheEvent":
    from vllm.distributed.kv_events import BlockRemoved, BlockStored

    first, num_blocks = run[0], chunk_tokens // block_tokens
    hashes = [block_hash for change in run for block_hash in block_hashes(change.key, num_blocks)]
    if not first.tokens:
        return BlockRemoved(block_hashes=hashes, medium=MEDIA[first.tier])
    return BlockStored(
        block_hashes=hashes,
        parent_block_hash=block_hashes(first.parent, 1)[0] if first.parent else None,
        token_ids=array("i", b"".join(change.tokens for change in run)).tolist(),
        block_size=block_tokens,
        lora_id=None,
        medium=MEDIA[first.tier],
        lora_name=None,
    )


def block_hashes(key: bytes, num_blocks: int) -> list[Any]:
    """Return the hashes by which the blocks of the chunk `key` are published, in the form that vLLM is set to."""
    from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash

    derived = [xxhash.xxh3_128_digest(key + number.to_bytes(2, "little")) for number in range(1, num_blocks)]
    return [maybe_convert_block_hash(BlockHash(each)) for each in (*derived, key)]
