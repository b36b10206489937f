"""Fingerprints of weights: what changes them, and what does not."""

import os

import pytest

from cachetier_connector import fingerprint
from cachetier_connector.fingerprint import fingerprint_folder


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(os.urandom(5000))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("a")
    return tmp_path


def test_it_is_the_same_wherever_the_folder_stands(model, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for file in model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert fingerprint_folder(model) == fingerprint_folder(other)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_changed_byte_changes_it(model, name):
    before = fingerprint_folder(model)
    data = bytearray((model / name).read_bytes())
    data[-1] ^= 1
    (model / name).write_bytes(data)
    assert fingerprint_folder(model) != before


def test_a_new_or_renamed_file_of_weights_changes_it(model):
    before = fingerprint_folder(model)
    (model / "more.safetensors").write_bytes(b"")
    assert fingerprint_folder(model) != before
    (model / "more.safetensors").unlink()
    (model / "model.safetensors").rename(model / "weights.safetensors")
    assert fingerprint_folder(model) != before


def test_the_tokenizer_does_not_matter(model):
    before = fingerprint_folder(model)
    (model / "tokenizer.json").write_text("b")
    assert fingerprint_folder(model) == before


def test_large_files_are_sampled_from_their_start_to_their_end(model, monkeypatch):
    monkeypatch.setattr(fingerprint, "WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 100)
    monkeypatch.setattr(fingerprint, "SAMPLE_EVERY_BYTES", 1000)
    prints = {fingerprint_folder(model)}
    data = (model / "model.safetensors").read_bytes()
    for offset in (0, 1050, 4099, 4900, 4999):
        changed = bytearray(data)
        changed[offset] ^= 1
        (model / "model.safetensors").write_bytes(changed)
        prints.add(fingerprint_folder(model))
    assert len(prints) == 6


def test_a_folder_without_weights_has_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        fingerprint_folder(tmp_path)


def test_an_adapters_weights_and_configuration_both_count(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    before = fingerprint_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 9}')
    between = fingerprint_folder(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"Weights")
    assert len({before, between, fingerprint_folder(tmp_path)}) == 3
