"""The profile of a load: its phases follow each other without gaps, and each is that of its own request."""

import pytest

from bench.gpu.profile import PHASES, phases_ms, table

ASKED = [
    {"tokens": 8192, "started_s": 10.0, "first_token_s": 0.061},
    {"tokens": 8192, "started_s": 11.0, "first_token_s": 0.2},  # computed
    {"tokens": 32768, "started_s": 12.0, "first_token_s": 0.123},
]
LOG = """
(EngineCore pid=7) @10.034000 cachetier: load of 127 chunks: queued 0.10 ms, pushed 20.00 ms, settled 3.00 ms, 46.3 GB/s
(EngineCore pid=7) @10.036000 cachetier: request q1: matched 2.00 ms, planned 4.00 ms, loaded 30.00 ms, scheduled 31.00 ms after it arrived
(EngineCore pid=7) @11.500000 cachetier: load of 511 chunks: queued 0.10 ms, pushed 20.00 ms, settled 3.00 ms, 46.3 GB/s
(EngineCore pid=7) @12.090000 cachetier: load of 511 chunks: queued 0.20 ms, pushed 70.00 ms, settled 6.00 ms, 51.0 GB/s
(EngineCore pid=7) @12.093000 cachetier: request q3: matched 5.00 ms, planned 7.00 ms, loaded 85.00 ms, scheduled 86.00 ms after it arrived
"""  # noqa: E501


def test_phases_are_those_of_the_request_and_add_up() -> None:
    found = phases_ms(LOG, ASKED)
    assert list(found) == [8192, 32768]
    [phases] = found[8192]
    named = dict(zip(PHASES, phases, strict=True))
    assert named["way in"] == pytest.approx(5)
    assert named["match"] == pytest.approx(2)
    assert named["plan"] == pytest.approx(2)
    assert named["hand over"] == pytest.approx(1.9)
    assert (named["queue"], named["push"], named["settle"]) == (0.1, 20, 3)
    assert named["report"] == pytest.approx(1)
    assert named["schedule"] == pytest.approx(1)
    assert named["compute, way out"] == pytest.approx(25)
    assert sum(phases[:-1]) == pytest.approx(named["all"]) == pytest.approx(61)


def test_the_table_has_a_column_a_length_and_hits_to_compare_with() -> None:
    lines = table(LOG, ASKED, {8192: 24.5}).splitlines()
    assert lines[0].split("median of")[1].split() == ["1", "x", "8192", "1", "x", "32768"]
    assert lines[6].split() == ["push", "20.00", "70.00"]
    assert lines[-1].split() == ["GPU", "hit,", "all", "24.50", "0.00"]
