"""A scheduler half for tests, against a real server."""

from cachetier.core.config import ConnectorConfig
from cachetier.core.layout import Shard
from cachetier_connector.facts import EngineFacts
from cachetier_connector.scheduler_half import SchedulerHalf
from tests.connector.engines import FakeRequest
from tests.connector.servers import BLOCK, LAYOUT, Tier, eventually, identity, stats_of


class Scheduling:
    """A scheduler half, and vLLM's part of the conversation with it.

    Attributes:
        name: of its engine.
    """

    def __init__(self, tier: Tier, name: str, *, role: str = "both", device: str = "cpu", **settings) -> None:
        self.name = f"{name}, a {role}"
        facts = EngineFacts(
            engine=self.name,
            config=ConnectorConfig(server=f"unix:{tier.server.socket_path}", match_deadline_ms=5000, **settings),
            name=self.name,
            role=role,
            block_tokens=BLOCK,
            layout=LAYOUT,
            tiling=[Shard(0, 2, 0, 2)],
            device=device,
            tensor_parallel=1,
            pipeline_parallel=1,
            pass_tokens_max=1024,
            pass_runs_max=16,
            blend_refusal="",
        )
        self.half = SchedulerHalf(facts, identity(name), lambda: tier.server.socket_path)
        self.server = tier.server

    def arrive(self, request: FakeRequest) -> int:
        """Let `request` arrive; return how many tokens are found for it."""
        self.half.on_new_request(request)
        return self.ask(request)

    def ask(self, request: FakeRequest, num_computed: int = 0) -> int:
        tracked = self.half._requests.get(request.request_id)
        if tracked is not None and tracked.ticket is not None:
            eventually(lambda: self.half.get_num_new_matched_tokens(request, num_computed)[0] is not None)
            eventually(tracked.ticket.done.is_set)
        count, _ = self.half.get_num_new_matched_tokens(request, num_computed)
        assert count is not None
        return count

    def leases(self) -> int:
        return stats_of(self.server)["leases"]
