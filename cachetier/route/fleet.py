"""The engines behind the router: those that people registered, and those that the server lists.

Pure bookkeeping on the event loop's thread. An engine that is removed serves what it has to its end: requests under way
hold the `Engine`, and only new ones do not find it.
"""

from collections.abc import Iterable, Sequence

from cachetier.core.engine_messages import ENGINES_MAX, EngineInfo
from cachetier.core.errors import ConfigError
from cachetier.route.engine import Engine, Registration, base_url


class Fleet:
    """The table of engines."""

    def __init__(self, registrations: Iterable[Registration] = ()) -> None:
        self._engines: dict[str, Engine] = {}
        self._listed: set[str] = set()
        self._removed: set[str] = set()  # by people, so the server's word does not bring them back
        for registration in registrations:
            self.put(registration)

    @property
    def engines(self) -> list[Engine]:
        """All of them, by name."""
        return [self._engines[name] for name in sorted(self._engines)]

    def put(self, registration: Registration) -> Engine:
        """Add an engine, or change what was registered under its name.

        Raises:
            ConfigError: there are too many.
        """
        name, known = registration.name, self._engines.get(registration.name)
        if known is None and len(self._engines) >= ENGINES_MAX:
            raise ConfigError(f"there are {ENGINES_MAX} engines already")
        self._removed.discard(name)
        if known is None or known.url != registration.url:
            known = self._engines[name] = Engine(name, registration.url, registration.role)
        if name not in self._listed:
            known.role = registration.role
        known.is_given = True
        return known

    def remove(self, name: str) -> bool:
        """Take an engine out until somebody registers it again; tell whether there was one."""
        if self._engines.pop(name, None) is None:
            return False
        self._removed.add(name)
        return True

    def update(self, listing: Sequence[EngineInfo]) -> None:
        """Take over what the server says of engines: their roles and namespaces, and where to reach those unknown.

        A server that was started again lists nobody for a second or two. So an engine that is not listed any more stays
        as it was for as long as it answers.
        """
        for info in listing:
            known = self._reachable(info)
            if known is not None:
                known.role, known.namespace = info.role, info.namespace
        self._listed = {info.name for info in listing}
        for engine in self.engines:
            if engine.name in self._listed or engine.is_up:
                continue
            engine.namespace = b""
            if not engine.is_given:
                del self._engines[engine.name]

    def _reachable(self, info: EngineInfo) -> Engine | None:
        """Return the engine of this name, made anew if it says that it is somewhere else; None: nobody knows where."""
        known = self._engines.get(info.name)
        if (known is not None and known.is_given) or info.name in self._removed:
            return known
        try:
            url = base_url(info.url)
        except ConfigError:  # it did not say, or nonsense: somebody may register it
            return known
        if (known is None and len(self._engines) < ENGINES_MAX) or (known is not None and known.url != url):
            known = self._engines[info.name] = Engine(info.name, url, info.role)
        return known
