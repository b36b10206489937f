"""Page-locking the arena in the background, so that copies from and to it run at the bus's speed.

Copies work before it is done and without it, only slower: `transfers` never lets one cross a border between cells, and
a cell is registered as a whole. A mapping stays registered as long as its view lives: whoever copies holds the view,
and the view's last reference takes the registration with it, before the file is unmapped.

Locking design: `_lock` guards the list of registered cells; the view itself is only held while one cell is registered.
"""

import logging
import threading
import weakref

from cachetier.client import ArenaView
from cachetier_connector.cuda.device import Device
from cachetier_connector.cuda.driver import DriverError
from cachetier_connector.cuda.transfers import CELL_BYTES

log = logging.getLogger(__name__)


def _remedy(error: DriverError) -> str:
    """Tell what to do about a refused registration."""
    if "INVALID_VALUE" in str(error):
        return (
            "The driver locks no pages of a file on a disk: /dev/shm must be a tmpfs, the machine's or given to the "
            "container (docker: --ipc=host or --shm-size)"
        )
    return "Raise the limit on locked memory (ulimit -l unlimited; containers: --ulimit memlock=-1)"


class Registration:
    """One mapping of an arena, and how much of it is registered."""

    def __init__(self, device: Device, arena: ArenaView) -> None:
        """Start to register `arena`, on a thread of its own."""
        self._device, self._arena = device, weakref.ref(arena)
        self._lock = threading.Lock()
        self._cells: list[int] = []
        self._is_over = False
        self._finalizer = weakref.finalize(arena, self._unregister)
        self._finalizer.atexit = False  # the process takes its registrations along
        self._thread = threading.Thread(target=self._run, name="cachetier-register", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the view is still there."""
        return self._finalizer.alive

    def join(self) -> int:
        """Wait until all is registered that can be; return the number of registered cells."""
        self._thread.join()
        with self._lock:
            return len(self._cells)

    def end(self) -> None:
        """Unregister now. No copy may be under way."""
        self._finalizer()

    def _run(self) -> None:
        offset, is_going_on = 0, True
        try:
            self._device.bind_thread()
            while is_going_on:
                is_going_on = self._register_cell(offset)
                offset += CELL_BYTES
        except DriverError as error:
            log.warning(
                "cachetier: the arena is not page-locked from byte %d on (%s); loads and stores work, several times "
                "slower. %s",
                offset,
                error,
                _remedy(error),
            )
        except Exception:
            log.exception("cachetier: registering the arena failed; loads and stores work, several times slower")

    def _register_cell(self, offset: int) -> bool:
        """Register the cell at `offset`; False: there is none, or the view is gone."""
        arena = self._arena()
        if arena is None or offset >= arena.geometry.data_bytes:
            return False
        with self._lock:
            if self._is_over:
                return False
            address = arena.address + offset
            self._device.register(address, min(CELL_BYTES, arena.geometry.data_bytes - offset))
            self._cells.append(address)
        return True

    def _unregister(self) -> None:
        try:
            self._device.bind_thread()
            with self._lock:
                self._is_over = True
                cells, self._cells = self._cells, []
                for address in cells:
                    self._device.unregister(address)
        except Exception:
            log.exception("cachetier: unregistering an arena failed")
