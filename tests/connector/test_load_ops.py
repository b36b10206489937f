"""From a match to loads: which chunks, for which tokens of the prompt, in which parts."""

import pytest
from msgspec.structs import replace

from cachetier.core.messages import TIER_DISK, TIER_HOST
from cachetier_blend.plan import BlendPlan, DocumentLoad, Run
from cachetier_connector.blend_schedule import num_held
from cachetier_connector.break_even import Choice
from cachetier_connector.load_ops import (
    blend_loads,
    documents_as_hit,
    exact_end_of,
    load_op,
    share_choice,
    tiers_of_load,
)
from tests.connector.blends import tracked_of

LOADS = (DocumentLoad(0, 416, 656), DocumentLoad(1, 672, 800))


def blended(computes: tuple[Run, ...] = (Run(192, 416), Run(656, 672))):
    """Return a request whose first 192 tokens are held exactly, and a document from token 400 and from 656 on."""
    tracked = tracked_of("r", 900, [(400, 256), (656, 192)], prefix=192)
    tracked.blend = BlendPlan(LOADS, computes, end=800, approximate_from=416)
    return tracked


def test_a_load_takes_the_chunks_that_its_tokens_touch():
    tracked = tracked_of("r", 500, [], prefix=256)
    op = load_op(tracked, tracked.ticket, 70, 130)
    assert (op.start, op.end, op.first_chunk, op.chunks.frames, op.shift, op.part) == (70, 130, 1, [1, 2], 0, None)


def test_a_document_is_loaded_from_its_own_chunks_whose_positions_count_from_its_start():
    tracked = blended()
    op = load_op(tracked, tracked.ticket.documents[0].ticket, 416, 600, shift=400, part=7)
    assert (op.start, op.end, op.first_chunk, op.shift, op.part) == (416, 600, 0, 400, 7)
    assert op.chunks.frames == [1000, 1001, 1002, 1003]
    op = load_op(tracked, tracked.ticket.documents[0].ticket, 470, 528, shift=400)
    assert (op.first_chunk, op.chunks.frames) == (1, [1001])


def test_a_blend_loads_the_rest_of_its_exact_prefix_and_each_document_as_numbered_parts():
    loads = blend_loads(blended(), 32)
    assert [(load.part, load.start, load.end, load.shift) for load in loads] == [
        (0, 32, 192, 0),
        (1, 416, 656, 400),
        (2, 672, 800, 656),
    ]
    assert [load.chunks.frames[0] for load in loads] == [0, 1000, 2000]


def test_a_prefix_that_vllm_holds_itself_is_no_part():
    loads = blend_loads(blended(), 192)
    assert [(load.part, load.start) for load in loads] == [(0, 416), (1, 672)]


def test_the_exact_prefix_ends_where_the_first_run_begins_whatever_it_is():
    assert exact_end_of(blended()) == 192
    assert exact_end_of(blended((Run(656, 672),))) == 416
    assert exact_end_of(blended(())) == 416


def test_only_the_exact_part_of_a_blend_counts_as_a_hit():
    tracked = blended()
    assert tiers_of_load(tracked, 32, 800) == {TIER_HOST: 160}
    assert tiers_of_load(tracked, 192, 800) == {}
    tracked.blend = None
    assert tiers_of_load(tracked, 32, 100) == {TIER_HOST: 68}
    tracked.ticket = None
    assert tiers_of_load(tracked, 32, 100) == {}


def on_disk(tracked, ready_in_s: list[list[float]]):
    """Have all documents of a request lie on disk."""
    for found, ready in zip(tracked.ticket.documents, ready_in_s, strict=True):
        tiers = bytes([TIER_DISK] * found.ticket.reply.num_chunks)
        found.ticket.reply = replace(found.ticket.reply, tiers=tiers, ready_in_s=ready)
    return tracked.ticket


def test_documents_count_as_one_hit_that_the_disk_reads_in_the_order_of_the_prompt():
    ticket = on_disk(tracked_of("r", 900, [(400, 128), (656, 192)]), [[1.0, 2.0], [3.0, 4.0, 5.0]])
    hit = documents_as_hit(ticket, ticket.replied_s + 0.5)
    assert (hit.tiers, list(hit.ready_in_s), hit.elapsed_s) == (bytes([TIER_DISK] * 5), [1.0, 2.0, 3.0, 4.0, 5.0], 0.5)
    assert hit.end_of(5) == 320, "no document has a last token of the prompt"


def test_a_disk_whose_speed_is_known_for_some_documents_only_is_unknown():
    hit = documents_as_hit(on_disk(tracked_of("r", 900, [(400, 128), (656, 128)]), [[], [3.0, 4.0]]), 0.0)
    assert list(hit.ready_in_s) == []


@pytest.mark.parametrize(
    ("num_chunks", "shares", "num_cut"), [(0, [0, 0], 2), (1, [1, 0], 2), (3, [2, 1], 1), (5, [2, 3], 0)]
)
def test_what_is_worth_loading_is_taken_from_the_first_documents(num_chunks, shares, num_cut):
    tracked = tracked_of("r", 900, [(400, 128), (656, 192)])
    cut = share_choice(tracked.ticket, Choice(num_chunks, 0.7))
    tickets = [found.ticket for found in tracked.ticket.documents]
    assert [ticket.choice for ticket in tickets] == [Choice(share, 0.7) for share in shares]
    assert [num_held(ticket) for ticket in tickets] == [64 * share for share in shares]
    assert len(cut) == num_cut
    op = load_op(tracked, tickets[0], 400, 464, shift=400)
    assert op.patience_s == 0.7


def test_of_a_document_whose_lease_has_expired_nothing_is_held():
    tracked = tracked_of("r", 900, [(400, 128)])
    [found] = tracked.ticket.documents
    assert num_held(found.ticket) == 128
    found.ticket.is_released = True
    assert num_held(found.ticket) == 0
