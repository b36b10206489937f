"""The question to the bus: requests that hit and requests that store at the same time, as fast as an engine goes."""

from bench.gpu.contenders import Contender
from bench.gpu.lab import Lab
from bench.gpu.setting import token_bytes

HELD_PROMPTS = 8
CONCURRENCY = 12
WARM_UP_SHARE = 0.2


def bidirectional(lab: Lab) -> None:
    """Bytes a second to and from the GPU, counted in tokens that were found and tokens that can be found later.

    The model has so much KV for what it computes that requests wait for the bus; the engines' own prefix cache is off.
    """
    length, pairs = lab.setting.pair_tokens, lab.setting.pairs
    held = [(lab.seed(), length) for _ in range(HELD_PROMPTS)]
    new = [(lab.seed(), length) for _ in range(pairs)]
    prompts = [{"parts": [part]} for number in range(pairs) for part in (held[number % len(held)], new[number])]

    def measure(contender: Contender) -> None:
        contender.call("ask", prompts=[{"parts": [part]} for part in held], concurrency=2)
        contender.settle()
        contender.call("ask", prompts=[{"parts": [part]} for part in held])  # what is slow once
        before = {contender.name: contender.counters()}
        answers = contender.call("ask", prompts=prompts, concurrency=CONCURRENCY)
        contender.settle()
        last = new[-HELD_PROMPTS:]
        again = contender.call("ask", prompts=[{"parts": [part]} for part in last])
        stored_share = sum(answer["cached"] for answer in again) / (len(last) * length)
        ends = sorted(answer["ended_s"] for answer in answers)
        start_s, end_s = ends[int(WARM_UP_SHARE * len(ends))], ends[-1]
        in_time = [start_s < answer["ended_s"] <= end_s for answer in answers]
        loaded = sum(answer["cached"] for answer, counts in zip(answers[::2], in_time[::2], strict=True) if counts)
        stored = stored_share * length * sum(in_time[1::2])
        rate = (loaded + stored) * token_bytes(lab.setting.wide_model) / (end_s - start_s)
        notes = {
            "loaded_tokens": loaded,
            "stored_tokens": round(stored),
            "stored_share": round(stored_share, 3),
            "seconds": round(end_s - start_s, 2),
        }
        if now := contender.counters():
            notes["stores_dropped"] = now["stores_dropped"] - before[contender.name]["stores_dropped"]
        lab.add("bidirectional", contender.name, [rate / 1e9], "GB/s", notes, tokens=length)
        lab.save()

    lab.each(measure)
    if "both" in lab.limits:
        lab.add("bidirectional", "limit", [lab.limits["both"] / 1e9], "GB/s", tokens=length)
