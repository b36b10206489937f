"""Every command has help; mistakes give one line and exit code 2."""

import pytest

from cachetier import __version__
from cachetier.cli.main import COMMANDS, main
from tests.service.running import run_cli


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"cachetier {command}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"cachetier {__version__}\n"


@pytest.mark.parametrize("arguments", [(), ("nothing",), ("stats", "--nothing"), ("serve", "--host-bytes")])
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: cachetier" in capsys.readouterr().err


def test_module_runs_as_a_program() -> None:
    outcome = run_cli("--version")
    assert (outcome.returncode, outcome.stdout) == (0, f"cachetier {__version__}\n")
