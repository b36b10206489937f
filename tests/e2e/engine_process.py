"""A vLLM engine in a process of its own, driven by lines of JSON: so that a test can kill it.

Run as `python -m tests.e2e.engine_process '{"model": ..., ...}'` with vLLM's engine arguments. Each line of standard
input is `{"call": NAME, ...}`; each reply is one line on the file descriptor named in the environment.
"""

import json
import os
import sys
import threading
import time


def main() -> None:
    """Start the engine, then answer calls until standard input ends."""
    from vllm import SamplingParams
    from vllm.config import KVEventsConfig, KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

    replies = os.fdopen(int(os.environ["CACHETIER_TEST_REPLY_FD"]), "w", buffering=1)
    options = json.loads(sys.argv[1])
    if transfer := options.get("kv_transfer_config"):
        options["kv_transfer_config"] = KVTransferConfig(**transfer)
    if events := options.get("kv_events_config"):
        options["kv_events_config"] = KVEventsConfig(**events)
    engine = LLMEngine.from_engine_args(EngineArgs(**options))

    def generate(
        prompts: list[dict],
        max_tokens: int = 8,
        at_once: bool = True,
        ignore_eos: bool = True,
        reset_connector_in_flight: bool = False,
    ) -> list[dict]:
        """Complete prompts greedily.

        Each is `{"id": ..., "tokens": [...]}`, perhaps with "params" (`kv_transfer_params`), "salt", "max_tokens",
        "logprobs", "prompt_logprobs" and "adapter" (name, number, folder). With `reset_connector_in_flight`, the
        connector is reset after the first output.
        """
        results: dict[str, dict] = {}
        groups = [prompts] if at_once else [[prompt] for prompt in prompts]
        for group in groups:
            for prompt in group:
                extra = {"kv_transfer_params": prompt["params"]} if prompt.get("params") else None
                sampling = SamplingParams(
                    temperature=0,
                    max_tokens=prompt.get("max_tokens", max_tokens),
                    logprobs=prompt.get("logprobs", 4),
                    extra_args=extra,
                    ignore_eos=ignore_eos,
                    prompt_logprobs=prompt.get("prompt_logprobs"),
                )
                adapter = LoRARequest(*prompt["adapter"]) if prompt.get("adapter") else None
                inputs = {"prompt_token_ids": prompt["tokens"]}
                if prompt.get("salt"):
                    inputs["cache_salt"] = prompt["salt"]
                engine.add_request(prompt["id"], inputs, sampling, lora_request=adapter)
                results[prompt["id"]] = {"started": time.monotonic()}
            if reset_connector_in_flight:
                drain(results, num_outputs=1)
                engine.reset_prefix_cache(reset_connector=True)  # False: blocks of running requests stay
            drain(results)
        return [results[prompt["id"]] for prompt in prompts]

    def drain(results: dict[str, dict], num_outputs: int = 1 << 30) -> None:
        while num_outputs and engine.has_unfinished_requests():
            num_outputs -= 1
            for output in engine.step():
                result, now = results[output.request_id], time.monotonic()
                result.setdefault("first_token_s", now - result["started"])
                if output.finished:
                    completion = output.outputs[0]
                    result["tokens"] = list(completion.token_ids)
                    result["cached"] = output.num_cached_tokens
                    result["finish"] = completion.finish_reason
                    result["seconds"] = now - result["started"]
                    result["prompt_logprobs"] = len(output.prompt_logprobs or ())
                    result["logprobs"] = [
                        {str(token): value.logprob for token, value in step.items()} for step in completion.logprobs
                    ]

    def abort_after(prompt: dict, seconds: float) -> str:
        """Start one request and abort it."""
        extra = {"kv_transfer_params": prompt["params"]} if prompt.get("params") else None
        sampling = SamplingParams(max_tokens=prompt.get("max_tokens", 64), extra_args=extra, ignore_eos=True)
        engine.add_request(prompt["id"], {"prompt_token_ids": prompt["tokens"]}, sampling)
        time.sleep(seconds)
        engine.abort_request([prompt["id"]])
        return "aborted"

    def reset(connector: bool = False) -> bool:
        for _ in range(100):
            if engine.reset_prefix_cache(reset_connector=connector):
                return True
            time.sleep(0.05)
        return False

    def preemptions() -> int:
        return sum(int(metric.value) for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")

    calls = {"generate": generate, "reset": reset, "abort_after": abort_after, "preemptions": preemptions}
    print(json.dumps("ready"), file=replies)
    for line in sys.stdin:
        message = json.loads(line)
        print(json.dumps(calls[message.pop("call")](**message)), file=replies)
    threading.Thread(target=lambda: (time.sleep(20), os._exit(1)), daemon=True).start()
    engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
