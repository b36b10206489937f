"""A configuration is complete and possible, or refused with what is allowed; where it was written does not matter."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachetier.core.config import GIB, MIB, Config, ConnectorConfig, ServerConfig, from_mapping, read_toml
from cachetier.core.errors import ConfigError

KINDS = (ServerConfig, ConnectorConfig)


class TestDefaults:
    def test_nothing_set_is_a_possible_configuration(self) -> None:
        config = ServerConfig()
        assert config.data_dir == str(Path.home() / ".cache" / "cachetier")
        assert config.socket == config.data_dir + "/cachetier.sock"
        assert config.segment_bytes == GIB
        assert ConnectorConfig().server == ""

    @pytest.mark.parametrize("disk_bytes", [16 * MIB, 100 * MIB + 12345, 3 * GIB + 1])
    def test_segments_of_a_small_disk_tier_are_small(self, disk_bytes: int) -> None:
        config = ServerConfig(disk_bytes=disk_bytes)
        assert config.segment_bytes % 4096 == 0
        assert disk_bytes / 17 < config.segment_bytes <= disk_bytes / 16

    def test_without_disk_there_are_no_segments(self) -> None:
        assert ServerConfig(disk_bytes=0).segment_bytes == 0

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_setting_is_explained(self, kind: type) -> None:
        assert all(len(field.metadata["help"]) > 10 for field in dataclasses.fields(kind))

    @pytest.mark.parametrize("config", [ServerConfig(), ConnectorConfig()])
    def test_a_configuration_cannot_be_changed(self, config: Any) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.data_dir = "/elsewhere"


class TestReading:
    def test_text_and_numbers_mean_the_same(self) -> None:
        texts = {"host-bytes": "1GiB", "disk_bytes": "4G", "chunk_tokens": "32", "lease_ttl_s": "5", "io_threads": "2"}
        numbers = {"host_bytes": GIB, "disk_bytes": 4 * GIB, "chunk_tokens": 32, "lease_ttl_s": 5, "io_threads": 2}
        assert from_mapping(ServerConfig, texts, "a") == from_mapping(ServerConfig, numbers, "b")

    def test_a_file_holds_the_same_settings(self, tmp_path: Path) -> None:
        file = tmp_path / "c.toml"
        file.write_text('host-bytes = "1GiB"\ndisk_bytes = 0\nlease_ttl_s = 2.5\nlog_level = "debug"\n')
        config = from_mapping(ServerConfig, read_toml(str(file)), str(file))
        assert (config.host_bytes, config.disk_bytes, config.lease_ttl_s) == (GIB, 0, 2.5)

    @pytest.mark.parametrize("content", [b"= 3", b"\xff", b"a = 1\na = 2"])
    def test_a_file_that_is_no_toml_is_refused_by_name(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "c.toml").write_bytes(content)
        with pytest.raises(ConfigError, match=r"c\.toml"):
            read_toml(str(tmp_path / "c.toml"))
        with pytest.raises(ConfigError, match="missing"):
            read_toml(str(tmp_path / "missing"))

    @pytest.mark.parametrize("kind", KINDS)
    def test_an_unknown_setting_is_refused_with_all_known_ones(self, kind: type[Config]) -> None:
        with pytest.raises(ConfigError, match="here: unknown setting 'hots_bytes'") as refusal:
            from_mapping(kind, {"hots_bytes": 1}, "here")
        assert all(field.name in str(refusal.value) for field in dataclasses.fields(kind))

    @given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(ServerConfig)]), st.text(max_size=5)))
    def test_no_values_make_it_fail_otherwise(self, values: dict[str, str]) -> None:
        try:
            config = from_mapping(ServerConfig, values, "here")
        except ConfigError as error:
            assert str(error)  # noqa: PT017
        else:
            assert config.host_bytes >= 4 * MIB


class TestRefusals:
    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"host_bytes": "3MiB"}, "at least 4.0 MiB"),
            ({"host_bytes": -1}, "at least 4.0 MiB"),
            ({"host_bytes": "lots"}, "host_bytes: 'lots' is not a size"),
            ({"disk_bytes": "15MiB"}, "at least 16.0 MiB or 0 for no disk tier"),
            ({"disk_bytes": -4096}, "at least 16.0 MiB"),
            ({"disk_bytes": "1GiB", "segment_bytes": "512MiB"}, "a quarter of disk_bytes, 256.0 MiB"),
            ({"segment_bytes": "1048577"}, "multiple of 4096"),
            ({"segment_bytes": 4096}, "between 1 MiB"),
            ({"chunk_tokens": 48}, "one of 16, 32, 64, 128, 256, 512, 1024"),
            ({"chunk_tokens": 8}, "one of 16"),
            ({"chunk_tokens": 2048}, "one of 16"),
            ({"chunk_tokens": 0}, "one of 16"),
            ({"chunk_tokens": "64.0"}, "not a whole number"),
            ({"chunk_tokens": True}, "not of type int"),
            ({"socket": "/" + "x" * 107}, "107 bytes"),
            ({"tcp": "0.0.0.0:80"}, "tcp needs token_file"),
            ({"tcp": "localhost", "token_file": "f"}, "HOST:PORT"),
            ({"tenant_quota": 0}, "over 0 and at most 1"),
            ({"tenant_quota": 1.1}, "over 0 and at most 1"),
            ({"tenant_quota": "nan"}, "over 0 and at most 1"),
            ({"lease_ttl_s": 0.5}, "between 1 and 3600"),
            ({"lease_ttl_s": "inf"}, "between 1 and 3600"),
            ({"io_threads": 0}, "between 1 and 64"),
            ({"io_threads": 65}, "between 1 and 64"),
            ({"log_level": "loud"}, "choose from debug, info, warning, error"),
            ({"data_dir": 7}, "not text"),
        ],
    )
    def test_an_impossible_server_is_refused_with_what_is_allowed(self, values: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError) as refusal:
            from_mapping(ServerConfig, values, "here")
        assert words in str(refusal.value)

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"server": "/run/x.sock"}, "must be unix:PATH"),
            ({"server": "http://host:1"}, "must be unix:PATH"),
            ({"url": "10.0.0.1:8000"}, "write http://HOST:PORT"),
            ({"match_deadline_ms": 0}, "between 1 and 60000"),
            ({"load_deadline_ms": 60_001}, "between 1 and 60000"),
            ({"staging_bytes": "1KiB"}, "at least 1.0 MiB"),
        ],
    )
    def test_an_impossible_connector_is_refused_with_what_is_allowed(self, values: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError) as refusal:
            from_mapping(ConnectorConfig, values, "here")
        assert words in str(refusal.value)

    @pytest.mark.parametrize("chunk_tokens", [16, 32, 64, 128, 256, 512, 1024])
    def test_every_allowed_chunk_size_is_accepted(self, chunk_tokens: int) -> None:
        assert ServerConfig(chunk_tokens=chunk_tokens).chunk_tokens == chunk_tokens
