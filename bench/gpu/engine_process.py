"""A vLLM engine in a process of its own, which answers lines of JSON: what every contender is measured with.

Run as `python -m bench.gpu.engine_process '{"model": ..., ...}'` with vLLM's engine arguments. Prompts travel as seeds
and lengths, so that no line is long. Times are taken here, from before `add_request` to the step that returns a token.
"""

import json
import os
import sys
import threading
import time
from typing import Any

import numpy as np

REPLY_FD = "CACHETIER_BENCH_REPLY_FD"
FIRST_TOKEN_ID, VOCABULARY = 20, 4000


def tokens_of(parts: list[list[int]]) -> list[int]:
    """Return the tokens of a prompt: for each of `parts` (seed, length), random ones."""
    return [
        int(token)
        for seed, length in parts
        for token in np.random.default_rng(seed).integers(FIRST_TOKEN_ID, VOCABULARY, length)
    ]


class Driver:
    """Asks one engine."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        if transfer := options.get("kv_transfer_config"):
            options = options | {"kv_transfer_config": KVTransferConfig(**transfer)}
        self._engine = LLMEngine.from_engine_args(EngineArgs(**options))
        self._num_asked = 0

    def ask(self, prompts: list[dict[str, Any]], max_tokens: int = 1, concurrency: int = 1) -> list[dict[str, Any]]:
        """Complete prompts greedily, with up to `concurrency` of them in the engine at a time.

        Each is `{"parts": [[seed, length], ...]}`, perhaps with "params" (`kv_transfer_params`). All tokens are made
        before the first is asked.

        Returns:
            For each prompt started_s, first_token_s, seconds, ended_s, cached (tokens), output (tokens), and params if
            the connector returned any.
        """
        from vllm import SamplingParams

        waiting = [(tokens_of(prompt["parts"]), prompt.get("params")) for prompt in prompts]
        results: dict[str, dict[str, Any]] = {}
        next_number = num_running = 0
        while num_running or next_number < len(waiting):
            while num_running < concurrency and next_number < len(waiting):
                tokens, params = waiting[next_number]
                sampling = SamplingParams(
                    temperature=0,
                    max_tokens=max_tokens,
                    ignore_eos=True,
                    detokenize=False,
                    extra_args={"kv_transfer_params": params} if params else None,
                )
                self._num_asked += 1
                name = f"q{self._num_asked}"
                results[name] = {"started_s": time.monotonic()}
                self._engine.add_request(name, {"prompt_token_ids": tokens}, sampling)
                next_number, num_running = next_number + 1, num_running + 1
            for output in self._engine.step():
                result, now_s = results[output.request_id], time.monotonic()
                result.setdefault("first_token_s", now_s - result["started_s"])
                if output.finished:
                    num_running -= 1
                    result |= {"seconds": now_s - result["started_s"], "ended_s": now_s}
                    result |= {"cached": output.num_cached_tokens or 0, "output": len(output.outputs[0].token_ids)}
                    result |= {"params": output.kv_transfer_params} if output.kv_transfer_params else {}
        return list(results.values())

    def reset(self) -> bool:
        """Empty vLLM's own prefix cache; tell whether that worked."""
        deadline_s = time.monotonic() + 10
        while not self._engine.reset_prefix_cache():
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.005)
        return True

    def stop(self) -> None:
        """End the engine."""
        self._engine.engine_core.shutdown()


def main() -> None:
    """Start the engine, then answer calls until standard input ends."""
    replies = os.fdopen(int(os.environ[REPLY_FD]), "w", buffering=1)
    driver = Driver(json.loads(sys.argv[1]))
    print(json.dumps("ready"), file=replies)
    for line in sys.stdin:
        message = json.loads(line)
        try:
            reply = {"value": getattr(driver, message.pop("call"))(**message)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies)
    threading.Thread(target=lambda: (time.sleep(20), os._exit(1)), daemon=True).start()
    driver.stop()


if __name__ == "__main__":
    main()
