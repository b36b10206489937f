"""The rolling hash that proposes where registered documents may stand in a prompt."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachetier_blend.finding import BASE, FingerprintSet, Tokens, fingerprints

WINDOW = 64
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40).map(lambda tokens: np.array(tokens, np.int32))


def direct(window: list[int]) -> int:
    """Evaluate the formula with Python's integers."""

    def mix(token: int) -> int:
        mixed = (token + 1) * 0x9E3779B97F4A7C15 % 2**64
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        return mixed ^ mixed >> 31

    return sum(mix(token) * BASE**power for power, token in enumerate(window)) % 2**64


def random_tokens(seed: int, count: int, vocabulary: int = 128_000) -> Tokens:
    return np.random.default_rng(seed).integers(0, vocabulary, count, dtype=np.int32)


def set_of(hashes: list[int]) -> FingerprintSet:
    return FingerprintSet(np.array(sorted(set(hashes)), "<u8").tobytes())


def registered(*documents: Tokens) -> FingerprintSet:
    return set_of([int(fingerprints(document[:WINDOW], WINDOW)[0]) for document in documents])


class TestFingerprints:
    @settings(max_examples=1000, deadline=None)
    @given(tokens=TOKENS, window=st.integers(1, 50))
    def test_they_are_the_formula_at_every_offset(self, tokens, window):
        wanted = [direct(tokens[start : start + window].tolist()) for start in range(max(0, len(tokens) - window + 1))]
        found = fingerprints(tokens, window)
        assert found.dtype == np.uint64
        assert found.tolist() == wanted

    def test_those_that_servers_keep_stay_the_same(self):
        tokens = np.arange(3, 3 * (WINDOW + 2), 3, dtype=np.int32)
        assert fingerprints(tokens, WINDOW).tolist() == [17872421576900818179, 5976517770737039569]

    def test_texts_with_structure_do_not_collide(self):
        counting = np.arange(200_000, dtype=np.int32)
        strides = [counting[:: 2 + step][:1000] for step in range(60)]
        constants = [np.full(WINDOW, token, np.int32) for token in range(20_000)]
        two_tokens = random_tokens(1, 100_000, vocabulary=2)
        swapped = np.tile(random_tokens(2, WINDOW), (WINDOW - 1, 1))
        for row in range(WINDOW - 1):
            swapped[row, [row, row + 1]] = swapped[row, [row + 1, row]]
        texts = [counting, *strides, *constants, two_tokens, *swapped]
        hashes = np.concatenate([fingerprints(text, WINDOW) for text in texts])
        windows = {
            window.tobytes() for text in texts for window in np.lib.stride_tricks.sliding_window_view(text, WINDOW)
        }
        assert len(np.unique(hashes)) == len(windows)


class TestFingerprintSet:
    def test_a_document_is_found_at_every_offset(self):
        document, other = random_tokens(3, 200), random_tokens(4, 200)
        known, filler = registered(document, other), random_tokens(5, 300)
        fingerprint = int(fingerprints(document[:WINDOW], WINDOW)[0])
        for offset in range(300):
            prompt = np.concatenate([filler[:offset], document, filler[offset:]])
            assert known.candidates(prompt, WINDOW) == [(offset, fingerprint)]

    def test_all_documents_of_a_prompt_are_found_in_order_and_again(self):
        documents = [random_tokens(seed, 150) for seed in range(6, 10)]
        prompt = np.concatenate([documents[number] for number in (2, 0, 2, 3)])
        own = [int(fingerprints(document, WINDOW)[0]) for document in documents]
        wanted = [(0, own[2]), (150, own[0]), (300, own[2]), (450, own[3])]
        assert registered(*documents).candidates(prompt, WINDOW) == wanted
        assert registered(*documents).candidates(prompt, WINDOW, start=150) == wanted[1:]
        assert registered(*documents).candidates(prompt, WINDOW, start=151) == wanted[2:]

    def test_a_document_that_is_cut_off_in_its_first_window_is_not_found(self):
        document = random_tokens(11, 150)
        known = registered(document)
        assert known.candidates(document[: WINDOW - 1], WINDOW) == []
        assert known.candidates(document[1:], WINDOW) == []
        assert len(known.candidates(document[:WINDOW], WINDOW)) == 1

    @settings(max_examples=300, deadline=None)
    @given(data=st.data())
    def test_candidates_are_the_windows_whose_hashes_are_in_the_set(self, data):
        # Few different tokens, so that windows repeat; and hashes that end or begin as those in the set do.
        tokens = np.array(data.draw(st.lists(st.integers(0, 2), max_size=60)), np.int32)
        start, window = data.draw(st.integers(0, 70)), data.draw(st.integers(1, 6))
        hashes = fingerprints(tokens, window).tolist()
        near = [(value + delta) % 2**64 for value in hashes for delta in (-1, 0, 1, 2**30)]
        members = set(data.draw(st.lists(st.sampled_from([0, 2**64 - 1, *near]), max_size=20)))
        wanted = [(offset, value) for offset, value in enumerate(hashes) if value in members and offset >= start]
        assert set_of(list(members)).candidates(tokens, window, start) == wanted

    def test_no_other_text_is_taken_for_a_document(self):
        known = set_of(np.random.default_rng(12).integers(0, 2**64, 100_000, dtype=np.uint64).tolist())
        assert len(known) == 100_000
        for seed in range(13, 23):
            assert known.candidates(random_tokens(seed, 100_000), WINDOW) == []

    @pytest.mark.parametrize("count", [0, 1, 63])
    def test_a_prompt_shorter_than_a_window_has_no_candidates(self, count):
        assert registered(random_tokens(24, 150)).candidates(random_tokens(24, count), WINDOW) == []

    def test_an_empty_set_finds_nothing(self):
        assert FingerprintSet(b"").candidates(random_tokens(25, 150), WINDOW) == []
