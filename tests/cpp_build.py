"""What cmake builds of `export/cpp`, for tests. ctest gives the folder in INFERIX_BUILD; else all is built here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Built:
    """A build folder."""

    folder: Path

    @property
    def library(self) -> Path:
        return self.folder / "libinferix.so"

    @property
    def ops(self) -> Path:
        return self.folder / "libinferix_ops.so"

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets whose engines the runner plays, as it says itself."""
        listed = self.run("--version").stdout.strip().partition("targets: ")[2]
        return tuple(listed.split(", "))

    def run(self, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        # one thread, since two that spin would wait for each other
        command = [self.folder / "inferix-runner", "--threads", "1", *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True)

    def make(self, target: str) -> Path:
        """Build a target that is not built by default; its program."""
        cmake = beside_python("cmake")
        done = subprocess.run([cmake, "--build", self.folder, "--target", target], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.folder / target


def beside_python(name: str) -> str:
    """A command of this environment or of the machine; skips the test where there is none."""
    here = Path(sys.executable).with_name(name)
    found = str(here) if here.exists() else shutil.which(name)
    return found or pytest.skip(f"{name} is not installed")


def find_build(place: Path) -> Built:
    """The build of ctest, else a new one in `place`."""
    if "INFERIX_BUILD" in os.environ:
        return Built(Path(os.environ["INFERIX_BUILD"]))
    cmake = beside_python("cmake")
    beside_python("c++")
    settings = [f"-DPython3_EXECUTABLE={sys.executable}", "-DBUILD_TESTING=ON"]
    for command in ([cmake, "-S", ROOT, "-B", place, *settings], [cmake, "--build", place, "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return Built(place)
