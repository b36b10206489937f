"""The memory of prompts' beginnings."""

from cachetier.route.affinity import Affinity


def test_the_engine_with_most_of_the_prompt_is_found_and_the_last_one_of_two() -> None:
    affinity = Affinity()
    affinity.note([1, 2, 3], "a")
    affinity.note([1, 2, 30], "b")
    everyone = {"a", "b"}
    assert affinity.find([1, 2, 3, 4], everyone) == "a"
    assert affinity.find([1, 2, 30], everyone) == affinity.find([1, 2, 31], everyone) == "b"
    assert affinity.find([7, 2, 3], everyone) == affinity.find([], everyone) == ""
    assert affinity.find([1, 2, 3], {"b"}) == "b", "who is not there any more is passed over"
    assert affinity.find([1, 2, 3], {"c"}) == ""


def test_what_was_longest_not_used_is_forgotten_ends_before_beginnings() -> None:
    affinity = Affinity(capacity=4)
    affinity.note([1, 2, 3], "a")
    affinity.note([10, 11], "b")
    assert affinity.find([1], {"a"}) == affinity.find([1, 2], {"a"}) == "a"
    affinity.note([1], "a")
    affinity.note([20, 21], "c")
    assert affinity.find([1, 2], {"a"}) == "a"
    assert affinity.find([10], {"b"}) == "b"
    affinity.note([30], "d")
    assert affinity.find([1], {"a"}) == "a"
    assert affinity.find([10], {"b"}) == ""
