"""Namespaces: what is impossible is refused, quickly."""

import time

import pytest

from cachetier.core.errors import ProtocolError
from cachetier.core.keys import ModelIdentity
from cachetier.core.layout import KVLayout, Shard
from cachetier.store.namespaces import NAMESPACES_MAX, TILINGS_MAX, NamespaceTable
from tests.store.chunks import CHUNK_TOKENS, LAYOUT, make_arena


def identity(model: str = "m") -> ModelIdentity:
    return ModelIdentity(
        model=model, weights="w", kv_dtype="bfloat16", attention="full", num_layers=4, num_kv_heads=2, k_head_size=8,
        v_head_size=8,
    )  # fmt: skip


@pytest.fixture
def table(tmp_path):
    arena = make_arena(tmp_path)
    yield NamespaceTable(CHUNK_TOKENS, arena)
    arena.close()


def test_registering_twice_is_one_namespace_and_other_layouts_conflict(table):
    first, is_new = table.register(identity(), [LAYOUT])
    assert is_new
    assert table.register(identity(), [LAYOUT]) == (first, False)
    assert table.get(first.id) is first
    with pytest.raises(ProtocolError) as caught:
        table.register(identity(), [KVLayout(num_layers=4, num_kv_heads=2, row_bytes=64)])
    assert caught.value.status == 409


def test_an_unknown_namespace_is_404(table):
    with pytest.raises(ProtocolError) as caught:
        table.get(b"?" * 16)
    assert caught.value.status == 404


@pytest.mark.parametrize(
    "layouts",
    [
        [],
        [LAYOUT, LAYOUT],
        [KVLayout(num_layers=0, num_kv_heads=2, row_bytes=8)],
        [KVLayout(num_layers=4, num_kv_heads=-1, row_bytes=8)],
        [KVLayout(num_layers=4, num_kv_heads=2, row_bytes=1 << 40)],
        [KVLayout(num_layers=1 << 40, num_kv_heads=2, row_bytes=8)],
        [KVLayout(num_layers=4, num_kv_heads=2, row_bytes=8, group=-1)],
    ],
)
def test_impossible_layouts_are_refused(table, layouts):
    with pytest.raises(ProtocolError) as caught:
        table.register(identity(), layouts)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "tiling",
    [
        [],
        [Shard(0, 2, 0, 3)],
        [Shard(0, 2, 0, 4), Shard(0, 2, 0, 4)],
        [Shard(0, 1, 0, 4), Shard(0, 1, 0, 4)],
        [Shard(0, 3, 0, 4)],
        [Shard(-1, 2, 0, 4)],
        [Shard(0, 1 << 60, 0, 1 << 60)],
        [Shard(1, 0, 0, 4)],
    ],
)
def test_impossible_tilings_are_refused_at_once(table, tiling):
    namespace, _ = table.register(identity(), [LAYOUT])
    start = time.perf_counter()
    with pytest.raises(ProtocolError):
        namespace.tiling(tiling)
    assert time.perf_counter() - start < 0.5


def test_a_tiling_is_made_once_and_their_number_is_limited(table):
    wide = KVLayout(num_layers=TILINGS_MAX + 2, num_kv_heads=1, row_bytes=8)
    namespace, _ = table.register(identity(), [wide])
    layers = wide.num_layers
    cuts = [[Shard(0, 1, 0, at), Shard(0, 1, at, layers)] for at in range(1, layers)]
    assert namespace.tiling(cuts[0]) is namespace.tiling(list(cuts[0]))
    for cut in cuts[:TILINGS_MAX]:
        namespace.tiling(cut)
    with pytest.raises(ProtocolError, match="ways already"):
        namespace.tiling(cuts[TILINGS_MAX])
    assert namespace.tiling(cuts[0]).object_bytes == (8 * CHUNK_TOKENS, (layers - 1) * 8 * CHUNK_TOKENS)


def test_an_object_that_no_arena_frame_holds_is_refused_with_advice(table):
    namespace, _ = table.register(identity(), [KVLayout(num_layers=4, num_kv_heads=2, row_bytes=1 << 20)])
    with pytest.raises(ProtocolError, match="host_bytes"):
        namespace.tiling([Shard(0, 2, 0, 4)])


def test_the_namespace_registered_longest_ago_is_forgotten_past_the_limit(table):
    first, _ = table.register(identity("0"), [LAYOUT])
    second, _ = table.register(identity("1"), [LAYOUT])
    for number in range(2, NAMESPACES_MAX):
        table.register(identity(str(number)), [LAYOUT])
    table.register(identity("0"), [LAYOUT])
    table.register(identity("new"), [LAYOUT])
    assert table.get(first.id) is first
    with pytest.raises(ProtocolError):
        table.get(second.id)
    assert len(table) == NAMESPACES_MAX
