"""The Dockerfiles, the devcontainer and the unit of systemd: linted, and what they name is there."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def lint(path):
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("hadolint is not installed; it is in the dev extra, on Linux")
    return subprocess.run([program, path], capture_output=True, text=True)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_is_clean_and_names_files_of_the_clone(path):
    done = lint(path)
    assert done.returncode == 0, done.stdout
    text = path.read_text("utf-8")
    for name in re.findall(r"/src/([\w./]+\.txt)", text):
        assert (ROOT / name).is_file(), name
    for extra in re.findall(r"/src\[(\w+)\]", text):
        assert f'"{extra}": [' in (ROOT / "setup.py").read_text("utf-8")
    assert f"-f docker/{path.name}" in text


def test_the_linter_rejects_a_bad_dockerfile(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /x && apt-get install gcc\n")
    assert lint(tmp_path / "Dockerfile").returncode != 0


def test_the_devcontainer_makes_a_target_of_the_makefile():
    facts = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text("utf-8"))
    target = facts["postCreateCommand"].split()[1]
    assert f"\n{target}:" in (ROOT / "Makefile").read_text("utf-8")
    assert facts["image"].startswith("mcr.microsoft.com/devcontainers/python:")


def unit_errors(text, folder):
    """The first mistakes that systemd finds in a unit, whose program is replaced by one that is here."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    path = folder / "inferix.service"
    path.write_text(text.replace("/opt/inferix/bin/inferix", sys.executable), "utf-8")
    done = subprocess.run([program, "verify", "--man=no", path], capture_output=True, text=True)
    return [line for line in done.stderr.splitlines() if path.name in line]


def unit():
    (text,) = re.findall(r"```ini\n(.*?)```", (ROOT / "docs" / "serving.md").read_text("utf-8"), re.DOTALL)
    return text


def test_the_unit_of_systemd_runs_a_command_that_there_is():
    from inferix.cli.main import app
    from inferix.serve.settings import ServeSettings

    sections = configparser.ConfigParser(strict=False, interpolation=None)
    sections.optionxform = str
    sections.read_string(unit())
    assert sections.sections() == ["Unit", "Service", "Install"]
    service = sections["Service"]
    program, verb, *arguments = shlex.split(service["ExecStart"])
    (command,) = [info.callback for info in app.registered_commands if info.callback.__name__ == verb]
    assert program.endswith("/inferix")
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert option.removeprefix("--").replace("-", "_") in command.__annotations__, option
    assert int(service["TimeoutStopSec"]) > ServeSettings().drain_seconds


def test_systemd_finds_no_mistake_in_the_unit(tmp_path):
    assert unit_errors(unit(), tmp_path) == []


def test_systemd_finds_mistakes(tmp_path):
    assert unit_errors(unit().replace("Restart=on-failure", "Restart=sometimes"), tmp_path)
