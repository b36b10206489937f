"""Applies the rules of `choice` to the fleet as it is now, and remembers who was chosen. On the event loop's thread."""

from collections.abc import Collection

from cachetier.core.errors import ProtocolError
from cachetier.route.affinity import Affinity
from cachetier.route.choice import choose_consumer, choose_producer, serving
from cachetier.route.engine import Engine
from cachetier.route.fleet import Fleet
from cachetier.route.openai_request import NO_PREFILL, OpenAIRequest


class Dispatch:
    """Says whom a request goes to."""

    def __init__(self, fleet: Fleet, min_prefill_tokens: int) -> None:
        """Prompts of fewer than `min_prefill_tokens` tokens are prefilled where they are answered."""
        self._fleet, self._min_prefill_tokens = fleet, min_prefill_tokens
        self._consumed, self._produced = Affinity(), Affinity()
        self._num_choices = 0

    def named_producer(self, asked: OpenAIRequest) -> Engine | None:
        """Return the engine that the request names to prefill its prompt, if it does.

        Raises:
            ProtocolError: no engine of that name could.
        """
        if asked.wants_prefill in (None, NO_PREFILL):
            return None
        able = {each.name: each for each in serving(self._fleet.engines, asked.model) if each.can_store}
        if asked.wants_prefill not in able:
            names = ", ".join(able) or "none"
            raise ProtocolError(f"no engine {asked.wants_prefill!r} can prefill this; those that can: {names}")
        return able[asked.wants_prefill] if asked.may_hand_over else None

    def consumer(
        self, asked: OpenAIRequest, producer: Engine | None = None, tried: Collection[Engine] = ()
    ) -> Engine | None:
        """Return who is to answer, of those that were not tried yet; see `choose_consumer`."""
        engines = [each for each in serving(self._fleet.engines, asked.model) if each not in tried]
        favourite = self._consumed.find(asked.blocks, {each.name for each in engines})
        return choose_consumer(engines, favourite, producer=producer, must_store=asked.is_document)

    def producer(self, asked: OpenAIRequest, consumer: Engine) -> Engine | None:
        """Return who is to prefill for `consumer`; None: it does so itself."""
        is_worth_it = asked.num_tokens >= self._min_prefill_tokens and asked.wants_prefill != NO_PREFILL
        if not is_worth_it or not asked.may_hand_over:
            return None
        engines = serving(self._fleet.engines, asked.model)
        favourite = self._produced.find(asked.blocks, {each.name for each in engines})
        return choose_producer(engines, favourite, consumer)

    def note_consumer(self, asked: OpenAIRequest, engine: Engine) -> None:
        """Remember that the request is sent to `engine` to be answered."""
        self._note(self._consumed, asked, engine)

    def note_producer(self, asked: OpenAIRequest, engine: Engine) -> None:
        """Remember that its prompt is sent to `engine` to be prefilled."""
        self._note(self._produced, asked, engine)

    def refusal(self, asked: OpenAIRequest) -> tuple[int, str]:
        """Return status and text for a request that nobody can answer now."""
        engines = self._fleet.engines
        if (
            engines
            and all(engine.models for engine in engines)
            and not any(each.serves(asked.model) for each in engines)
        ):
            return 404, f"The model `{asked.model}` does not exist."
        down = ", ".join(engine.name for engine in engines if not engine.is_up)
        return 503, f"no engine can take this request now; out: {down or 'none'}"

    def _note(self, affinity: Affinity, asked: OpenAIRequest, engine: Engine) -> None:
        self._num_choices += 1
        engine.chosen_at = self._num_choices
        affinity.note(asked.blocks, engine.name)
