"""The journal of `cachetier warm`: which prompts were answered, so that an interrupted run goes on where it stopped.

An append-only text file: a title line, then one line of 32 hexadecimal digits for each answered prompt (the digest of
model and content). Every line is written at once, so a kill loses nothing; it is synced about once a second, so a
power failure costs a second of repeated prompts, which are hits. A torn last line is cut off, other bad lines are
ignored. One process at a time holds it (flock). Used by the event loop's thread alone.
"""

import fcntl
import os
import stat
import time

from cachetier.core.errors import ConfigError, StorageError

_TITLE = b"cachetier warm journal 1\n"
_DIGEST_BYTES = 16
SYNC_INTERVAL_S = 1.0


class Journal:
    """Digests of the prompts that need not be sent again; about 100 bytes of memory each."""

    def __init__(self, path: str, *, resume: bool) -> None:
        """Open or make the journal at `path`; without `resume` forget what it says.

        Raises:
            ConfigError: the file is no journal, cannot be written, or another process uses it.
        """
        self._path = path
        self._synced_at = time.monotonic()
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o700, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"journal: {error}") from error
        try:
            self._done = self._load(resume)
        except BaseException:
            os.close(self._file)
            raise
        self.num_resumed = len(self._done)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._done

    def add(self, digest: bytes) -> None:
        """Note that the prompt with `digest` was answered.

        Raises:
            StorageError: it cannot be written, because the disk is full for example.
        """
        if digest in self._done:
            return
        self._done.add(digest)
        now = time.monotonic()
        try:
            os.write(self._file, digest.hex().encode() + b"\n")
            if now - self._synced_at >= SYNC_INTERVAL_S:
                os.fdatasync(self._file)
                self._synced_at = now
        except OSError as error:
            raise StorageError(f"journal {self._path}: {error}") from error

    def close(self, *, remove: bool) -> None:
        """Sync and close; `remove` deletes the file, for a run that has nothing left to resume."""
        if remove:
            os.unlink(self._path)
        else:
            os.fdatasync(self._file)
        os.close(self._file)

    def _load(self, resume: bool) -> set[bytes]:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"journal {self._path}: another warm-up is using it") from error
        is_file = stat.S_ISREG(os.fstat(self._file).st_mode)
        with open(self._file, "rb", closefd=False) as file:
            data = file.read() if is_file else b"?"
        if not data.startswith(_TITLE) and not _TITLE.startswith(data):
            raise ConfigError(f"journal {self._path}: this file is something else; name another one")
        if not resume or len(data) < len(_TITLE):
            os.ftruncate(self._file, 0)
            os.write(self._file, _TITLE)
            return set()
        os.ftruncate(self._file, data.rindex(b"\n") + 1)
        lines = data[len(_TITLE) :].split(b"\n")[:-1]
        return {digest for line in lines if (digest := _parse(line))}


def _parse(line: bytes) -> bytes | None:
    try:
        digest = bytes.fromhex(line.decode("ascii"))
    except ValueError:
        return None
    return digest if len(digest) == _DIGEST_BYTES else None
