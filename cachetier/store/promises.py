"""The promises of producers: which chunks that nobody holds yet will be stored soon, and by whom.

Pure bookkeeping; the caller holds the store's lock. A promise says nothing about bytes: all that it can cause is that
somebody waits for a chunk that does not come, and there are deadlines for that.

The promise of a chunk ends when the chunk is stored or dropped. What is left of a promise ends some time after its
request, with the session that made it, or after PROMISE_TTL_S. Where two engines promise a chunk, the later promise
counts. At most KEYS_MAX chunks are promised at a time; a promise that would exceed that is not made.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cachetier.core.keys import ChainKey
from cachetier.store.leases import Session

KEYS_MAX = 1 << 18
PROMISE_TTL_S = 600.0


@dataclass(slots=True, eq=False)
class _Promise:
    """`keys` are those of consecutive chunks from number `first` on; the promise ends at clock time `ends_at`."""

    session: int
    engine: str
    first: int
    keys: Sequence[ChainKey]
    ends_at: float


class PromiseTable:
    """All promises."""

    def __init__(self) -> None:
        self._promises: dict[int, _Promise] = {}
        self._of_key: dict[ChainKey, _Promise] = {}
        self._num_keys = 0
        self._last_id = secrets.randbits(52)

    def make(self, session: Session, keys: Sequence[ChainKey], first: int, now: float) -> int:
        """Note that the engine of `session` will store the chunks with `keys`; return the promise's id, 0: none."""
        if not keys or self._num_keys + len(keys) > KEYS_MAX:
            return 0
        self._last_id += 1
        promise = _Promise(session.id, session.engine, first, keys, now + PROMISE_TTL_S)
        self._promises[self._last_id] = promise
        self._of_key.update(dict.fromkeys(keys, promise))
        self._num_keys += len(keys)
        return self._last_id

    def is_made(self, key: ChainKey, *, not_by: str) -> bool:
        """Tell whether an engine other than `not_by` has promised the chunk with `key`."""
        promise = self._of_key.get(key)
        return promise is not None and promise.engine != not_by

    def settle(self, key: ChainKey) -> None:
        """End the promise of one chunk: it is stored, or will not be."""
        self._of_key.pop(key, None)

    def end(self, session: int, promise_id: int, num_chunks: int, ends_at: float) -> None:
        """End a promise but for the chunks before number `num_chunks`; theirs ends at `ends_at` at the latest."""
        promise = self._promises.get(promise_id)
        if promise is None or promise.session != session:
            return
        num_left = max(0, num_chunks - promise.first)
        self._forget(promise, promise.keys[num_left:])
        promise.keys, promise.ends_at = promise.keys[:num_left], min(promise.ends_at, ends_at)
        if not num_left:
            del self._promises[promise_id]

    def end_session(self, session: int) -> None:
        """End the promises of a session that has ended."""
        self._drop([number for number, promise in self._promises.items() if promise.session == session])

    def expire(self, now: float, is_open: Callable[[int], bool]) -> None:
        """End the promises whose time is over, and those of sessions that are not open any more."""
        self._drop(
            [
                number
                for number, promise in self._promises.items()
                if promise.ends_at <= now or not is_open(promise.session)
            ]
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if chunks and promises contradict each other."""
        assert self._num_keys == sum(len(promise.keys) for promise in self._promises.values()) <= KEYS_MAX
        promises = set(self._promises.values())
        assert all(promise in promises for promise in self._of_key.values()), "a chunk of a promise that has ended"

    def _drop(self, promise_ids: list[int]) -> None:
        for promise_id in promise_ids:
            promise = self._promises.pop(promise_id)
            self._forget(promise, promise.keys)

    def _forget(self, promise: _Promise, keys: Sequence[ChainKey]) -> None:
        self._num_keys -= len(keys)
        for key in keys:
            if self._of_key.get(key) is promise:
                del self._of_key[key]
