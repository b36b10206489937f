"""How the tests on a GPU start their engines."""

# The tests' model is small: what vLLM would take of a GPU for its KV cache is millions of blocks. Several engines fit.
ON_GPU = {"kv_cache_memory_bytes": 256 << 20, "gpu_memory_utilization": 0.05}
# bfloat16 logits from 8 to 16 are multiples of 1/16, and another batch shape moves some by one, or two by one each.
NOISE = 0.13
