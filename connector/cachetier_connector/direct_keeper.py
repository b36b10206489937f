"""Whether this worker reads segment files itself: measured once in the background, then told to every server.

`tend` runs on the worker's store thread, which owns the link; the measurement on a thread of its own.
"""

import threading

from cachetier.core.messages import OpenSessionReply, ReadsDirectly
from cachetier_connector.copy_base import CopyEngine
from cachetier_connector.link import ServerLink

CALL_TIMEOUT_S = 1.0


class DirectKeeper:
    """Measures, and tells the server if direct reads are the faster way here."""

    def __init__(self, engine: CopyEngine, link: ServerLink, num_workers: int) -> None:
        """Do nothing yet.

        Args:
            engine: that would read.
            link: of the thread that calls `tend`.
            num_workers: of the whole engine.
        """
        self._engine, self._link, self._num_workers = engine, link, num_workers
        self._folder = ""
        self._bytes_per_s = 0.0  # written by the measuring thread
        self._told: OpenSessionReply | None = None

    def tend(self) -> None:
        """Do what is due; the link is up. Cheap when nothing is."""
        server = self._link.server
        if server is None or not server.segments_dir:
            return
        if not self._folder:
            self._folder = server.segments_dir
            threading.Thread(target=self._measure, name="cachetier-measure-disk", daemon=True).start()
        speed = self._bytes_per_s
        if speed and server is not self._told and server.segments_dir == self._folder:
            said = self._link.call(
                lambda session: ReadsDirectly(session=session, num_workers=self._num_workers, bytes_per_s=speed),
                CALL_TIMEOUT_S,
            )
            if said is not None:
                self._told = server

    def _measure(self) -> None:
        self._bytes_per_s = self._engine.measure_direct(self._folder)
