"""What engines and the server say to each other about chunks that are not held yet: promised, pending, waited for."""

from cachetier.core.message_base import Message
from cachetier.core.messages import MatchReply

AWAIT_MAX_S = 5.0


class AwaitChunks(Message, frozen=True):
    """Ask what has become of the chunks that this engine's matches wait for; answered once there is news.

    Sessions of one engine share its waits, so a thread of its own can ask, over a connection of its own.

    Attributes:
        within_s: answer after so long at the latest, with no news then; at most `AWAIT_MAX_S`.
    """

    session: int
    within_s: float


class ChunkNews(Message, frozen=True):
    """More of what a match waits for is held, or nothing more will come.

    Attributes:
        number: of the wait.
        match: the match's reply as it would be now, with the chunks that its lease has gained. Where `num_pending` is
            0 the wait is over. No copies in device memory are ordered for what was waited for.
    """

    number: int
    match: MatchReply


class AwaitChunksReply(Message, frozen=True):
    """The news, each told once."""

    news: list[ChunkNews]


class EndPromise(Message, frozen=True):
    """Say that a promised prompt is not computed any further. An unknown promise is ignored.

    Attributes:
        promise: its id.
        num_chunks: leading chunks of the prompt that were handed over to be stored; the promise of others ends now.
        within_s: how long storing may take; then the promise of these ends as well.
    """

    session: int
    promise: int
    num_chunks: int
    within_s: float
