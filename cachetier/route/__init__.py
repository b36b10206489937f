"""The router: one OpenAI address in front of engines that produce, consume, or do both."""
