"""How long the scheduler's thread itself waits for the answer to a match: hardly ever, and never for long.

Belongs to that thread. A match that is not there when vLLM asks is asked for again in a later step. Only two moments
are worth a wait, each once a step: vLLM sleeps for 1 ms before it asks again when it has nothing to compute, while most
matches take less; and many long prompts at once keep the engine's process so busy that the matcher's thread hardly
runs, so that it may have the answer when the match would be given up.
"""

from cachetier_connector.matcher import Matcher
from cachetier_connector.requests import MatchTicket

IDLE_WAIT_S = 0.003
LAST_WAIT_S = 0.05


class Patience:
    """What is left of both waits in the step under way."""

    def __init__(self, matcher: Matcher) -> None:
        """Begin with an idle engine; `matcher` says which tickets are late."""
        self._matcher, self._idle_s, self._last_s = matcher, IDLE_WAIT_S, LAST_WAIT_S

    def begin_step(self, *, is_idle: bool) -> None:
        """Renew both waits; `is_idle`: the engine has nothing to compute in this step."""
        self._idle_s, self._last_s = IDLE_WAIT_S if is_idle else 0.0, LAST_WAIT_S

    def has_answer(self, ticket: MatchTicket) -> bool:
        """Tell whether a match has been answered, after a wait if this is the moment for one."""
        if ticket.done.is_set():
            return True
        if self._matcher.is_late(ticket):
            wait_s, self._last_s = self._last_s, 0.0
        else:
            wait_s, self._idle_s = self._idle_s, 0.0
        return wait_s > 0 and ticket.done.wait(wait_s)
