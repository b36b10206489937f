"""`POST /v1/match` in JSON: what is held of a prompt, for routers and people.

They have no session, so nothing is leased, promoted or counted, and the answer is old when it arrives. Runs on a thread
of its own: decoding a long prompt and looking it up on disk would hold up the engines' requests.
"""

from array import array
from typing import Annotated

import msgspec

from cachetier.core.errors import ProtocolError
from cachetier.core.messages import TIER_DISK, TIER_GPU, TIER_HOST, TIER_REMOTE
from cachetier.store.store import Store

TIER_NAMES = {TIER_GPU: "gpu", TIER_HOST: "host", TIER_DISK: "disk", TIER_REMOTE: "remote"}

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class Question(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is asked.

    Attributes:
        token_ids: the prompt.
        model: name of the model as engines know it, without an adapter; of several with that name the one that was
            registered last is meant.
        namespace: the model, instead of by name, by an id as in `GET /v1/namespaces`.
        salt: vLLM's cache_salt.
    """

    token_ids: list[TokenId]
    model: str = ""
    namespace: str = ""
    salt: str = ""


_decoder = msgspec.json.Decoder(Question)


def answer(store: Store, body: bytes) -> bytes:
    """Return the JSON that answers the question in `body`.

    Raises:
        ProtocolError: status 400 for a body that is no question, 404 for an unknown model.
    """
    try:
        question = _decoder.decode(body)
        namespace = bytes.fromhex(question.namespace)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise ProtocolError(f"the body must be such as {{model: NAME, token_ids: [1, 2]}}: {error}") from error
    if bool(question.model) == bool(namespace):
        raise ProtocolError("name the model, or its namespace")
    namespace = namespace or _namespace_of(store, question.model)
    reply = store.look_up(namespace, array("i", question.token_ids).tobytes(), question.salt)
    chunk_tokens = store.chunk_tokens
    by_tier = {name: reply.tiers.count(tier) * chunk_tokens for tier, name in TIER_NAMES.items()}
    pending = reply.num_pending * chunk_tokens
    tokens = {"held": reply.num_chunks * chunk_tokens, **by_tier, "pending": pending}
    return msgspec.json.encode({"namespace": namespace.hex(), "tokens": tokens, "chunk_tokens": chunk_tokens})


def _namespace_of(store: Store, model: str) -> bytes:
    for known in reversed(store.namespaces()):
        if known.identity.model == model and not known.identity.adapter:
            return bytes.fromhex(known.namespace)
    raise ProtocolError(f"no engine has registered a model {model!r}; GET /v1/namespaces lists those that did", 404)
