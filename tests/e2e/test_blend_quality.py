"""Answers of blended prompts on a real engine are as good as the quality harness says; see bench/quality."""

from pathlib import Path

import numpy as np
import pytest

from bench.quality.run import measure
from bench.quality.tasks import draw_questions

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

MODELS = Path(__file__).parents[2] / "bench" / "quality" / "models"
NUM_QUESTIONS = 20  # of each kind


def test_facts_of_one_document_survive_and_those_of_several_need_tokens_computed_again(tmp_path):
    """The model's vocabulary has 128 tokens."""
    questions = draw_questions(np.random.default_rng(5), "alias", NUM_QUESTIONS)
    found = {
        (row["question"], row["contender"], row["parameters"].get("budget")): row["value"]
        for row in measure(tmp_path, MODELS / "alias", questions)
    }
    for contender, budget in (("full-prefill", None), ("none", None), ("link", None), ("query", 0.25), ("query", 1.0)):
        assert found["accuracy_in", contender, budget] == 1
    assert found["accuracy_cross", "full-prefill", None] == 1
    assert found["accuracy_cross", "none", None] <= 0.5
    assert found["accuracy_cross", "link", None] <= 0.5
    assert found["accuracy_cross", "query", 0.25] >= 0.9
    assert found["agreement", "query", 1.0] == 1
    assert found["kl", "query", 1.0] < 0.01
