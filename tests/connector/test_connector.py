"""What workers tell the scheduler half, on its way through vLLM."""

import pickle

from cachetier_connector.connector import StepReport


def test_of_two_ranks_the_slower_one_counts():
    one, other = StepReport(7, {"a": 1.0, "b": 3.0}), StepReport(7, {"b": 2.0, "c": 4.0})
    for both in (one.aggregate(other), other.aggregate(one)):
        assert (both.step, both.load_s) == (7, {"a": 1.0, "b": 3.0, "c": 4.0})


def test_a_report_reaches_another_process():
    report = pickle.loads(pickle.dumps(StepReport(7, {"a": 1.0})))
    assert (report.step, report.load_s) == (7, {"a": 1.0})
