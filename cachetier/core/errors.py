"""The exception tree of cachetier.

    CachetierError
    +-- ConfigError        a setting is unknown, malformed or impossible; the text names the allowed values
    +-- ProtocolError      a message does not decode, has another version, or asks for something impossible
    +-- UnavailableError   the server cannot be reached or did not answer in time
    +-- StorageError       the data directory cannot be used
        +-- InUseError     another process holds it
        +-- FormatError    it was written by another version of the on-disk format, or is not ours

A miss, a full tier, a bad checksum and a chunk that is still being stored are outcomes, not exceptions.
"""


class CachetierError(Exception):
    """Base of everything that cachetier raises on purpose."""


class ConfigError(CachetierError):
    """A setting is unknown, malformed or impossible; the text names what is allowed."""


class ProtocolError(CachetierError):
    """A message does not decode against its schema or asks for something impossible (HTTP 4xx).

    Attributes:
        status: the HTTP status that tells the sender what kind of mistake it is.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class UnavailableError(CachetierError):
    """The server cannot be reached or did not answer within the deadline."""


class StorageError(CachetierError):
    """The data directory or the arena cannot be used; the text says what to do."""


class InUseError(StorageError):
    """Another process holds the data directory; the text names its pid."""


class FormatError(StorageError):
    """The data directory was written by another version of the format, or holds something else."""
