"""From a match to loads: which chunks, for which tokens of the prompt, in which parts."""

from cachetier.core.messages import TIER_HOST
from cachetier_blend.plan import BlendPlan, DocumentLoad, Run
from cachetier_connector.load_ops import blend_loads, exact_end_of, load_op, tiers_of_load
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
