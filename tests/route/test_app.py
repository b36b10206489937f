"""The router's own paths: engines, models, health, metrics, and who may use them."""

import pytest

from cachetier.route import app
from tests.route.standing import LONG, SHORT, StandIn, in_loop, standing

TOKEN = "0123456789abcdef-token"


@in_loop
async def test_engines_are_added_listed_and_removed() -> None:
    first, second = StandIn("first"), StandIn("second", "both")
    await second.start()
    async with standing(first) as router:
        new = {"name": "second", "role": "producer", "url": second.url + "/v1"}
        async with router.http.post(router.url + "/engines", json=new) as reply:
            assert reply.status == 201
            shown = await reply.json()
        assert (shown["name"], shown["role"], shown["url"]) == ("second", "producer", second.url)
        assert (shown["is_up"], shown["models"], shown["kv_usage"]) == (True, ["small"], 0.25)
        for url, words in ((first.url + "/nowhere", "serves no model"), ("http://127.0.0.1:1", "annot connect")):
            sick = {"name": "sick", "role": "both", "url": url}
            async with router.http.post(router.url + "/engines", json=sick) as reply:
                shown = await reply.json()
            assert not shown["is_up"]
            assert words in shown["trouble"]
        async with router.http.delete(router.url + "/engines/sick") as reply:
            assert reply.status == 200
        async with router.http.get(router.url + "/engines") as reply:
            assert [engine["name"] for engine in await reply.json()] == ["first", "second"]
        assert (await router.ask()).producer == "second"
        async with router.http.post(router.url + "/engines", json=new | {"role": "consumer"}) as reply:
            assert (await reply.json())["role"] == "consumer"
        assert (await router.ask()).producer == ""
        for status in (200, 404):
            async with router.http.delete(router.url + "/engines/second") as reply:
                assert reply.status == status
        assert {(await router.ask(f"{number} {LONG}")).consumer for number in range(4)} == {"first"}
    await second.stop()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"name": "e", "role": "both"}',
        b'{"name": "e", "role": "reader", "url": "http://h:1"}',
        b'{"name": "e", "role": "both", "url": "h:1"}',
        b'{"name": "e", "role": "both", "url": "http://h:1", "more": 1}',
    ],
)
@in_loop
async def test_an_engine_that_cannot_be_is_refused(body: bytes) -> None:
    async with standing() as router:
        url, headers = router.url + "/engines", {"Content-Type": "application/json"}
        async with router.http.post(url, data=body, headers=headers) as reply:
            assert reply.status == 400
            assert (await reply.json())["error"]["message"]
        async with router.http.post(url, data=body, headers={"Content-Type": "text/plain"}) as reply:
            assert reply.status == 415, "a page of another site can have a browser send this"
        assert router.fleet.engines == []


@in_loop
async def test_models_are_those_of_the_engines_that_are_up() -> None:
    one, other, down = StandIn("1", models=("a", "b")), StandIn("2", models=("b", "c")), StandIn("3", models=("d",))
    down.is_healthy = False
    async with standing(one, other, down) as router, router.http.get(router.url + "/v1/models") as reply:
        models = await reply.json()
    assert models["object"] == "list"
    cards = [(card["id"], card["max_model_len"]) for card in models["data"]]
    assert cards == [("a", 4096), ("b", 4096), ("c", 4096)], "as the engines wrote them"


@in_loop
async def test_health_says_whether_anybody_can_answer() -> None:
    async with standing() as router:
        async with router.http.get(router.url + "/health") as reply:
            assert reply.status == 503
        assert (await router.ask()).status == 503
    async with standing(StandIn("e")) as router, router.http.get(router.url + "/health") as reply:
        assert (reply.status, await reply.json()) == (200, {"engines_up": 1})


@in_loop
async def test_metrics_count_requests_by_engine_and_work() -> None:
    async with standing(StandIn("p", "producer"), StandIn("c")) as router:
        for prompt in (LONG, SHORT):
            await router.ask(prompt)
        assert await router.metric('cachetier_route_requests_total{engine="c",work="decode"}') == 2
        assert await router.metric('cachetier_route_requests_total{engine="p",work="prefill"}') == 1
        assert await router.metric("cachetier_route_first_byte_seconds_count") == 2
        assert await router.metric('cachetier_route_request_seconds_count{work="decode"}') == 2
        assert await router.metric('cachetier_route_engine_up{engine="p",role="producer"}') == 1
        assert await router.metric('cachetier_route_in_flight{engine="c",role="consumer"}') == 0


@in_loop
async def test_with_a_token_everything_needs_it_and_engines_get_their_own() -> None:
    engine = StandIn("e")
    async with standing(engine, token=TOKEN) as router:
        for path in ("/engines", "/health", "/metrics", "/v1/models", "/v1/completions"):
            for headers in ({}, {"Authorization": f"Bearer {TOKEN}x"}):
                async with router.http.get(router.url + path, headers=headers) as reply:
                    assert reply.status == 401
        body = {"model": "small", "prompt": SHORT}
        right = {"Authorization": f"Bearer {TOKEN}"}
        async with router.http.post(router.url + "/v1/completions", json=body, headers=right) as reply:
            assert reply.status == 200
    assert "Authorization" not in engine.requests[0][1], "the router's token is none of the engine's business"


@in_loop
async def test_clients_keys_are_the_engines_where_the_router_has_none() -> None:
    engine = StandIn("e")
    async with standing(engine) as router:
        headers = {"Authorization": "Bearer theirs", "X-Request-Id": "7", "Connection": "X-Hop", "Accept": "a/b"}
        body = {"model": "small", "prompt": SHORT}
        async with router.http.post(router.url + "/v1/completions", json=body, headers=headers) as reply:
            assert reply.status == 200
    seen = engine.requests[0][1]
    assert (seen["Authorization"], seen["X-Request-Id"], seen["Accept"]) == ("Bearer theirs", "7", "a/b")


@in_loop
async def test_the_engines_key_is_taken_from_the_environment() -> None:
    engine = StandIn("e")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", "the-key")
        async with standing(engine, token=TOKEN) as router:
            body, headers = {"model": "small", "prompt": SHORT}, {"Authorization": f"Bearer {TOKEN}"}
            async with router.http.post(router.url + "/v1/completions", json=body, headers=headers) as reply:
                assert reply.status == 200
    assert engine.requests[0][1]["Authorization"] == "Bearer the-key"


@in_loop
async def test_a_body_that_is_too_large_is_refused() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "MAX_BODY_BYTES", 1 << 20)
        async with standing(StandIn("e")) as router:
            assert (await router.ask("x" * (1 << 19))).status == 200
            assert (await router.ask("x" * (1 << 20))).status == 413
