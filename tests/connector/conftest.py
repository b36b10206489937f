"""One server for the tests of each module."""

from collections.abc import Iterator

import pytest

from tests.connector.servers import Tier
from tests.service.running import RunningServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("tier") / "data") as running:
        yield running


@pytest.fixture
def tier(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[Tier]:
    """A namespace of the test's own."""
    tier = Tier(server, weights=request.node.name)
    yield tier
    tier.link.close()
