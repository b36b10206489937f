"""Stage plans: whole pages, each once, and parts that fit. What they are good for is tested in `test_copy_cuda`."""

import pytest

from cachetier.core.errors import ConfigError
from cachetier.core.layout import KVLayout, Shard
from cachetier_connector.cuda.stage_plan import StagedRange, StagePlan, plan_parts

LLAMA = KVLayout(num_layers=32, num_kv_heads=8, row_bytes=512)
MIB = 1 << 20


def test_a_whole_object_is_one_range():
    [plan] = plan_parts(LLAMA, [LLAMA.whole()], LLAMA.whole(), 64, 8 * MIB)
    assert plan.ranges == (StagedRange(0, 0, 0, 8 * MIB),)
    assert plan.page_bytes == (4096,) * 2048


def test_a_rank_of_two_stages_its_half_and_nothing_else():
    [plan] = plan_parts(LLAMA, [LLAMA.whole()], Shard(4, 8, 0, 32), 64, 8 * MIB)
    assert plan.ranges == (StagedRange(0, 4 * MIB, 0, 4 * MIB),)


def test_pieces_in_one_page_are_staged_once():
    layout = KVLayout(num_layers=4, num_kv_heads=4, row_bytes=64)  # a unit has 1 KiB, a head a page
    plan = StagePlan.of(layout, [layout.whole()], Shard(1, 3, 1, 2), 16)
    assert plan.ranges == (StagedRange(0, 4096, 0, 8192),)
    assert plan.unit_offsets == (1024, 5120)


def test_a_shard_too_large_for_a_slot_is_cut_by_heads_and_then_by_layers():
    assert [plan.part for plan in plan_parts(LLAMA, [LLAMA.whole()], LLAMA.whole(), 64, 3 * MIB)] == [
        Shard(0, 2, 0, 32),
        Shard(2, 5, 0, 32),
        Shard(5, 8, 0, 32),
    ]
    parts = [plan.part for plan in plan_parts(LLAMA, [LLAMA.whole()], Shard(0, 2, 0, 32), 64, MIB // 2)]
    assert parts == [Shard(head, head + 1, half * 16, half * 16 + 16) for head in (0, 1) for half in (0, 1)]


def test_parts_of_ones_own_object_share_no_page():
    layout = KVLayout(num_layers=2, num_kv_heads=6, row_bytes=64)  # a head has half a page
    own = [plan.part for plan in plan_parts(layout, [layout.whole()], layout.whole(), 16, 8192)]
    assert own == [Shard(0, 2, 0, 2), Shard(2, 4, 0, 2), Shard(4, 6, 0, 2)]


def test_what_cannot_be_staged_is_refused():
    with pytest.raises(ConfigError, match="do not fit"):
        plan_parts(LLAMA, [LLAMA.whole()], LLAMA.whole(), 64, 16384)
    odd = KVLayout(num_layers=1, num_kv_heads=1, row_bytes=24)
    with pytest.raises(ConfigError, match="multiples of 32"):
        plan_parts(odd, [odd.whole()], odd.whole(), 1, MIB)
