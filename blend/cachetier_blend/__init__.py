"""Blending: hits in the middle of a prompt. Its place in the layers; nothing is here yet."""
