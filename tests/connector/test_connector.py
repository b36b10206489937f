"""What workers tell the scheduler half, on its way through vLLM."""

import pickle

from cachetier_connector.connector import StepReport
from cachetier_connector.plan import Verdict


def test_of_two_ranks_the_slower_one_counts():
    one, other = StepReport(7, {"a": 1.0, "b": 3.0}), StepReport(7, {"b": 2.0, "c": 4.0})
    for both in (one.aggregate(other), other.aggregate(one)):
        assert (both.step, both.load_s) == (7, {"a": 1.0, "b": 3.0, "c": 4.0})


def test_each_rank_tells_what_it_loaded_of_a_blended_request_and_all_compute_the_same():
    one = StepReport(7, parts={"a": {0: [128], 1: [300]}}, computed={"a": 40})
    other = StepReport(7, parts={"a": {1: [290]}, "b": {0: [64]}}, computed={"a": 40}, refusal="no")
    for both in (one.aggregate(other), other.aggregate(one)):
        assert {name: {part: sorted(ends) for part, ends in parts.items()} for name, parts in both.parts.items()} == {
            "a": {0: [128], 1: [290, 300]},
            "b": {0: [64]},
        }
        assert both.computed == {"a": 40}
        assert both.refusal == "no"
    assert one.parts == {"a": {0: [128], 1: [300]}}, "a report is not changed by being put together with another"


def test_what_a_check_finds_is_told_whichever_rank_knows():
    verdict = Verdict(0.0, False)
    knows, other = StepReport(7, verdict=verdict), StepReport(7)
    assert knows.aggregate(other).verdict == other.aggregate(knows).verdict == verdict
    assert other.aggregate(other).verdict is None


def test_a_report_reaches_another_process():
    report = StepReport(7, {"a": 1.0}, {"b": {0: [64]}}, {"b": 3}, "no", Verdict(0.5, True))
    assert pickle.loads(pickle.dumps(report)) == report
