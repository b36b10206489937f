"""The server's side of the arena: the shared file, and which frames of it are taken."""


class Arena:
    """Frames in shared memory. Not thread-safe: the store calls it under its lock; `frame` may be called anywhere."""

    largest_frame_bytes: int
    data_bytes: int

    @classmethod
    def create(cls, path: str, file_bytes: int, instance: bytes) -> "Arena":
        """Make a new arena file of `file_bytes` at `path`, replacing an old one.

        Raises:
            StorageError: there is no room for it.
        """
        raise NotImplementedError

    def allocate(self, size_bytes: int) -> int | None:
        """Return the offset of a frame of at least `size_bytes`, in STATE_FILLING; None: its class has none left.

        Raises:
            StorageError: no arena of this size ever has such a frame; the text names the host_bytes needed.
        """
        raise NotImplementedError

    def free(self, offset: int) -> None:
        """Give a frame back; its state becomes STATE_FREE."""
        raise NotImplementedError

    def frame(self, offset: int, length: int) -> memoryview:
        """Return the writable bytes of a frame; the address is page-aligned."""
        raise NotImplementedError

    def state(self, offset: int) -> int:
        """Return a frame's state (core.arena_format.STATE_...)."""
        raise NotImplementedError

    def set_state(self, offset: int, state: int) -> None:
        """Set a frame's state."""
        raise NotImplementedError

    def size_class(self, size_bytes: int) -> int:
        """Return the frame size that `allocate(size_bytes)` uses: freeing a frame of this class makes it succeed."""
        raise NotImplementedError

    def slab_victim(self, size_bytes: int) -> list[int] | None:
        """Return the used frames of the least-used slab of another class; freed, they make room for `size_bytes`."""
        raise NotImplementedError

    @property
    def used_bytes(self) -> int:
        """Bytes in frames that are taken."""
        raise NotImplementedError

    def check_integrity(self) -> None:
        """Raise AssertionError if the books are wrong."""
        raise NotImplementedError

    def close(self) -> None:
        """Unmap and remove the file."""
        raise NotImplementedError
