"""The systemd unit is what systemd takes, and starts a server with settings that there are."""

import argparse
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cachetier.cli import serve
from cachetier.service.server import CLOSE_TIMEOUT_S

UNIT = Path(__file__).parents[2] / "deploy" / "cachetier.service"
ANALYZE = shutil.which("systemd-analyze") or ""
needs_systemd = pytest.mark.skipif(not ANALYZE, reason="systemd-analyze is not here: apt-get install systemd")


def settings_of(text: str) -> dict[str, str]:
    """Return the settings of a unit whose names are unique."""
    lines = [line.split("=", 1) for line in text.splitlines() if re.match(r"[A-Z]\w*=", line)]
    settings = {name: value for name, value in lines}
    assert len(settings) == len(lines)
    return settings


def complaints_of(text: str, folder: Path) -> str:
    """Return what systemd says about a unit of which everything but its program is here."""
    unit = folder / UNIT.name
    unit.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", text))
    done = subprocess.run([ANALYZE, "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False)
    about_it = [line for line in done.stderr.splitlines() if UNIT.name in line]
    return "\n".join(about_it) or ("" if done.returncode == 0 else done.stderr)


@needs_systemd
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    assert complaints_of(UNIT.read_text(), tmp_path) == ""


@needs_systemd
@pytest.mark.parametrize(
    "change", [("ProtectSystem=strict", "ProtectSystm=strict"), ("TimeoutStopSec=30s", "TimeoutStopSec=soon")]
)
def test_systemd_does_not_take_any_unit(tmp_path: Path, change: tuple[str, str]) -> None:
    text = UNIT.read_text()
    assert change[0] in text
    assert complaints_of(text.replace(*change), tmp_path) != ""


def test_the_server_is_started_where_the_unit_says_and_has_time_to_end() -> None:
    settings = settings_of(UNIT.read_text())
    state, runtime = f"/var/lib/{settings['StateDirectory']}", f"/run/{settings['RuntimeDirectory']}"
    options = settings["Environment"].strip('"').removeprefix("CACHETIER_OPTIONS=")
    command = settings["ExecStart"].replace("${STATE_DIRECTORY}", state).replace("${RUNTIME_DIRECTORY}", runtime)
    program, name, *arguments = command.replace("$CACHETIER_OPTIONS", options).split()
    assert (Path(program).name, name) == ("cachetier", "serve")
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    config = serve.server_config(parser.parse_args(["serve", *arguments]))
    assert (config.data_dir, config.socket) == (state, f"{runtime}/cachetier.sock")
    assert f"unix:{config.socket}" in UNIT.read_text(), "its first lines tell engines where it is"
    assert int(settings["TimeoutStopSec"].removesuffix("s")) > CLOSE_TIMEOUT_S
    assert settings["StateDirectoryMode"] == settings["RuntimeDirectoryMode"] == "0700"
