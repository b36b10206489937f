"""Bytes at rest: arena, segment files, index, recovery, verification. Synchronous, without threads or policy."""
