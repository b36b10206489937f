"""Blending: hits in the middle of a prompt. It runs inside engines; nothing of the server imports it."""
