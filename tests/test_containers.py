"""The Dockerfiles and the devcontainer: linted, and the files and versions that they name are there."""

import json
import re
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
