"""The benchmark of finding documents finds them: it asserts so itself, and ends."""

import importlib
import sys

from tests.bench.test_report import SCRIPT
from tests.service.running import RunningServer


def test_it_measures_a_real_server(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])  # its scripts import each other
    bench = importlib.import_module("match_documents")
    with RunningServer(tmp_path / "data", "--host-bytes", "256MiB", "--disk-bytes", "1GiB") as server:
        rows = bench.measure(server.socket_path, num_documents=20, repeats=2)
    assert {row["parameters"]["case"] for row in rows} == {"found", "none", "hashing"}
    assert all(row["value"] > 0 for row in rows)
