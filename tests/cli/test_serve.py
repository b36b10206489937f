"""The command line wins over the file, the file over the default, and mistakes name the fix."""

import argparse
from pathlib import Path

import pytest

from cachetier.cli import serve
from cachetier.cli.main import main
from cachetier.core.config import GIB, MIB, ServerConfig
from cachetier.core.errors import ConfigError


def config_of(*arguments: str) -> ServerConfig:
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    return serve.server_config(parser.parse_args(["serve", *arguments]))


def test_flag_wins_over_file_and_file_over_default(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('host_bytes = "2GiB"\ndisk-bytes = 1073741824\nlease_ttl_s = 5\n')
    config = config_of("--config", str(path), "--host-bytes", "64MiB")
    assert (config.host_bytes, config.disk_bytes, config.lease_ttl_s) == (64 * MIB, GIB, 5.0)
    assert config.chunk_tokens == ServerConfig().chunk_tokens


def test_all_options_are_taken(tmp_path: Path) -> None:
    config = config_of(
        *("--data-dir", str(tmp_path), "--socket", f"{tmp_path}/s", "--host-bytes", "8MiB", "--disk-bytes", "32MiB"),
        *("--chunk-tokens", "32", "--segment-bytes", "2MiB", "--tcp", "127.0.0.1:1", "--token-file", "t"),
        *("--lease-ttl-s", "2.5", "--tenant-quota", "0.5", "--io-threads", "2", "--log-level", "debug"),
    )
    assert config == ServerConfig(
        data_dir=str(tmp_path),
        socket=f"{tmp_path}/s",
        host_bytes=8 * MIB,
        disk_bytes=32 * MIB,
        chunk_tokens=32,
        segment_bytes=2 * MIB,
        tcp="127.0.0.1:1",
        token_file="t",
        lease_ttl_s=2.5,
        tenant_quota=0.5,
        io_threads=2,
        log_level="debug",
    )


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--host-bytes", "lots"), "512MiB"),
        (("--host-bytes", "1MiB"), "4.0 MiB"),
        (("--chunk-tokens", "65"), "64"),
        (("--chunk-tokens", "many"), "whole number"),
        (("--lease-ttl-s", "soon"), "lease_ttl_s"),
        (("--log-level", "loud"), "warning"),
        (("--tcp", "127.0.0.1:80"), "token_file"),
        (("--config", "/nowhere.toml"), "/nowhere.toml"),
    ],
)
def test_mistake_is_exit_code_2_and_one_line_that_names_the_fix(
    arguments: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments]) == 2
    captured = capsys.readouterr()
    assert word in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not captured.out


def test_unknown_setting_in_the_file_is_named_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("host_byte = 1\n")
    with pytest.raises(ConfigError, match=r"settings\.toml.*host_byte.*host_bytes"):
        config_of("--config", str(path))
