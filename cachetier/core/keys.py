"""Addresses: which bytes a chunk's KV must be (namespace) and which text it stands for (chain key).

Hashes find a chunk, they never decide alone: whoever looks a chunk up also compares its content and its parent.
"""

from collections.abc import Iterable, Mapping
from typing import NewType

import msgspec
import xxhash

FORMAT_VERSION = 1
KEY_BYTES = 16
TOKEN_BYTES = 4
SECRET_BYTES = 32

NamespaceId = NewType("NamespaceId", bytes)
ChainKey = NewType("ChainKey", bytes)


class ModelIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything besides tokens and salt that decides the bytes of a chunk's KV.

    Not in it, on purpose: tensor and pipeline parallelism, engine block size, engine memory layout, vLLM version.

    Attributes:
        model: name or folder of the model as the user gave it.
        revision: the hub's revision, or empty.
        weights: fingerprint of the weights themselves (hexadecimal).
        generation: counts weight updates inside running engines.
        kv_dtype: dtype of the stored rows, such as "bfloat16" or "fp8_e4m3".
        kv_scales: fingerprint of the quantisation scales, or empty.
        attention: "full" or "mla".
        num_layers: attention layers of the whole model.
        num_kv_heads: KV heads of the whole model (1 for MLA).
        k_head_size: elements of a K row (of the latent row for MLA).
        v_head_size: elements of a V row (0 for MLA).
        rotary: the rotary parameters as sorted JSON, or empty.
        adapter: LoRA adapter (name, path and fingerprint), or empty.
    """

    model: str
    weights: str
    kv_dtype: str
    attention: str
    num_layers: int
    num_kv_heads: int
    k_head_size: int
    v_head_size: int
    revision: str = ""
    generation: int = 0
    kv_scales: str = ""
    rotary: str = ""
    adapter: str = ""


def namespace_of(identity: ModelIdentity) -> NamespaceId:
    """Digest `identity` to 16 bytes: XXH3-128 of its canonical JSON and the format version."""
    text = msgspec.json.encode([FORMAT_VERSION, identity], order="sorted")
    return NamespaceId(xxhash.xxh3_128_digest(text))


class ChainHasher:
    """Chain keys of one data directory: XXH3-128 keyed by its secret.

    The secret makes collisions unpredictable to whoever writes prompts; content comparison makes them harmless.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"the secret has {len(secret)} bytes, not {SECRET_BYTES}")
        self._secret = secret
        self._seed = int.from_bytes(secret[:8], "little")

    def root(self, namespace: NamespaceId, salt: str) -> ChainKey:
        """Return the parent of every first chunk of `namespace` under `salt` (empty: no salt)."""
        text = self._secret + namespace + salt.encode()
        return ChainKey(xxhash.xxh3_128_digest(text, self._seed))

    def extend(self, parent: ChainKey, content: bytes) -> ChainKey:
        """Return the key of the chunk with `content` that follows the chunk `parent`."""
        return ChainKey(xxhash.xxh3_128_digest(parent + content, self._seed))

    def chain(self, parent: ChainKey, contents: Iterable[bytes]) -> list[ChainKey]:
        """Return the keys of consecutive chunks that follow `parent`."""
        seed, digest, keys, key = self._seed, xxhash.xxh3_128_digest, [], bytes(parent)
        for content in contents:
            key = digest(key + content, seed)
            keys.append(ChainKey(key))
        return keys


def contents_of(tokens: bytes, chunk_tokens: int, extras: Mapping[int, bytes]) -> list[bytes]:
    """Split little-endian int32 `tokens` into the contents of complete chunks, dropping an incomplete last one.

    `extras` maps the number of a chunk (counted from the start of `tokens`) to what decides its KV besides its
    tokens: digests of the images or sounds whose placeholders stand in it. They become part of the content.
    """
    step = chunk_tokens * TOKEN_BYTES
    contents = [tokens[start : start + step] for start in range(0, len(tokens) - step + 1, step)]
    for number, extra in extras.items():
        if 0 <= number < len(contents):
            contents[number] += extra
    return contents
