"""Stores by URL."""

import subprocess
import sys

import pytest

from cachetier.core.errors import ConfigError
from cachetier.core.keys import ChainKey, NamespaceId
from cachetier.remote import registry
from cachetier.remote.base import FrameMemory, key_of
from cachetier.remote.registry import check_url, open_remote

MEMORY = FrameMemory("/none", 0, 0, lambda offset, length: memoryview(b""))


@pytest.mark.parametrize("url", ["", "s3", "s3://", "mooncake:master:1", "http://host/path", "/some/path"])
def test_what_names_no_store_is_refused_with_the_ones_that_there_are(url):
    with pytest.raises(ConfigError, match="mooncake://MASTER_HOST:PORT or s3://BUCKET/PREFIX"):
        check_url(url)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(registry.STORES, "s3", "no.such.package")
    with pytest.raises(ConfigError, match=r"pip install 'cachetier\[s3\]'"):
        open_remote("s3://bucket", MEMORY)


def test_a_server_without_a_remote_store_imports_none():
    code = "import sys, cachetier.store.store; print(sorted({'obstore', 'mooncake', 'boto3'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_keys_are_as_the_format_says():
    key = key_of(NamespaceId(bytes(range(16))), ChainKey(bytes(range(16, 32))))
    assert key == "cachetier/1/000102030405060708090a0b0c0d0e0f/101112131415161718191a1b1c1d1e1f"
