"""What engines and people say to the server about engines: who is there, and in which role."""

from cachetier.core.message_base import Message

PRODUCER, CONSUMER, BOTH = "producer", "consumer", "both"
ROLES = (PRODUCER, CONSUMER, BOTH)
ENGINE_NAME_MAX = 128  # characters
ENGINE_URL_MAX = 2048  # characters
ENGINES_MAX = 4096


class AnnounceEngine(Message, frozen=True):
    """Say who an engine is: once a second, by its scheduler half. It is listed until the session ends.

    Attributes:
        name: what it is called; no two at a time have the same.
        role: one of `ROLES`: the one it was started in.
        namespace: of its model without an adapter, registered before.
        tensor_parallel, pipeline_parallel: ranks and stages.
        block_tokens: tokens a block.
        url: where its OpenAI server can be reached, for routers; empty: nobody said.
    """

    session: int
    name: str
    role: str
    namespace: bytes
    tensor_parallel: int
    pipeline_parallel: int
    block_tokens: int
    url: str = ""


class AnnounceEngineReply(Message, frozen=True):
    """The role that the engine is to have from now on."""

    role: str


class ListEngines(Message, frozen=True):
    """Ask for the engines that are there."""


class EngineInfo(Message, frozen=True):
    """An engine.

    Attributes:
        name: what it is called.
        role: the one it has.
        model: name of its model.
        namespace: whose KV it stores and loads.
        tensor_parallel, pipeline_parallel, block_tokens, url: see `AnnounceEngine`.
        pid: process id of its scheduler half.
        silent_s: seconds since it last said that it is there.
    """

    name: str
    role: str
    model: str
    namespace: bytes
    tensor_parallel: int
    pipeline_parallel: int
    block_tokens: int
    pid: int
    silent_s: float
    url: str = ""


class ListEnginesReply(Message, frozen=True):
    """The engines, by name."""

    engines: list[EngineInfo]


class SetRole(Message, frozen=True):
    """Give an engine another role, until it ends."""

    name: str
    role: str


class SetRoleReply(Message, frozen=True):
    """Whether there is an engine of that name."""

    is_known: bool
