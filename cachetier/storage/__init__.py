"""Bytes at rest: the arena, segment files, the index, recovery and verification. Synchronous, without threads or policy."""
