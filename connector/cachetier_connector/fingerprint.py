"""Fingerprints of weights: what tells two models under one name apart. Reads files, on the thread that asks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

# Files that decide what a model computes. Tokenizers are not among them: KV is addressed by token ids.
PATTERNS = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.npz",
    "config.json",
    "params.json",
    "adapter_*.json",
)
WHOLE_FILE_BYTES = 16 << 20
SAMPLE_BYTES = 4096
SAMPLE_EVERY_BYTES = 4 << 20


def fingerprint_folder(path: Path) -> str:
    """Return XXH3-128 (hexadecimal) over names, sizes and sampled contents of the weights at `path`.

    A file of up to 16 MiB is read whole, of a larger one 4 KiB in every 4 MiB and its end: every tensor that matters
    is sampled. Does not depend on how a model is cut over ranks.

    Args:
        path: a model folder, or one weights file.

    Raises:
        OSError: a file cannot be read.
        FileNotFoundError: there are no weights at `path`.
    """
    files = [path] if path.is_file() else sorted({file for name in PATTERNS for file in path.glob(name)})
    if not files:
        raise FileNotFoundError(f"no weights at {path}")
    hasher = xxhash.xxh3_128()
    for file in files:
        size_bytes = file.stat().st_size
        hasher.update(f"{file.name}\0{size_bytes}\0".encode())
        for part in _samples(file, size_bytes):
            hasher.update(part)
    return hasher.hexdigest()


def _samples(file: Path, size_bytes: int) -> Iterator[Any]:
    with file.open("rb", buffering=0) as stream:
        if size_bytes <= WHOLE_FILE_BYTES:
            yield stream.readall()
            return
        for offset in [*range(0, size_bytes, SAMPLE_EVERY_BYTES), size_bytes - SAMPLE_BYTES]:
            stream.seek(offset)
            yield stream.read(SAMPLE_BYTES)
