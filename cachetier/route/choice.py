"""Whom a request goes to: pure functions from what is known of engines to one of them.

A request is answered by a consumer, or by an engine that does both, and by a producer only where nobody else is left.
Of those that may, the one that had the beginning of the prompt last gets it, unless another has clearly less to do.
The prompt is prefilled by a producer, chosen likewise among those that store what this consumer loads: with the same
weights. An engine that does both prefills for itself, and for others only when a request names it: it would give its
own requests' time away, and as a consumer it does not wait for what others only promise.
"""

from collections.abc import Callable, Sequence

from cachetier.core.engine_messages import CONSUMER, PRODUCER
from cachetier.route.engine import Engine

# How much more the engine that had a prompt's beginning last may have to do than another before it is passed over. A
# consumer that gets another prompt's beginning only has to load it.
SLACK_REQUESTS = 8
SLACK_PROMPT_TOKENS = 8192


def serving(engines: Sequence[Engine], model: str | None) -> list[Engine]:
    """Return the engines that a request for `model` can go to now."""
    return [engine for engine in engines if engine.is_up and engine.serves(model)]


def are_paired(producer: Engine, consumer: Engine) -> bool:
    """Tell whether what `producer` stores is what `consumer` loads.

    Of engines whose namespaces nobody knows, those that serve the same models are taken for a pair. If they are none,
    their keys differ, and the consumer finds nothing and computes.
    """
    if producer is consumer or producer.namespace != consumer.namespace:
        return False
    return bool(producer.namespace) or sorted(producer.models) == sorted(consumer.models)


def choose_consumer(
    engines: Sequence[Engine], favourite: str, *, producer: Engine | None = None, must_store: bool = False
) -> Engine | None:
    """Return who answers, or None if `engines` are none.

    Args:
        engines: those that serve the model and were not tried yet.
        favourite: name of the one that had the prompt's beginning last.
        producer: who prefills the prompt already; consumers that load what it stores come first.
        must_store: the prompt has to get into the tier (it is a document), so consumers come last.
    """
    avoided = CONSUMER if must_store else PRODUCER
    willing = [engine for engine in engines if engine.role != avoided] or list(engines)
    if producer is not None:
        willing = [engine for engine in willing if are_paired(producer, engine)] or willing
    return _pick(willing, favourite, lambda engine: engine.requests, SLACK_REQUESTS)


def choose_producer(engines: Sequence[Engine], favourite: str, consumer: Engine) -> Engine | None:
    """Return who prefills for `consumer`, or None: it does so itself."""
    if consumer.role != CONSUMER:
        return None
    willing = [engine for engine in engines if engine.role == PRODUCER and are_paired(engine, consumer)]
    return _pick(willing, favourite, lambda engine: engine.prompt_tokens, SLACK_PROMPT_TOKENS)


def _pick(engines: Sequence[Engine], favourite: str, load: Callable[[Engine], int], slack: int) -> Engine | None:
    """Return the favourite if it has at most `slack` more to do than the least busy one, else that; equals in turn."""
    if not engines:
        return None
    least = min(engines, key=lambda engine: (load(engine), engine.kv_usage, engine.chosen_at))
    liked = next((engine for engine in engines if engine.name == favourite), least)
    return liked if load(liked) <= load(least) + slack else least
