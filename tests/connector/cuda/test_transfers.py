"""Transfers move exactly the bytes they are asked to, never across the border of a cell, and as few as they can."""

from hypothesis import given
from hypothesis import strategies as st

from cachetier_connector.cuda.transfers import CELL_BYTES, JOIN_BELOW_BYTES, Transfer, plan_rows, plan_transfers
from tests.connector.cuda.host_device import rows_of

MIB = 1 << 20
ORIGIN = 0x7F0000001000

copies = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 3), st.sampled_from([4096, MIB, 6 * MIB, 8 * MIB])).map(
        lambda drawn: (drawn[0] * 64 * MIB - (drawn[0] and 4096) * drawn[1], drawn[2])
    ),
    max_size=12,
)


def pairs_of(host: int, device: int, width: int) -> set[tuple[int, int]]:
    return {(host + offset, device + offset) for offset in range(0, width, 4096)}


@given(copies)
def test_every_byte_arrives_where_it_should_and_no_transfer_crosses_a_border(drawn):
    asked, device = [], 0
    for offset, size in drawn:
        asked.append((ORIGIN + offset, device, size))
        device += size
    transfers = plan_transfers(asked, ORIGIN)
    found = [pair for transfer in transfers for row in rows_of(transfer) for pair in pairs_of(*row)]
    wanted = [pair for copy in asked for pair in pairs_of(*copy)]
    assert sorted(found) == sorted(wanted)
    for transfer in transfers:
        last = transfer.host + (transfer.rows - 1) * transfer.host_pitch_bytes + transfer.width_bytes - 1
        assert (transfer.host - ORIGIN) // CELL_BYTES == (last - ORIGIN) // CELL_BYTES


def test_neighbours_become_one_transfer():
    step, size = 9 * MIB // 8, MIB
    spaced = [(ORIGIN + n * step, n * size, size) for n in range(8)]
    assert plan_transfers(spaced, ORIGIN) == [Transfer(ORIGIN, 0, size, 8, step, size)]
    close = [(ORIGIN + n * size, n * size, size) for n in range(8)]
    assert plan_transfers(close, ORIGIN) == [Transfer(ORIGIN, 0, 8 * size)]
    assert len(plan_transfers(spaced[::-1], ORIGIN)) == 8


def test_what_is_large_goes_alone():
    size = JOIN_BELOW_BYTES
    assert len(plan_transfers([(ORIGIN + n * 2 * size, n * size, size) for n in range(4)], ORIGIN)) == 4


@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=20),
    st.integers(0, 20),
    st.sampled_from([MIB // 2, MIB, 8 * MIB]),
)
def test_equal_rows_are_planned_as_all_else_is(places, num_in_order, width):
    step = 9 * width // 8
    hosts = [ORIGIN + place * step for place in (*places, *range(places[-1] + 1, places[-1] + 1 + num_in_order))]
    found = plan_rows(hosts, 4096, width, width, ORIGIN)
    assert found == plan_transfers([(host, 4096 + n * width, width) for n, host in enumerate(hosts)], ORIGIN)
