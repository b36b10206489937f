"""Blending: hits in the middle of a prompt. It runs in engines; `cachetier explain` uses its plans to foretell them."""
