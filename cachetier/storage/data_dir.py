"""The data directory: who may use it, its secret, and which format it has.

lock             flock of the process that uses the directory; holds its pid
meta.json        {"format", "chunk_tokens", "segment_bytes", "check"}
secret           32 random bytes and their XXH64: chain keys are made with it
namespaces.txt, documents.log, index/, segments/   see namespaces.py, documents.py, index.py, segments.py
server.json      {"pid", "socket", "instance"} while a server answers
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import stat
from collections.abc import Iterator

import xxhash

from cachetier.core.config import GIB, MIB, ServerConfig
from cachetier.core.errors import ConfigError, FormatError, InUseError, StorageError
from cachetier.core.keys import FORMAT_VERSION, SECRET_BYTES
from cachetier.core.layout import PAGE_BYTES
from cachetier.storage.file_layer import FileLayer, read_file, replace_file
from cachetier.storage.index import IndexSettings

_INDEX_BYTES_MIN = 4 * MIB
_INDEX_SHARE = 32
# About four million chunks: 1 TiB of 256 KiB each. A new index is filled with zeros at the first start, and a private
# server has to answer within twenty seconds: 4 GiB take a few of them, 32 GiB (the share of 1 TiB) half a minute.
_INDEX_BYTES_MAX = 4 * GIB
# Twice what documents.log may have, for the copy that replaces it: 1 GiB is a million documents of 1 KiB each.
_DOCUMENTS_SHARE = 64
_DOCUMENTS_BYTES_MAX = 2 * GIB
_REST_BYTES = MIB  # lock, meta.json, secret, namespaces.txt, server.json
_log = logging.getLogger(__name__)


class DataDir:
    """A data directory that this process has locked.

    Attributes:
        path: real path of the folder.
        secret: 32 bytes for `ChainHasher`.
    """

    def __init__(self, path: str, lock: int) -> None:
        """Take over a folder whose lock is held; `open` is the way to open one."""
        self.path = path
        self._lock = lock
        self.secret = b""

    @classmethod
    def open(cls, config: ServerConfig) -> "DataDir":
        """Make the folder if need be, lock it and read its secret.

        Raises:
            StorageError: others can read it, or it is unusable.
            InUseError: another process has locked it; the text names its pid.
            FormatError: it has another format version, or was made for another number of tokens a chunk.
            ConfigError: `secret_file` is unusable, or has another secret than the folder.
        """
        try:
            path = _make_folder(config.data_dir)
            data_dir = cls(path, _lock(path))
            try:
                _check_meta(path, config)
                data_dir.secret = _read_secret(path, config.secret_file)
                for name in ("index", "segments"):
                    os.makedirs(os.path.join(path, name), mode=0o700, exist_ok=True)
            except BaseException:
                os.close(data_dir._lock)
                raise
            return data_dir
        except OSError as error:
            raise StorageError(f"the data directory {config.data_dir} cannot be used: {error}") from error

    def publish(self, instance: str, socket: str) -> None:
        """Write `server.json`: the server answers now."""
        text = json.dumps({"pid": os.getpid(), "socket": socket, "instance": instance})
        replace_file(FileLayer(), os.path.join(self.path, "server.json"), text.encode())

    def arena_path(self) -> str:
        """Return where this directory's arena lies: in shared memory, named after user and folder."""
        name = f"cachetier-{os.getuid()}-{xxhash.xxh64_hexdigest(self.path.encode())}.arena"
        return os.path.join("/dev/shm", name)

    def close(self) -> None:
        """Remove `server.json` and give the lock back."""
        server = os.path.join(self.path, "server.json")
        if os.path.exists(server):
            os.unlink(server)
        os.close(self._lock)


@contextlib.contextmanager
def lock_existing(path: str) -> Iterator[tuple[str, int]]:
    """Lock a data directory that exists, and give its real path and its tokens a chunk.

    Raises:
        InUseError: another process has locked it.
        StorageError: it is no data directory.
        FormatError: it has another format version.
    """
    meta = _read_meta(path) if os.path.isdir(path) else None
    if meta is None:
        raise StorageError(f"{path} is no data directory: it has no intact meta.json")
    _check_version(path, meta)
    descriptor = _lock(os.path.realpath(path))
    try:
        yield os.path.realpath(path), meta["chunk_tokens"]
    finally:
        os.close(descriptor)


def disk_shape(config: ServerConfig) -> IndexSettings:
    """Return how the size limit is divided: index, segments, and a little for documents and the rest.

    A directory keeps the segment size it was made with.

    Raises:
        ConfigError: the limit has no room for two segments of this directory.
    """
    meta = _read_meta(config.data_dir)
    segment_bytes = (meta and meta["segment_bytes"]) or config.segment_bytes
    share_bytes = config.disk_bytes // _INDEX_SHARE // PAGE_BYTES * PAGE_BYTES
    index_bytes = min(max(_INDEX_BYTES_MIN, share_bytes), _INDEX_BYTES_MAX)
    other_bytes = index_bytes + 2 * documents_bytes(config) + _REST_BYTES
    num_segments = (config.disk_bytes - other_bytes) // segment_bytes
    if num_segments < 2:
        least = other_bytes + 2 * segment_bytes
        raise ConfigError(f"disk_bytes is {config.disk_bytes}; this directory's segments need at least {least}")
    return IndexSettings(
        limit_bytes=index_bytes,
        segment_bytes=segment_bytes,
        num_segments=num_segments,
        chunk_tokens=config.chunk_tokens,
    )


def documents_bytes(config: ServerConfig) -> int:
    """Return how large `documents.log` may get."""
    return min(config.disk_bytes // _DOCUMENTS_SHARE, _DOCUMENTS_BYTES_MAX) // 2


def _make_folder(path: str) -> str:
    os.makedirs(path, mode=0o700, exist_ok=True)
    path = os.path.realpath(path)
    status = os.stat(path)
    if status.st_uid != os.getuid():
        raise StorageError(f"the data directory {path} belongs to another user")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise StorageError(f"others can access the data directory {path}, which holds prompts; run: chmod 700 {path}")
    return path


def _lock(path: str) -> int:
    descriptor = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise InUseError(f"the data directory {path} is in use by process {pid or 'unknown'}") from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def _read_meta(path: str) -> dict[str, int] | None:
    """Return what meta.json says; None: there is none, or a flipped bit made it unreadable."""
    try:
        meta = json.loads(read_file(FileLayer(), os.path.join(path, "meta.json")))
        return meta if meta.pop("check") == _check_of(meta) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _check_of(meta: dict[str, int]) -> str:
    return str(xxhash.xxh64_hexdigest(json.dumps(meta, sort_keys=True).encode()))


def _check_version(path: str, meta: dict[str, int]) -> None:
    if meta.get("format") != FORMAT_VERSION:
        raise FormatError(
            f"the data directory {path} has format version {meta.get('format')}; this program reads and writes "
            f"version {FORMAT_VERSION}: use the program that made it, or another directory"
        )


def _check_meta(path: str, config: ServerConfig) -> None:
    wanted = {"format": FORMAT_VERSION, "chunk_tokens": config.chunk_tokens, "segment_bytes": config.segment_bytes}
    meta = _read_meta(path)
    if meta:
        _check_version(path, meta)
        if meta["chunk_tokens"] != config.chunk_tokens:
            raise FormatError(
                f"the data directory {path} was made with chunk_tokens={meta['chunk_tokens']}, not "
                f"{config.chunk_tokens}: change the setting, or use another directory"
            )
        wanted["segment_bytes"] = meta["segment_bytes"] or config.segment_bytes
    if meta != wanted:
        text = json.dumps({**wanted, "check": _check_of(wanted)})
        replace_file(FileLayer(), os.path.join(path, "meta.json"), text.encode())


def _read_secret(path: str, given_file: str) -> bytes:
    """Return the secret, a new or given one at first; a damaged one is replaced, what was stored under it is lost."""
    given = _given_secret(given_file) if given_file else b""
    file = os.path.join(path, "secret")
    data = read_file(FileLayer(), file)
    secret = data[:SECRET_BYTES]
    if len(data) == SECRET_BYTES + 8 and data[SECRET_BYTES:] == xxhash.xxh64_digest(secret):
        if given and given != secret:
            raise ConfigError(
                f"the data directory {path} was made with another secret than that in secret_file {given_file}, with "
                "which nothing in it could be found: use the file that it was made with, or another data directory"
            )
        return secret
    if data:
        _log.warning("the secret in %s is damaged: starting with an empty cache", path)
    secret = given or secrets.token_bytes(SECRET_BYTES)
    replace_file(FileLayer(), file, secret + xxhash.xxh64_digest(secret))
    return secret


def _given_secret(path: str) -> bytes:
    try:
        with open(path, encoding="ascii") as file:
            secret = bytes.fromhex(file.read())
    except (OSError, ValueError) as error:
        raise ConfigError(f"secret_file {path}: {error}") from error
    if len(secret) != SECRET_BYTES:
        raise ConfigError(
            f"secret_file {path} must hold {2 * SECRET_BYTES} hexadecimal digits; make one with `openssl rand -hex 32`"
        )
    return secret
