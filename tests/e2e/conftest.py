"""Lets the failed assertions of what the tests share say what was compared."""

import pytest

pytest.register_assert_rewrite("tests.e2e.harness", "tests.e2e.layouts", "tests.e2e.same_answers", "tests.e2e.stand")
