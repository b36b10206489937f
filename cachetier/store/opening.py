"""Opens the tiers of a store: arena, disk, books, the threads between them, and the remote tier.

On the thread that makes the store, which nobody else knows yet.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cachetier.core.config import ServerConfig
from cachetier.core.keys import ChainHasher
from cachetier.storage.arena import Arena
from cachetier.storage.data_dir import DataDir, documents_bytes
from cachetier.storage.disk import DiskTier
from cachetier.storage.documents import DocumentFile
from cachetier.storage.file_layer import FileLayer
from cachetier.store.books import Books
from cachetier.store.change_log import ChangeLog
from cachetier.store.disk_pins import DiskPins
from cachetier.store.document_table import DocumentTable
from cachetier.store.flush import Flusher
from cachetier.store.gpu_tier import GpuTier
from cachetier.store.host import HostTable
from cachetier.store.leases import LeaseTable
from cachetier.store.namespaces import NamespaceTable
from cachetier.store.promotion import Promoter
from cachetier.store.remote_tier import MakeStore, RemoteTier, open_remote_tier


@dataclass(frozen=True, slots=True)
class Tiers:
    """What a store stands on; flusher, promoter and file are None without a disk tier, remote without a remote one."""

    arena: Arena
    books: Books
    flusher: Flusher | None
    promoter: Promoter | None
    remote: RemoteTier | None
    document_file: DocumentFile | None


def open_tiers(
    config: ServerConfig,
    data_dir: DataDir,
    instance: bytes,
    clock: Callable[[], float],
    files: FileLayer | None,
    make_remote: MakeStore | None,
) -> Tiers:
    """Open everything and start its threads.

    Raises:
        ConfigError, StorageError: a setting is impossible, or the data directory or the arena cannot be used.
    """
    arena = Arena.create(data_dir.arena_path(), config.host_bytes, instance)
    try:
        return _open_on(arena, config, data_dir, clock, files, make_remote)
    except BaseException:
        arena.close()
        raise


def _open_on(
    arena: Arena,
    config: ServerConfig,
    data_dir: DataDir,
    clock: Callable[[], float],
    files: FileLayer | None,
    make_remote: MakeStore | None,
) -> Tiers:
    pins, gpu, hasher = DiskPins(), GpuTier(config.lease_ttl_s), ChainHasher(data_dir.secret)
    changes = ChangeLog(lambda namespace: hasher.root(namespace, ""), config.chunk_tokens)
    file = None
    if config.disk_bytes:
        file = DocumentFile(config.data_dir, files or FileLayer(), documents_bytes(config))
    documents = DocumentTable.open(file)
    table = HostTable(arena, gpu, changes, config.tenant_quota, clock)
    disk = None
    if config.disk_bytes:
        disk = DiskTier.open(
            config,
            files,
            is_hot=lambda key: pins.is_hot(key) or table.is_hot(key),
            is_pinned=pins.is_pinned,
        )
    books = Books(
        chunk_tokens=config.chunk_tokens,
        clock=clock,
        hasher=hasher,
        table=table,
        gpu=gpu,
        leases=LeaseTable(config.lease_ttl_s),
        namespaces=NamespaceTable(config.chunk_tokens, arena),
        disk=disk,
        documents=documents,
        changes=changes,
        disk_pins=pins,
    )
    flusher = Flusher(books, disk, arena.frame, arena.data_bytes // 2) if disk else None
    remote = open_remote_tier(config, books, flusher, arena, make_remote)
    promoter = None
    if disk is not None and flusher is not None:
        promoter = Promoter(books, disk, flusher, arena.frame, config.io_threads)
        for stored in disk.namespaces().values():
            books.namespaces.recall(stored.identity, stored.layouts)
        flusher.start()
        promoter.start()
    return Tiers(arena, books, flusher, promoter, remote, file)
