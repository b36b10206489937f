"""Where registered documents may stand in a prompt, at any offset: a rolling hash of every window of its tokens.

A fingerprint is the hash of a document's first chunk. It only proposes: the server compares tokens before it claims a
document. Servers keep fingerprints and engines of all versions compare them, so the formula must not change. A
`FingerprintSet` is immutable and may be used on any thread.

The hash of tokens `t[0] .. t[w-1]` is `sum(mix(t[k]) * BASE**k)` modulo 2**64 (Rabin and Karp's polynomial). With sums
of `mix(t[j]) * BASE**j` from the start of the prompt, a window's is a difference of two of them, divided by the power
that it starts with; an odd number has an inverse modulo 2**64. Tokens are mixed first by the finaliser of SplitMix64
(Steele, Lea and Flood 2014), since sums of small numbers would collide.
"""

import numpy as np
import numpy.typing as npt

BASE = 0xD1342543DE82EF95  # Steele and Vigna 2021, a multiplier that disturbs its high bits well
INVERSE_BASE = pow(BASE, -1, 2**64)
TABLE_BYTES_MIN = 1024
TABLE_BYTES_A_FINGERPRINT = 16  # at most one window in 16 of other texts passes the table

Tokens = npt.NDArray[np.int32]
Hashes = npt.NDArray[np.uint64]


def fingerprints(tokens: Tokens, window: int) -> Hashes:
    """Return the hash of every window.

    Args:
        tokens: int32 `[n]`.
        window: tokens a window, at least 1.

    Returns:
        uint64 `[max(0, n - window + 1)]`, in the order of the windows' starts.
    """
    count = len(tokens) - window + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    sums = np.zeros(len(tokens) + 1, np.uint64)
    np.cumsum(_mix(tokens) * _powers(BASE, len(tokens)), out=sums[1:])
    return (sums[window:] - sums[:count]) * _powers(INVERSE_BASE, count)


class FingerprintSet:
    """The fingerprints of registered documents, to be looked for in prompts."""

    def __init__(self, packed: bytes) -> None:
        """Take fingerprints as `SyncDocumentsReply` packs them: ascending, little-endian, 64 bits each."""
        self._sorted: Hashes = np.frombuffer(packed, "<u8").astype(np.uint64)
        bits = max(TABLE_BYTES_MIN, TABLE_BYTES_A_FINGERPRINT * len(self._sorted)).bit_length()
        self._shift = np.uint64(64 - bits)
        self._is_head = np.zeros(1 << bits, np.bool_)  # by the high bits, which are the best mixed
        self._is_head[self._sorted >> self._shift] = True

    def __len__(self) -> int:
        return len(self._sorted)

    def candidates(self, tokens: Tokens, window: int, start: int = 0) -> list[tuple[int, int]]:
        """Find windows with a registered fingerprint.

        Args:
            tokens: int32 `[n]`, the whole prompt.
            window: tokens a window, the chunk size that documents were registered with.
            start: windows before it are not looked at.

        Returns:
            (offset of the window in the prompt, fingerprint), ascending.
        """
        if not len(self):
            return []
        hashes = fingerprints(tokens[start:], window)
        (offsets,) = np.nonzero(self._is_head[hashes >> self._shift])
        found = hashes[offsets]
        places = np.searchsorted(self._sorted, found)
        is_equal = self._sorted.take(places, mode="clip") == found
        return list(zip((offsets[is_equal] + start).tolist(), found[is_equal].tolist(), strict=True))


def _mix(tokens: Tokens) -> Hashes:
    """Return the tokens as 64 random-looking bits each, the same for the same token."""
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _powers(base: int, count: int) -> Hashes:
    """Return `base**0 .. base**(count - 1)` modulo 2**64, for a `count` of at least 1."""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)
