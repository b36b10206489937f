"""The matches that wait for chunks which are pending or promised, engine by engine.

Pure bookkeeping; the caller holds the store's lock. A wait belongs to its match's lease and ends with it, so there are
never more waits than leases.
"""

from collections.abc import Iterable

from cachetier.core.messages import Wait
from cachetier.store.leases import Lease
from cachetier.store.prompt import Prompt


class ChunkWait:
    """A match that waits.

    Attributes:
        number: what its engine calls it.
        engine: whose it is.
        prompt: what was matched, and how far it is held by now.
        num_held: how many chunks were held at the match.
        for_promised: whether promised chunks are waited for, not only pending ones.
        promised_by_s: until this clock time the rest of the prompt counts as promised by the engine that computes it.
        is_looked_at: a thread is about to lease what is held of it now.
    """

    __slots__ = ("engine", "for_promised", "is_looked_at", "num_held", "number", "promised_by_s", "prompt")

    def __init__(self, asked: Wait, engine: str, prompt: Prompt, promised_by_s: float) -> None:
        self.number = asked.number
        self.engine = engine
        self.prompt = prompt
        self.num_held = len(prompt.held)
        self.for_promised = asked.for_promised
        self.promised_by_s = promised_by_s
        self.is_looked_at = False


class WaitTable:
    """All waits that have begun and not ended."""

    def __init__(self) -> None:
        self._of_lease: dict[int, ChunkWait] = {}
        self._leases: dict[ChunkWait, Lease] = {}
        self._of_engine: dict[str, dict[int, ChunkWait]] = {}

    def begin(self, wait: ChunkWait, lease: Lease) -> None:
        """Begin a wait, whose chunks `lease` is to gain."""
        assert lease.chunks is wait.prompt.held, "what is found later would belong to no lease"
        self._of_lease[lease.id], self._leases[wait] = wait, lease
        self._of_engine.setdefault(wait.engine, {})[lease.id] = wait

    def is_on(self, wait: ChunkWait) -> bool:
        """Tell whether a wait has not ended."""
        return wait in self._leases

    def begin_to_look(self, wait: ChunkWait) -> Lease | None:
        """Have the caller alone look what is held by now; return the wait's lease, None: it must not."""
        if wait.is_looked_at:
            return None
        wait.is_looked_at = wait in self._leases
        return self._leases.get(wait)

    def of_engine(self, engine: str) -> Iterable[ChunkWait]:
        """Return the waits of an engine."""
        return list(self._of_engine.get(engine, {}).values())

    def end(self, lease_id: int) -> None:
        """End the wait of a lease, if there is one."""
        wait = self._of_lease.pop(lease_id, None)
        if wait is not None:
            del self._leases[wait]
            waits = self._of_engine[wait.engine]
            del waits[lease_id]
            if not waits:
                del self._of_engine[wait.engine]

    def check_integrity(self, lease_ids: Iterable[int]) -> None:
        """Raise AssertionError if a wait has outlived its lease, one of `lease_ids`, or the tables differ."""
        assert self._of_lease.keys() <= set(lease_ids), "a wait without a lease"
        by_engine = {lease: wait for waits in self._of_engine.values() for lease, wait in waits.items()}
        assert by_engine == self._of_lease, "a wait is not listed under its engine"
        assert {wait: lease.id for wait, lease in self._leases.items()} == {w: i for i, w in self._of_lease.items()}
