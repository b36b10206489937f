"""Values as objects in an S3-compatible store, one object a chunk, through obstore.

Blocking calls on a pool of threads, because a batch is many requests. Endpoint, region and credentials come from the
usual environment variables (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY).

Bytes are copied twice on their way, once by obstore: this is the slow and durable store, and the network is slower.
"""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar
from urllib.parse import SplitResult

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import S3Store as Bucket

from cachetier.core.errors import ConfigError
from cachetier.remote.base import FrameMemory, Head, Outcome, Place, RemoteStore, Value

CONNECTIONS = 32
CONNECT_TIMEOUT_S = 1
REQUEST_TIMEOUT_S = 5

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Answer = TypeVar("Answer")


def open_store(url: SplitResult, memory: FrameMemory) -> "S3Store":
    """Return the store of s3://BUCKET/PREFIX.

    Raises:
        ConfigError: the environment variables or the URL are impossible.
    """
    if url.query or url.fragment:
        raise ConfigError(f"remote is {url.geturl()!r}; s3://BUCKET/PREFIX takes no parameters")
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT") or ""
    try:
        bucket = Bucket(
            url.netloc,
            prefix=url.path.strip("/") or None,
            client_options={
                "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
                "timeout": timedelta(seconds=REQUEST_TIMEOUT_S),
                "allow_http": endpoint.startswith("http://"),
            },
            # The breaker decides when to try again; here it would only make the failure late.
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=REQUEST_TIMEOUT_S)},
        )
    except BaseError as error:
        raise ConfigError(f"remote {url.geturl()}: {error}") from error
    return S3Store(bucket, memory)


class S3Store(RemoteStore):
    """A bucket, or a folder in it."""

    def __init__(self, bucket: Bucket, memory: FrameMemory) -> None:
        self._bucket = bucket
        self._memory = memory
        self._pool = ThreadPoolExecutor(CONNECTIONS, "cachetier-s3")

    def exists(self, keys: Sequence[str]) -> list[Outcome]:
        return self._each(self._exists, keys, _failed)

    def read_heads(self, keys: Sequence[str], num_bytes: int) -> list[Head]:
        def read(key: str) -> Head:
            data = bytes(obstore.get_range(self._bucket, key, start=0, length=num_bytes))
            return Head(Outcome.DONE, data) if len(data) == num_bytes else Head(Outcome.MISSING)

        return self._each(read, keys, lambda error: Head(_failed(error)))

    def put(self, values: Sequence[Value]) -> list[Outcome]:
        return self._each(self._put, values, _failed)

    def get(self, places: Sequence[Place]) -> list[Outcome]:
        return self._each(self._get, places, _failed)

    def delete(self, keys: Sequence[str]) -> list[Outcome]:
        def delete(key: str) -> Outcome:
            obstore.delete(self._bucket, key)
            return Outcome.DONE

        outcomes = self._each(delete, keys, _failed)
        return [Outcome.DONE if outcome is Outcome.MISSING else outcome for outcome in outcomes]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _exists(self, key: str) -> Outcome:
        obstore.head(self._bucket, key)
        return Outcome.DONE

    def _put(self, value: Value) -> Outcome:
        body = b"".join((value.header, *(self._memory.view(*extent) for extent in value.frames)))
        obstore.put(self._bucket, value.key, body, use_multipart=False)
        return Outcome.DONE

    def _get(self, place: Place) -> Outcome:
        wanted = sum(extent.length_bytes for extent in place.frames)
        data = memoryview(obstore.get_range(self._bucket, place.key, start=place.header_bytes, length=wanted))
        if len(data) != wanted:
            return Outcome.MISSING
        start = 0
        for extent in place.frames:
            self._memory.view(*extent)[:] = data[start : start + extent.length_bytes]
            start += extent.length_bytes
        return Outcome.DONE

    def _each(
        self, work: Callable[[Item], Answer], items: Sequence[Item], on_error: Callable[[Exception], Answer]
    ) -> list[Answer]:
        def guarded(item: Item) -> Answer:
            try:
                return work(item)
            except (BaseError, OSError, ValueError) as error:
                return on_error(error)

        try:
            return list(self._pool.map(guarded, items))
        except RuntimeError as error:  # closed meanwhile
            return [on_error(error) for _ in items]


def _failed(error: Exception) -> Outcome:
    if isinstance(error, (FileNotFoundError, NotFoundError)):
        return Outcome.MISSING
    log.debug("a request failed: %s", error)
    return Outcome.FAILED
