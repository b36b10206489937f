"""Sizes as people write them."""

import re
from decimal import Decimal

from cachetier.core.errors import ConfigError

_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000), ("", 1024))
}


def parse_bytes(text: str | int) -> int:
    """Return the number of bytes in `text`: "1GiB" and "1G" are 2**30, "1GB" is 10**9, a number is itself.

    Raises:
        ConfigError: `text` is not a size.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2] not in _UNITS:
        raise ConfigError(f"{text!r} is not a size; write for example 512MiB, 4GiB or 1500000000")
    return int(Decimal(match[1]) * _UNITS[match[2]])


def format_bytes(count: float) -> str:
    """Return `count` bytes for people: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
