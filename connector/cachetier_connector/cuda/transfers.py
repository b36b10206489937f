"""Copies between the arena and staging memory, made as few and as large as the bus likes them: pure functions.

The arena is registered with the driver in cells of fixed size, and the driver refuses a copy that touches registered
and unregistered memory at once. A copy that never crosses a border between cells is one or the other, whenever it is
made and however far the registration has come.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

CELL_BYTES = 256 << 20
# Below this the bus is noticeably slower (32 KiB: 4 to 5 GB/s, 1 MiB: 47 to 50, 4 MiB: 52 to 54, 32 MiB: 55).
JOIN_BELOW_BYTES = 4 << 20


class Transfer(NamedTuple):
    """`rows` rows of `width_bytes`; their starts are a pitch apart, on either side."""

    host: int
    device: int
    width_bytes: int
    rows: int = 1
    host_pitch_bytes: int = 0
    device_pitch_bytes: int = 0


def plan_transfers(copies: Iterable[tuple[int, int, int]], origin: int) -> list[Transfer]:
    """Return transfers that do `copies`, in this order.

    Args:
        copies: host address, device address, bytes.
        origin: host address at which the first cell starts.
    """
    transfers: list[Transfer] = []
    for copy in copies:
        for part in _split(*copy, origin):
            joined = _joined(transfers[-1], part, origin) if transfers else None
            if joined is None:
                transfers.append(part)
            else:
                transfers[-1] = joined
    return transfers


def plan_rows(hosts: Sequence[int], device: int, device_pitch: int, width_bytes: int, origin: int) -> list[Transfer]:
    """Return what `plan_transfers` would for equally long copies, `device_pitch` bytes apart on the device; faster."""
    transfers: list[Transfer] = []
    first, count = 0, len(hosts)
    while first < count:
        host, target = hosts[first], device + first * device_pitch
        limit = host + CELL_BYTES - (host - origin) % CELL_BYTES - width_bytes  # where the last row may start
        if host > limit:
            transfers += plan_transfers([(host, target, width_bytes)], origin)
            first += 1
            continue
        end = first + 1
        if width_bytes < JOIN_BELOW_BYTES and end < count and (pitch := hosts[end] - host) >= width_bytes:
            while end < count and hosts[end] == host + (end - first) * pitch <= limit:
                end += 1
        if end - first == 1:
            transfers.append(Transfer(host, target, width_bytes))
        else:
            transfers.append(Transfer(host, target, width_bytes, end - first, pitch, device_pitch))
        first = end
    return transfers


def _split(host: int, device: int, length_bytes: int, origin: int) -> Iterator[Transfer]:
    while length_bytes:
        part = min(length_bytes, CELL_BYTES - (host - origin) % CELL_BYTES)
        yield Transfer(host, device, part)
        host, device, length_bytes = host + part, device + part, length_bytes - part


def _joined(last: Transfer, new: Transfer, origin: int) -> Transfer | None:
    """Return one transfer for both, or None: they do not fit together, or are large enough to go alone."""
    if (last.host - origin) // CELL_BYTES != (new.host + new.width_bytes - 1 - origin) // CELL_BYTES:
        return None
    host_step, device_step, width = new.host - last.host, new.device - last.device, last.width_bytes
    if last.rows == 1 and host_step == device_step == width:
        return last._replace(width_bytes=width + new.width_bytes)
    if new.width_bytes != width or width >= JOIN_BELOW_BYTES:
        return None
    if last.rows == 1:
        if min(host_step, device_step) < width:
            return None
        return Transfer(last.host, last.device, width, 2, host_step, device_step)
    if (host_step, device_step) != (last.rows * last.host_pitch_bytes, last.rows * last.device_pitch_bytes):
        return None
    return last._replace(rows=last.rows + 1)
