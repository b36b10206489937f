"""What an engine asks of the server to tell routers what its node's tier holds: the changes, one after the other."""

import msgspec

from cachetier.core.message_base import Message


class FollowChanges(Message, frozen=True):
    """Ask what changed since this session asked last; at the first time, what is held.

    Attributes:
        namespace: whose chunks; to ask for another one is to begin anew.
    """

    session: int
    namespace: bytes


class Change(msgspec.Struct, frozen=True, array_like=True):
    """A chunk that is in a tier from now on, or not any more. It may be said twice.

    Attributes:
        key: its chain key.
        tier: TIER_HOST or TIER_DISK.
        tokens: little-endian int32; empty: the chunk has gone.
        parent: chain key of the chunk before it; empty for a chain's first chunk, and for one that has gone.
    """

    key: bytes
    tier: int
    tokens: bytes = b""
    parent: bytes = b""


class FollowChangesReply(Message, frozen=True):
    """Chunks of texts without a salt, images or sounds, in the order in which things happened.

    Attributes:
        starts_anew: everything said before is void, and what is held is said from here on.
        has_more: there is more to be said at once.
    """

    changes: list[Change]
    starts_anew: bool
    has_more: bool
