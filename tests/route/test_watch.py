"""What the router sees of engines, and hears of them from a real server."""

import asyncio
from pathlib import Path

import pytest

from cachetier.core.engine_messages import AnnounceEngine, SetRole
from cachetier.route.watch import load_of, models_of
from tests.route.standing import LONG, StandIn, eventually, in_loop, standing
from tests.service.running import TIMEOUT_S, RunningServer, TinyEngine


def announce(engine: TinyEngine, name: str, role: str, url: str) -> None:
    numbers = {"tensor_parallel": 1, "pipeline_parallel": 1, "block_tokens": 16}
    session, namespace = engine.session.id, engine.namespace
    message = AnnounceEngine(session=session, name=name, role=role, namespace=namespace, url=url, **numbers)
    engine.client.call(message, TIMEOUT_S)


def test_load_is_read_from_vllms_metrics() -> None:
    text = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a {b} c"} 3.0
vllm:num_requests_running{engine="1",model_name="a {b} c"} 2.0
vllm:num_requests_waiting{engine="0",model_name="a {b} c"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 99.0
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:kv_cache_usage_perc{engine="1"} 0.75
"""
    assert load_of(text) == (5, 4, 0.75)
    assert load_of(b"vllm:num_requests_running 2\nother 1") == (2, 0, 0.0)
    assert load_of(b"") == (0, 0, 0.0)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"data": [{}]}'])
def test_what_is_no_list_of_models_names_none(body: bytes) -> None:
    assert models_of(body) == {}


@in_loop
async def test_an_engine_is_out_while_it_is_ill_or_gone_and_back_when_it_answers() -> None:
    engine = StandIn("e")
    async with standing(engine) as router:
        assert router.is_up("e")
        engine.is_healthy = False
        await eventually(lambda: not router.is_up("e"))
        engine.is_healthy = True
        await eventually(lambda: router.is_up("e"))
        await engine.stop()
        await eventually(lambda: not router.is_up("e"))
        engine.models = ["larger"]
        await engine.start()
        await eventually(lambda: router.is_up("e"))
        assert (await router.ask()).status == 404
        assert (await router.ask(model="larger")).status == 200


@in_loop
async def test_what_others_have_an_engine_do_counts() -> None:
    busy, idle = StandIn("busy"), StandIn("idle")
    async with standing(busy, idle) as router:
        busy.num_running, busy.num_waiting = 5, 1
        await eventually(lambda: router.fleet.engines[0].num_others == 6)
        answers = [await router.ask(f"{number} {LONG}") for number in range(6)]
        assert {answer.consumer for answer in answers} == {"idle"}


@in_loop
async def test_the_servers_engines_are_used_in_the_roles_that_it_says(tmp_path: Path) -> None:
    stand_ins = [StandIn("p"), StandIn("c"), StandIn("x")]
    for each in stand_ins:
        await each.start()
    with RunningServer(tmp_path / "data") as server:
        engines = [TinyEngine(server.socket_path, weights) for weights in ("w", "w", "other")]
        for engine, each, role in zip(engines, stand_ins, ("producer", "consumer", "producer"), strict=True):
            announce(engine, each.name, role, each.url)
        async with standing(socket=server.socket_path) as router:
            answers = [await router.ask(f"{number} {LONG}") for number in range(4)]
            assert {(each.producer, each.consumer) for each in answers} == {("p", "c")}, "x has other weights"
            engines[0].client.call(SetRole(name="p", role="consumer"), TIMEOUT_S)
            await eventually(lambda: router.fleet.engines[1].role == "consumer", 3.0)
            answers = [await router.ask(f"{number} {LONG}") for number in range(4, 8)]
            assert {(each.producer, each.consumer) for each in answers} == {("", "c"), ("", "p")}
            await asyncio.to_thread(server.kill)
            await asyncio.sleep(1.5)
            assert (await router.ask()).status == 200, "engines serve without the server"
            assert len(router.fleet.engines) == 3
    for engine in engines:
        engine.close()
    for each in stand_ins:
        await each.stop()
