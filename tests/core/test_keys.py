"""Addresses depend on everything that decides the bytes and on nothing else, and never drift between versions."""

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachetier.core.keys import (
    KEY_BYTES,
    ChainHasher,
    ChainKey,
    ModelIdentity,
    NamespaceId,
    contents_of,
    namespace_of,
)

IDENTITY = ModelIdentity(
    model="m",
    weights="w",
    kv_dtype="bfloat16",
    attention="full",
    num_layers=2,
    num_kv_heads=4,
    k_head_size=64,
    v_head_size=64,
)
HASHER = ChainHasher(bytes(range(32)))
NAMESPACE = namespace_of(IDENTITY)

chunk_lists = st.lists(st.binary(min_size=8, max_size=8), max_size=6)


def tokens_of(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}i", *numbers)


class TestNamespace:
    @pytest.mark.parametrize("field", ModelIdentity.__struct_fields__)
    def test_every_field_of_the_identity_changes_it(self, field: str) -> None:
        value = getattr(IDENTITY, field)
        other = msgspec.structs.replace(IDENTITY, **{field: value + 1 if isinstance(value, int) else value + "x"})
        assert namespace_of(other) != NAMESPACE

    def test_a_value_that_moves_to_another_field_changes_it(self) -> None:
        moved = msgspec.structs.replace(IDENTITY, model="", weights="mw")
        assert len({namespace_of(moved), namespace_of(msgspec.structs.replace(moved, model="mw", weights=""))}) == 2

    def test_it_survives_the_way_through_a_message(self) -> None:
        body = msgspec.msgpack.encode(IDENTITY)
        assert namespace_of(msgspec.msgpack.decode(body, type=ModelIdentity)) == NAMESPACE

    def test_it_is_what_it_always_was(self) -> None:
        assert NAMESPACE.hex() == "8ffc817d2ff008bbbb7b18b1ecc2b33a"


class TestChain:
    def test_keys_are_what_they_always_were(self) -> None:
        root = HASHER.root(NAMESPACE, "")
        contents = contents_of(tokens_of(*range(128)), 64, {1: b"image"})
        assert root.hex() == "f18eab5b52c18db72c0d235ff3898e51"
        assert HASHER.root(NAMESPACE, "salt").hex() == "fa100f50020241bbab9ed040a4430901"
        assert [key.hex() for key in HASHER.chain(root, contents)] == [
            "edf97749013edea2a8bea3606935bcab",
            "d6e1207a7617f07d456cfdd40e9136bb",
        ]

    @given(chunk_lists)
    def test_a_chain_is_its_extensions_one_by_one(self, contents: list[bytes]) -> None:
        key = root = HASHER.root(NAMESPACE, "")
        one_by_one = [key := HASHER.extend(key, content) for content in contents]
        assert HASHER.chain(root, contents) == one_by_one
        assert all(len(key) == KEY_BYTES for key in one_by_one)

    @given(chunk_lists, chunk_lists)
    def test_two_chains_share_keys_exactly_as_far_as_they_share_contents(
        self, first: list[bytes], second: list[bytes]
    ) -> None:
        root = HASHER.root(NAMESPACE, "")
        keys = zip(HASHER.chain(root, first), HASHER.chain(root, second), strict=False)
        contents = list(zip(first, second, strict=False))
        shared = next((number for number, (a, b) in enumerate(contents) if a != b), len(contents))
        assert [a == b for a, b in keys] == [number < shared for number in range(len(contents))]

    def test_roots_differ_by_namespace_salt_and_secret(self) -> None:
        other = NamespaceId(bytes(16))
        roots = {HASHER.root(NAMESPACE, ""), HASHER.root(NAMESPACE, "a"), HASHER.root(other, "")}
        roots.add(ChainHasher(bytes(32)).root(NAMESPACE, ""))
        assert len(roots) == 4

    @pytest.mark.parametrize("changed", range(32))
    def test_every_byte_of_the_secret_counts(self, changed: int) -> None:
        secret = bytearray(range(32))
        secret[changed] ^= 1
        assert ChainHasher(bytes(secret)).root(NAMESPACE, "") != HASHER.root(NAMESPACE, "")

    @pytest.mark.parametrize("size", [0, 31, 33])
    def test_a_secret_of_another_size_is_refused(self, size: int) -> None:
        with pytest.raises(ValueError, match="32"):
            ChainHasher(bytes(size))


class TestContents:
    @given(st.binary(max_size=200), st.sampled_from([1, 2, 16]))
    def test_contents_are_the_complete_chunks_in_order(self, tokens: bytes, chunk_tokens: int) -> None:
        contents = contents_of(tokens, chunk_tokens, {})
        step = chunk_tokens * 4
        assert all(len(content) == step for content in contents)
        assert b"".join(contents) == tokens[: len(tokens) // step * step]

    def test_extras_change_their_chunk_alone(self) -> None:
        tokens = tokens_of(*range(6))
        plain, extra = contents_of(tokens, 2, {}), contents_of(tokens, 2, {1: b"image"})
        assert [a == b for a, b in zip(plain, extra, strict=True)] == [True, False, True]
        assert contents_of(tokens, 2, {1: b"other"})[1] != extra[1]

    @pytest.mark.parametrize("number", [-1, 3, 1 << 40])
    def test_extras_outside_the_complete_chunks_change_nothing(self, number: int) -> None:
        tokens = tokens_of(*range(7))
        assert contents_of(tokens, 2, {number: b"image"}) == contents_of(tokens, 2, {})

    def test_an_extra_cannot_pass_for_tokens(self) -> None:
        parent = ChainKey(bytes(16))
        with_extra = contents_of(tokens_of(1, 2), 2, {0: tokens_of(3, 4)})
        plain = contents_of(tokens_of(1, 2, 3, 4), 2, {})
        assert HASHER.chain(parent, with_extra)[-1] not in HASHER.chain(parent, plain)
