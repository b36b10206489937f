"""The checksum of an object: XXH64 over the XXH64 digests of its 4 KiB pages (seed 0).

Pages are digested on their own so that a GPU can do it in parallel and so that a reader of a part of an object
verifies that part: the digests lie behind the object in its frame, and the checksum vouches for the digests.
"""

import struct

import xxhash

from cachetier.core.layout import DIGEST_BYTES, PAGE_BYTES, num_pages


def page_digests(payload: memoryview) -> bytes:
    """Return the XXH64 digests of the 4 KiB pages of `payload`, 8 little-endian bytes each; the last may be short."""
    digest = xxhash.xxh64_intdigest
    values = [digest(payload[start : start + PAGE_BYTES]) for start in range(0, len(payload), PAGE_BYTES)]
    return struct.pack(f"<{len(values)}Q", *values)


def checksum_of(digests: bytes | memoryview) -> int:
    """Return the checksum of the object whose page digests are given."""
    return xxhash.xxh64_intdigest(digests)


def object_checksum(payload: memoryview) -> int:
    """Return the checksum of the object `payload`."""
    return checksum_of(page_digests(payload))


def pages_match(part: memoryview, digests: bytes | memoryview, first_page: int) -> bool:
    """Tell whether `part`, an object's pages from `first_page` on, has the digests listed in the object's `digests`."""
    start = first_page * DIGEST_BYTES
    return page_digests(part) == digests[start : start + num_pages(len(part)) * DIGEST_BYTES]


def digests_match(digests: bytes | memoryview, object_bytes: int, checksum: int) -> bool:
    """Tell whether `digests` (exactly those of an object of `object_bytes`) are what `checksum` vouches for."""
    return len(digests) == num_pages(object_bytes) * DIGEST_BYTES and checksum_of(digests) == checksum
