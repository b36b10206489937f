"""The engines that are there, by name, and the roles that people gave them.

Pure bookkeeping; the caller holds the store's lock.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cachetier.core.engine_messages import (
    ENGINE_NAME_MAX,
    ENGINE_URL_MAX,
    ENGINES_MAX,
    PRODUCER,
    ROLES,
    AnnounceEngine,
    EngineInfo,
    SetRole,
)
from cachetier.core.errors import ProtocolError
from cachetier.core.keys import NamespaceId


@dataclass(slots=True)
class _Engine:
    said: AnnounceEngine
    pid: int
    role: str
    seen_at: float


class EngineTable:
    """Who is there."""

    def __init__(self) -> None:
        self._engines: dict[str, _Engine] = {}

    def announce(self, message: AnnounceEngine, pid: int, now: float) -> str:
        """Note that an engine is there; return the role that it is to have.

        Raises:
            ProtocolError: what it says is impossible (400), another engine has the name or there are too many (409).
        """
        _check(message.name, message.role)
        if min(message.tensor_parallel, message.pipeline_parallel, message.block_tokens) < 1:
            raise ProtocolError("an engine has at least a rank, a stage and a token a block")
        if len(message.url) > ENGINE_URL_MAX:
            raise ProtocolError(f"an engine's url has {ENGINE_URL_MAX} characters at most")
        known = self._engines.get(message.name)
        if known is not None and known.said.session != message.session:
            raise ProtocolError(f"another engine is called {message.name!r}; set another name", status=409)
        if known is None and len(self._engines) >= ENGINES_MAX:
            raise ProtocolError(f"there are {ENGINES_MAX} engines already", status=409)
        role = known.role if known is not None else message.role
        self._engines[message.name] = _Engine(message, pid, role, now)
        return role

    def set_role(self, message: SetRole) -> bool:
        """Give an engine another role; tell whether it is there.

        Raises:
            ProtocolError: name or role are impossible (400).
        """
        _check(message.name, message.role)
        known = self._engines.get(message.name)
        if known is not None:
            known.role = message.role
        return known is not None

    def is_producer(self, name: str) -> bool:
        """Tell whether there is an engine of that name, and it is a producer."""
        known = self._engines.get(name)
        return known is not None and known.role == PRODUCER

    def infos(self, model_of: Callable[[NamespaceId], str], now: float) -> list[EngineInfo]:
        """Describe all of them, by name."""
        return [
            EngineInfo(
                name=name,
                role=each.role,
                model=model_of(NamespaceId(each.said.namespace)),
                namespace=each.said.namespace,
                tensor_parallel=each.said.tensor_parallel,
                pipeline_parallel=each.said.pipeline_parallel,
                block_tokens=each.said.block_tokens,
                pid=each.pid,
                silent_s=max(0.0, now - each.seen_at),
                url=each.said.url,
            )
            for name, each in sorted(self._engines.items())
        ]

    def end_session(self, session: int) -> None:
        """Forget the engine of a session that has ended."""
        for name in [name for name, each in self._engines.items() if each.said.session == session]:
            del self._engines[name]

    def expire(self, is_open: Callable[[int], bool]) -> None:
        """Forget the engines of sessions that are not open any more."""
        for session in {each.said.session for each in self._engines.values()}:
            if not is_open(session):
                self.end_session(session)


def _check(name: str, role: str) -> None:
    if not 0 < len(name) <= ENGINE_NAME_MAX or not name.isprintable():
        raise ProtocolError(f"an engine's name has 1 to {ENGINE_NAME_MAX} printable characters")
    if role not in ROLES:
        raise ProtocolError(f"there is no role {role!r}, only {', '.join(ROLES)}")
