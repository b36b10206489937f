"""Whom a request goes to, as a function of what is known of engines."""

import pytest

from cachetier.route.choice import (
    SLACK_PROMPT_TOKENS,
    SLACK_REQUESTS,
    are_paired,
    choose_consumer,
    choose_producer,
    serving,
)
from cachetier.route.engine import Engine

OLD, NEW = b"o" * 16, b"n" * 16


def engine(name: str, role: str = "consumer", namespace: bytes = OLD, **changes: object) -> Engine:
    fields = {"trouble": "", "models": ("small",)} | changes
    fields["models"] = dict.fromkeys(fields["models"])
    return Engine(name, "http://host", role, namespace, **fields)


def name_of(chosen: Engine | None) -> str:
    return chosen.name if chosen is not None else ""


def test_only_who_is_up_and_serves_the_model_is_asked() -> None:
    engines = [
        engine("a"),
        engine("b", trouble="it is down"),
        engine("c", models=("large", "small")),
        engine("d", models=()),
    ]
    assert [each.name for each in serving(engines, "small")] == ["a", "c"]
    assert [each.name for each in serving(engines, "large")] == ["c"]
    assert [each.name for each in serving(engines, None)] == ["a", "c", "d"]


def test_the_consumer_with_least_to_do_answers_and_equals_take_turns() -> None:
    one, other = engine("a", num_in_flight=3), engine("b", num_others=1, num_in_flight=1)
    assert choose_consumer([one, other], "") is other
    other.num_waiting = 1
    assert choose_consumer([one, other], "") is one, "a queue weighs more than what runs"
    one, other = engine("a", chosen_at=7), engine("b", chosen_at=6)
    assert choose_consumer([one, other], "") is other
    other.kv_usage = 0.5
    assert choose_consumer([one, other], "") is one
    assert choose_consumer([], "") is None


def test_who_had_the_beginning_answers_until_it_has_clearly_more_to_do() -> None:
    favourite, idle = engine("a", num_in_flight=SLACK_REQUESTS), engine("b")
    assert choose_consumer([favourite, idle], "a") is favourite
    favourite.num_in_flight += 1
    assert choose_consumer([favourite, idle], "a") is idle
    assert choose_consumer([idle], "a") is idle


@pytest.mark.parametrize(
    ("roles", "must_store", "chosen"),
    [
        (["producer", "consumer"], False, "consumer"),
        (["producer", "both"], False, "both"),
        (["producer"], False, "producer"),
        (["consumer", "both"], True, "both"),
        (["consumer", "producer"], True, "producer"),
        (["consumer"], True, "consumer"),
    ],
)
def test_roles_say_who_answers_if_there_is_a_choice(roles: list[str], must_store: bool, chosen: str) -> None:
    assert name_of(choose_consumer([engine(role, role) for role in roles], "", must_store=must_store)) == chosen


def test_a_prompt_that_is_being_prefilled_goes_to_who_can_load_it() -> None:
    producer = engine("p", "producer", NEW)
    old, new = engine("old", num_in_flight=0), engine("new", namespace=NEW, num_in_flight=99)
    assert choose_consumer([old, new], "old", producer=producer) is new
    assert choose_consumer([old], "", producer=producer) is old, "better without the prefill than not at all"


def test_the_producer_has_the_consumers_weights_and_least_to_compute() -> None:
    consumer = engine("c")
    many, few, strange = engine("p1", "producer"), engine("p2", "producer"), engine("p3", "producer", NEW)
    many.prompt_tokens_in_flight, few.prompt_tokens_in_flight, few.num_in_flight = 9000, 600, 5
    assert choose_producer([consumer, many, few, strange], "", consumer) is few
    assert choose_producer([consumer, strange], "", consumer) is None
    many.prompt_tokens_in_flight = 600 + SLACK_PROMPT_TOKENS
    assert choose_producer([many, few], "p1", consumer) is many
    many.prompt_tokens_in_flight += 1
    assert choose_producer([many, few], "p1", consumer) is few
    few.num_others = 10
    assert choose_producer([many, few], "", consumer) is many, "others' prompts count, too"


@pytest.mark.parametrize("role", ["both", "producer"])
def test_who_can_store_itself_is_not_prefilled_for(role: str) -> None:
    assert choose_producer([engine("p", "producer")], "", engine("c", role)) is None


def test_engines_that_do_both_do_not_prefill_for_others() -> None:
    assert choose_producer([engine("b", "both"), engine("c2")], "", engine("c")) is None


def test_engines_are_paired_by_weights_and_by_models_only_where_nobody_knows_these() -> None:
    one = engine("p", "producer")
    assert are_paired(one, engine("c", models=("another name",)))
    assert not are_paired(one, one)
    assert not are_paired(one, engine("c", namespace=NEW))
    assert not are_paired(one, engine("c", namespace=b""))
    unknown = engine("p", "producer", b"", models=("small", "adapter"))
    assert are_paired(unknown, engine("c", namespace=b"", models=("adapter", "small")))
    assert not are_paired(unknown, engine("c", namespace=b"", models=("small",)))
