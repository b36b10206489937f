"""The way of requests through a router between real sockets: hand-over, streams, failures, retries, disconnects."""

import asyncio
import json

import aiohttp
import pytest

from cachetier.route import watch
from tests.route.standing import LONG, SHORT, StandIn, eventually, in_loop, standing

STREAM = {"stream": True}


def pair() -> tuple[StandIn, StandIn]:
    return StandIn("p", "producer"), StandIn("c")


@in_loop
async def test_a_long_prompt_goes_to_both_at_once_and_the_consumer_is_told_who_prefills() -> None:
    producer, consumer = pair()
    async with standing(producer, consumer) as router:
        producer.gate.clear()
        answer = await router.ask(max_tokens=9, min_tokens=3, n=2, logprobs=1, seed=5, **STREAM)
        assert (answer.text, answer.is_done) == ("c 0 1 2 3 4 ", True)
        assert (answer.consumer, answer.producer) == ("c", "p")
        [sent] = producer.bodies
        assert (sent["prompt"], sent["seed"], sent["max_tokens"], sent["n"]) == (LONG, 5, 1, 1)
        assert sent["stream"] is False
        assert not {"min_tokens", "logprobs", "kv_transfer_params"} & sent.keys()
        [asked] = consumer.bodies
        assert asked.pop("kv_transfer_params") == {"cachetier": {"prefill": "p"}}
        assert asked == {
            **{"model": "small", "prompt": LONG, "max_tokens": 9, "min_tokens": 3, "n": 2, "logprobs": 1, "seed": 5},
            **STREAM,
        }
        assert producer.num_aborted == 0, "the answer's end is not the prefill's"
        producer.gate.set()


@in_loop
async def test_a_chat_is_handed_over_too() -> None:
    producer, consumer = pair()
    async with standing(producer, consumer) as router:
        messages = [{"role": "user", "content": [{"type": "text", "text": LONG}]}]
        answer = await router.ask(path="/v1/chat/completions", messages=messages, max_completion_tokens=7)
        assert answer.producer == "p"
        await eventually(lambda: producer.requests)
        assert (producer.bodies[0]["max_tokens"], producer.bodies[0]["max_completion_tokens"]) == (1, 1)
        assert consumer.bodies[0]["max_completion_tokens"] == 7


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": SHORT},
        {"prompt": list(range(511))},
        {"kv_transfer_params": {"cachetier": {"prefill": None}}},
        {"kv_transfer_params": {"cachetier": {"prefill": "none", "blend": True}}},
        {"kv_transfer_params": {"cachetier": {"load": False}}},
        {"echo": True},
        {"prompt_logprobs": 1},
    ],
)
@in_loop
async def test_what_is_not_worth_a_hand_over_or_forbids_it_goes_to_the_consumer_alone(fields: dict) -> None:
    producer, consumer = pair()
    async with standing(producer, consumer) as router:
        answer = await router.ask(**fields)
        assert (answer.consumer, answer.producer) == ("c", "")
        assert producer.requests == []
        assert "prefill" not in consumer.wishes()
        assert "blend" in consumer.wishes() or "blend" not in str(fields)


@in_loop
async def test_a_document_goes_to_an_engine_that_stores() -> None:
    async with standing(*pair()) as router:
        answer = await router.ask(kv_transfer_params={"cachetier": {"document": "d"}})
        assert (answer.consumer, answer.producer) == ("p", "")


@in_loop
async def test_token_ids_are_counted_exactly() -> None:
    producer, consumer = pair()
    async with standing(producer, consumer) as router:
        assert (await router.ask(list(range(512)))).producer == "p"
    async with standing(producer, consumer, min_prefill_tokens=5) as router:
        assert (await router.ask([1, 2, 3, 4])).producer == ""
        assert (await router.ask([1, 2, 3, 4, 5])).producer == "p"


@in_loop
async def test_a_request_chooses_its_producer() -> None:
    engines = [StandIn("p1", "producer"), StandIn("p2", "producer"), StandIn("c"), StandIn("b", "both")]
    async with standing(*engines) as router:
        for name in ("p1", "p2", "b", "p2"):
            params = {"cachetier": {"prefill": name, "blend": True}}
            answer = await router.ask(SHORT, kv_transfer_params=params)
            assert answer.producer == name
            assert answer.consumer != name
        assert (await router.ask(kv_transfer_params={"cachetier": {"prefill": "p3"}})).status == 400
        refused = await router.ask(kv_transfer_params={"cachetier": {"prefill": "c"}})
        assert refused.error["message"] == "no engine 'c' can prefill this; those that can: b, p1, p2"


@in_loop
async def test_words_are_passed_on_as_they_come() -> None:
    producer, consumer = pair()
    async with standing(producer, consumer) as router:
        consumer.word_gate.clear()
        body = {"model": "small", "prompt": SHORT, **STREAM}
        async with router.http.post(router.url + "/v1/completions", json=body) as reply:
            first = await reply.content.readline()
            assert json.loads(first.removeprefix(b"data: "))["choices"][0]["text"] == "c "
            assert reply.content_type == "text/event-stream"
            consumer.word_gate.set()
            assert (await reply.read()).endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("has_begun", [False, True])
@in_loop
async def test_a_client_that_goes_away_ends_its_request_at_both_engines_but_no_prefill_of_a_begun_answer(
    has_begun: bool,
) -> None:
    producer, consumer = pair()
    async with standing(producer, consumer) as router:
        producer.gate.clear()
        (consumer.word_gate if has_begun else consumer.gate).clear()
        async with aiohttp.ClientSession() as http:
            body = {"model": "small", "prompt": LONG, **STREAM}
            post = asyncio.ensure_future(http.post(router.url + "/v1/completions", json=body))
            await eventually(lambda: consumer.requests and producer.requests)
            if has_begun:
                await (await post).content.readline()
            post.cancel()
        await eventually(lambda: consumer.num_aborted == 1)
        if has_begun:
            await asyncio.sleep(0.1)
            assert producer.num_aborted == 0
            producer.gate.set()
        else:
            await eventually(lambda: producer.num_aborted == 1)
            assert await router.metric("cachetier_route_gone_total") == 1
        await eventually(lambda: all(engine.num_in_flight == 0 for engine in router.fleet.engines))


@pytest.mark.parametrize("how", ["down", "start", "503", "502"])
@in_loop
async def test_a_consumer_that_fails_before_it_answers_is_replaced_by_another_one(how: str) -> None:
    producer, good, bad = StandIn("p", "producer"), StandIn("good"), StandIn("bad")
    async with standing(producer, good, bad) as router:
        if how == "down":
            await bad.stop()
        else:
            bad.breaks, bad.statuses = (["start"] * 2, []) if how == "start" else ([], [int(how)] * 2)
        answers = [await router.ask(f"{number} {LONG}", **STREAM) for number in range(2)]
        assert [(answer.text, answer.is_done) for answer in answers] == [("good 0 1 2 3 4 ", True)] * 2
        assert len(good.requests) == 2
        assert good.wishes() == {"prefill": "p"}
        assert len(producer.requests) == 2, "one prefill a request, however often it is sent to consumers"
        num_failed = await router.metric('cachetier_route_failures_total{engine="bad",work="decode"}')
        assert num_failed == await router.metric("cachetier_route_retries_total") >= 1


@in_loop
async def test_an_engine_that_failed_is_looked_at_at_once() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "INTERVAL_S", 1000.0)
        async with standing(StandIn("good"), bad := StandIn("bad"), producer := StandIn("p", "producer")) as router:
            await bad.stop()
            await producer.stop()
            answers = [await router.ask(f"{number} {LONG}") for number in range(2)]
            assert [answer.text for answer in answers] == ["good"] * 2
            await eventually(lambda: not router.is_up("bad") and not router.is_up("p"))


@in_loop
async def test_a_producer_that_a_request_names_and_nobody_can_load_from_is_left_alone() -> None:
    producer, consumer = StandIn("p", "producer", models=("small", "large")), StandIn("c")
    async with standing(producer, consumer) as router:
        answer = await router.ask(kv_transfer_params={"cachetier": {"prefill": "p"}})
        assert (answer.text, answer.producer) == ("c", "")
        assert producer.requests == []


@in_loop
async def test_each_engine_is_tried_once_and_the_last_ones_word_is_passed_on() -> None:
    engines = [StandIn("c1"), StandIn("c2"), StandIn("p", "producer")]
    async with standing(*engines) as router:
        for engine in engines:
            engine.statuses = [503]
        answer = await router.ask(SHORT)
        assert (answer.status, answer.error["message"]) == (503, "from p"), "a producer only if no other is left"
        assert [len(engine.requests) for engine in engines] == [1, 1, 1]
        for engine in engines:
            engine.breaks = ["start"]
        answer = await router.ask(SHORT, **STREAM)
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert answer.error["message"].endswith("failed before the answer began, and no other engine is left")
        for engine in engines:
            await engine.stop()
        assert (await router.ask(SHORT)).status == 503
        refused = await router.ask(SHORT)
        assert refused.error["message"] == "no engine can take this request now; out: c1, c2, p"


@in_loop
async def test_a_stream_that_breaks_off_ends_with_an_error_and_is_not_sent_again() -> None:
    producer, consumer, other = *pair(), StandIn("other", "both")
    async with standing(producer, consumer, other) as router:
        consumer.breaks = other.breaks = ["middle"]
        answer = await router.ask(**STREAM)
        assert (answer.text, answer.is_done) == (f"{answer.consumer} ", False)
        assert (answer.error["code"], answer.error["type"]) == (502, "BadGatewayError")
        assert b"half of an ev" not in answer.body
        assert len(consumer.requests) + len(other.requests) == 1
        assert await router.metric("cachetier_route_retries_total") == 0


@in_loop
async def test_any_other_answer_that_breaks_off_is_cut_so_that_nobody_takes_it_for_a_whole_one() -> None:
    consumer = StandIn("c")
    async with standing(consumer) as router, router.http.get(router.url + "/v1/half") as reply:
        assert reply.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await reply.read()


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
@in_loop
async def test_what_an_engine_says_is_passed_on_as_it_is(status: int) -> None:
    consumer = StandIn("c")
    async with standing(consumer) as router:
        consumer.statuses = [status]
        answer = await router.ask(SHORT, **STREAM)
        assert (answer.status, answer.headers["X-Odd"]) == (status, "yes")
        assert answer.error == {"message": "from c", "type": "Odd", "param": None, "code": 1}


@pytest.mark.parametrize("fault", ["down", "start", "status"])
@in_loop
async def test_a_producers_failure_is_none_of_the_request(fault: str) -> None:
    producer, consumer = pair()
    async with standing(producer, consumer) as router:
        if fault == "down":
            await producer.stop()
        producer.breaks, producer.statuses = (["start"], []) if fault == "start" else ([], [500])
        assert (await router.ask(**STREAM)).is_done
        failures = 'cachetier_route_failures_total{engine="p",work="prefill"}'
        async with asyncio.timeout(5):
            while await router.metric(failures) != 1:
                await asyncio.sleep(0.01)
        if fault == "down":
            answer = await router.ask(**STREAM)
            assert (answer.is_done, answer.producer) == (True, ""), "no producer is left"


@in_loop
async def test_equals_take_turns_and_a_prompt_goes_where_its_beginning_went() -> None:
    engines = [StandIn(name, role) for name, role in (("p1", "producer"), ("p2", "producer"), ("c1", ""), ("c2", ""))]
    for engine in engines[2:]:
        engine.role = "consumer"
    async with standing(*engines) as router:
        went = {}
        for number in range(8):
            answer = await router.ask(f"{number} {LONG}")
            went[number] = (answer.producer, answer.consumer)
        assert set(went.values()) == {("p1", "c1"), ("p2", "c2")} or len(set(went.values())) == 4
        for number in (5, 0, 3):
            answer = await router.ask(f"{number} {LONG} and more")
            assert (answer.producer, answer.consumer) == went[number]


@in_loop
async def test_a_request_goes_to_an_engine_that_serves_its_model() -> None:
    small, large = StandIn("s", models=("small", "alias")), StandIn("l", models=("large",))
    async with standing(small, large, StandIn("p", "producer", models=("small",))) as router:
        for model, name in (("small", "s"), ("large", "l"), ("alias", "s"), ("large", "l")):
            answer = await router.ask(model=model)
            assert (answer.consumer, answer.producer) == (name, ""), "the producer serves other models than either"
        unknown = await router.ask(model="huge")
        assert (unknown.status, unknown.error["message"]) == (404, "The model `huge` does not exist.")
        assert (unknown.error["type"], unknown.error["code"]) == ("NotFoundError", 404)


@in_loop
async def test_everything_else_is_passed_to_a_consumer_as_it_came() -> None:
    async with standing(StandIn("p", "producer"), StandIn("c")) as router:
        for path in ("/v1/embeddings?x=%20y", "/tokenize", "/v1/responses"):
            async with router.http.post(router.url + path, data=b'{"model": "small"  }') as reply:
                expected = {"engine": "c", "method": "POST", "path": path, "body": '{"model": "small"  }'}
                assert await reply.json() == expected
        async with router.http.post(router.url + "/v1/completions", data=b"no json") as reply:
            assert reply.status == 500, "the engine has the word"
        async with router.http.get(router.url + "/v1/responses/7") as reply:
            assert (await reply.json())["method"] == "GET"
        async with router.http.post(router.url + "/sleep") as reply:
            assert reply.status == 404, "an engine's own paths are no part of the interface"


@in_loop
async def test_two_hundred_requests_while_engines_come_and_go_are_all_answered() -> None:
    steady, new = [StandIn("p", "producer"), StandIn("c")], StandIn("new")
    restless = [StandIn("p2", "producer"), StandIn("c2"), StandIn("b2", "both")]
    await new.start()
    async with standing(*steady, *restless, StandIn("gone")) as router:
        is_over = False

        async def disturb() -> None:
            while not is_over:
                for engine in restless:
                    await engine.stop()
                    await asyncio.sleep(0.05)
                    await engine.start()

        async def ask(number: int) -> bool:
            await asyncio.sleep(number * 0.02)
            if number == 50:
                fields = {"name": "new", "role": "consumer", "url": new.url}
                async with router.http.post(router.url + "/engines", json=fields) as reply:
                    assert reply.status == 201
            if number == 100:
                async with router.http.delete(router.url + "/engines/gone") as reply:
                    assert reply.status == 200
            answer = await router.ask(f"{number} {LONG}", **(STREAM if number % 2 else {}))
            is_whole = answer.is_done if number % 2 else answer.text == answer.consumer
            return is_whole or (answer.error is not None and answer.error["code"] == 502)

        disturbing = asyncio.create_task(disturb())
        assert all(await asyncio.gather(*map(ask, range(200))))
        is_over = True
        await disturbing
        assert new.requests
        assert not any(engine.num_in_flight for engine in router.fleet.engines)
    await new.stop()
