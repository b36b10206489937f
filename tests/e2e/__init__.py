"""Tests with real vLLM engines and real servers."""
