"""The namespaces a data directory knows, kept across restarts in one small file that is replaced whole.

    namespaces.txt: one line each, `<XXH64 of the rest, 16 hexadecimal digits> <JSON of a StoredNamespace>`

A line that does not match its checksum is left out: the namespace is registered again by the next engine.
"""

import os

import msgspec
import xxhash

from cachetier.core.keys import ModelIdentity, NamespaceId, namespace_of
from cachetier.core.layout import KVLayout
from cachetier.storage.file_layer import FileLayer, read_file, replace_file

FILE_NAME = "namespaces.txt"


class StoredNamespace(msgspec.Struct, frozen=True):
    """A namespace that the data directory remembers across restarts."""

    identity: ModelIdentity
    layouts: list[KVLayout]


class NamespaceTable:
    """The file and what it says. One thread at a time."""

    def __init__(self, folder: str, files: FileLayer) -> None:
        """Read the table in `folder`, if there is one."""
        self._path = os.path.join(folder, FILE_NAME)
        self._files = files
        self.known: dict[NamespaceId, StoredNamespace] = {}
        for line in read_file(files, self._path).splitlines():
            stored = _parse(line)
            if stored:
                self.known[namespace_of(stored.identity)] = stored

    def remember(self, stored: StoredNamespace) -> None:
        """Add or replace a namespace, durably.

        Raises:
            OSError: it could not be written; it is known until the next restart.
        """
        namespace = namespace_of(stored.identity)
        if self.known.get(namespace) == stored:
            return
        self.known[namespace] = stored
        texts = [msgspec.json.encode(entry) for entry in self.known.values()]
        lines = [b"%016x %s\n" % (xxhash.xxh64_intdigest(text), text) for text in texts]
        replace_file(self._files, self._path, b"".join(lines))


def _parse(line: bytes) -> StoredNamespace | None:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%016x" % xxhash.xxh64_intdigest(text):
        return None
    return msgspec.json.decode(text, type=StoredNamespace)
