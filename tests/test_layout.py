"""The shape of the project: package list, layering, the source distribution and wheel, and the CMake file.

Layering is checked by reading imports with `ast`, so nothing is imported and an import inside a function or
under TYPE_CHECKING counts too. Builds run on a copy of the tree, to leave no `build` folder in the clone.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
NO_PACKAGES = {"tests", "tools", "build", "dist", "outputs"}
BELOW_ROOT = ["kernels", "graphs", "schemes", "models", "runtime", "export", "serve", "evaluate", "bench"]
AT_ROOT = ["cli", "media", "checkpoint", "__init__", "__main__"]
LAYERS = {name: height for height, name in enumerate(BELOW_ROOT)} | dict.fromkeys(AT_ROOT, len(BELOW_ROOT))
UNTRACKED = ("--others", "--exclude-standard")
FOR_EVERYONE = {"errors", "plugins", "user_files", "user_python", "user_yaml", "version"}
BASE = ("arguments", "byte_sizes", "engine_condition", "executor_specs", "files", "finite_check",
        "frame_channels",
        "limits", "live_video", "media", "media_input",
        "noise", "plans", "sampler", "sinks", "streams", "worker_client", "y4m")  # fmt: skip
ABOVE_BASE = ("kv", "config", "capacity", "telemetry", "programs", "execution", "worker", "parallel", "resources",
              "sessions", "inputs", "block_loop", "engine", "load")  # fmt: skip
FAMILIES = {"wan", "tinyworld", "magi"}  # packages of `models`
MAY_NAME_A_FAMILY = {
    "inferix.bench.baseline",
    *(f"inferix.evaluate.tinyworld{part}" for part in ("", "_classifiers", "_judge", "_sheets", "_walks")),
}
RUNTIME = dict.fromkeys(BASE, 0) | {name: height for height, name in enumerate(ABOVE_BASE, start=1)}


def packages(root: Path) -> set[str]:
    """Dotted names of the packages below `root`, which itself is `inferix`."""
    names = set()
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".") and name not in NO_PACKAGES]
        if "__init__.py" in files:
            names.add(".".join(["inferix", *Path(folder).relative_to(root).parts]))
    return names


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, path) of every module; a package's name ends in `.__init__`."""
    for package in sorted(packages(root)):
        for path in sorted(root.joinpath(*package.split(".")[1:]).glob("*.py")):
            if path != root / "setup.py":
                yield f"{package}.{path.stem}", path


def imported(module: str, source: str) -> Iterator[str]:
    """Dotted names that `module` imports from `inferix`, relative ones resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "inferix")
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            target = ".".join(part for part in (base, node.module) if part)
            if target == "inferix":
                yield from (f"inferix.{alias.name}" for alias in node.names)
            elif target.startswith("inferix."):
                yield target


def layer(module: str) -> str:
    """The folder or root module directly below `inferix`; names the facade defines belong to `__init__`."""
    parts = module.split(".")
    known = len(parts) > 1 and (parts[1] in LAYERS or parts[1] in FOR_EVERYONE)
    return parts[1] if known or len(parts) > 2 else "__init__"


def wrong_imports(module: str, source: str) -> list[str]:
    """One line per import that runs upwards, out of a shared module, or into a folder that has no layer."""
    here = layer(module)
    height = -1 if here in FOR_EVERYONE else LAYERS[here]
    return [
        f"{module} imports {target}"
        for target in imported(module, source)
        if layer(target) not in FOR_EVERYONE and LAYERS.get(layer(target), sys.maxsize) > height
    ]


def wrong_runtime_imports(module: str, source: str) -> list[str]:
    """One line per import of a module of `runtime` that runs upwards inside `runtime`; base files import freely."""
    parts = module.split(".")
    if parts[1] != "runtime" or parts[2] == "__init__":
        return []
    below = [
        target.split(".")[2]
        for target in precisely(module, source)
        if target.startswith("inferix.runtime.") and target.split(".")[2] != parts[2]
    ]
    height = RUNTIME[parts[2]]
    return [f"{module} imports {name}" for name in below if RUNTIME[name] > height]


def named_families(module: str, source: str) -> list[str]:
    """One line per import of a model family by a module that must ask the registry instead.

    `models` itself holds the families. `evaluate.tinyworld` judges one family, and `bench.baseline` is an oracle that
    shares no code with the registry; neither runs anyone else's model.
    """
    if layer(module) in ("models", *FOR_EVERYONE) or module in MAY_NAME_A_FAMILY:
        return []
    return [f"{module} imports {target}" for target in precisely(module, source) if names_a_family(target)]


def names_a_family(target: str) -> bool:
    parts = target.split(".")
    return parts[:2] == ["inferix", "models"] and len(parts) > 2 and parts[2] in FAMILIES


def precisely(module: str, source: str) -> Iterator[str]:
    """Dotted names that `module` imports; `from x import y` gives `x` and `x.y`, whichever of them is a file."""
    yield from imported(module, source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            target = ".".join(part for part in (base, node.module) if part)
            if target.startswith("inferix"):
                yield from (f"{target}.{alias.name}" for alias in node.names)


def import_circle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a circle, first and last the same; none where there is no circle."""
    files = {name: name.removesuffix(".__init__") for name in sources}
    by_import = {target: name for name, target in files.items()}
    edges = {
        name: {by_import[target] for target in precisely(name, source) if by_import.get(target, name) != name}
        for name, source in sources.items()
    }
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def run(*command: str, cwd: Path) -> str:
    """Standard output of a command; on failure the test shows both of its streams."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def setup_value(name: str) -> Any:
    """A literal assigned at the top level of setup.py."""
    for node in ast.parse((ROOT / "setup.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py assigns no {name}")


def project_version() -> str:
    """The version as it stands in version.py, read here by other means than setup.py's."""
    body = ast.parse((ROOT / "version.py").read_text("utf-8")).body
    (assignment,) = [node for node in body if isinstance(node, ast.Assign)]
    return str(ast.literal_eval(assignment.value))


@dataclass(frozen=True)
class Built:
    """A source distribution, unpacked, and the wheel that was built from it, unpacked."""

    source: Path
    wheel: Path
    wheel_names: list[str]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("dist")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "outputs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "tree", ignore=unwanted)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "tree"), cwd=folder)
    stem = f"inferix_runtime-{project_version()}"
    with tarfile.open(folder / f"{stem}.tar.gz") as archive:
        archive.extractall(folder / "source", filter="data")
    (wheel,) = folder.glob(f"{stem}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
        return Built(folder / "source" / stem, folder / "wheel", archive.namelist())


def test_package_list_equals_the_tree() -> None:
    listed = setup_value("PACKAGES")
    assert len(listed) == len(set(listed))
    assert set(listed) == packages(ROOT)


def test_imports_run_downwards() -> None:
    wrong = [line for name, path in modules(ROOT) for line in wrong_imports(name, path.read_text("utf-8"))]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("inferix.kernels.attention", "from ..models.wan import spec"),
        ("inferix.kernels.attention", "from .. import runtime"),
        ("inferix.kernels.__init__", "from ..graphs import types"),
        ("inferix.graphs.trace", "import inferix.models"),
        ("inferix.models.wan.vae", "def f():\n    from ...runtime.engine import Engine"),
        ("inferix.runtime.pack", "from inferix.export import checkpoint"),
        ("inferix.schemes.timeline", "from ..models.wan import spec"),
        ("inferix.runtime.engine", "from ..cli.main import main"),
        ("inferix.runtime.engine", "from .. import load"),
        ("inferix.runtime.engine", "import inferix"),
        ("inferix.runtime.engine", "from ..tests.test_layout import run"),
        ("inferix.errors", "from .kernels import rope"),
    ],
)
def test_planted_wrong_imports_are_found(module: str, source: str) -> None:
    assert len(wrong_imports(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("inferix.kernels.attention", "import torch\nfrom ..errors import UsageError\nfrom . import rope"),
        ("inferix.models.wan.transformer", "from ...kernels import rope\nfrom . import spec"),
        ("inferix.runtime.engine", "from .. import errors, version\nfrom ..schemes import presets"),
        ("inferix.export.pack", "from ..runtime import engine"),
        ("inferix.cli.main", "from .. import load\nfrom ..runtime.engine import Engine"),
        ("inferix.__init__", "from .runtime.engine import Engine\nfrom .cli import main"),
    ],
)
def test_downward_imports_are_accepted(module: str, source: str) -> None:
    assert wrong_imports(module, source) == []


def test_only_models_and_oracles_name_a_family() -> None:
    assert {name for name in packages(ROOT) if names_a_family(name)} == {f"inferix.models.{name}" for name in FAMILIES}
    wrong = [line for name, path in modules(ROOT) for line in named_families(name, path.read_text("utf-8"))]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("inferix.runtime.load", "from ..models.wan.spec import MODELS"),
        ("inferix.runtime.load", "from ..models import wan"),
        ("inferix.cli.plan", "def f():\n    from ..models.tinyworld import spec"),
        ("inferix.checkpoint", "import inferix.models.wan.checkpoint"),
        ("inferix.__init__", "if TYPE_CHECKING:\n    from .models.wan.family import WAN"),
    ],
)
def test_planted_names_of_families_are_found(module: str, source: str) -> None:
    assert named_families(module, source)


def test_imports_inside_runtime_run_downwards() -> None:
    wrong = [line for name, path in modules(ROOT) for line in wrong_runtime_imports(name, path.read_text("utf-8"))]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("inferix.runtime.sessions.session", "if TYPE_CHECKING:\n    from ..engine import Engine"),
        ("inferix.runtime.sessions.session_manager", "def f():\n    from ..block_loop import BlockLoop"),
        ("inferix.runtime.kv.pages", "from ..config import EngineConfig"),
        ("inferix.runtime.kv.pages", "from .. import config"),
        ("inferix.runtime.block_loop", "from . import engine"),
        ("inferix.runtime.files", "from .kv.pages import PagePool"),
        ("inferix.runtime.telemetry.records", "import inferix.runtime.programs.warmup"),
        ("inferix.runtime.engine", "from .load import load"),
    ],
)
def test_planted_upward_imports_inside_runtime_are_found(module: str, source: str) -> None:
    assert wrong_runtime_imports(module, source)


def test_every_part_of_runtime_has_a_layer() -> None:
    parts = {name.split(".")[2] for name, _ in modules(ROOT) if name.startswith("inferix.runtime.")}
    assert parts - {"__init__"} == set(RUNTIME)


def test_no_files_import_each_other_in_a_circle() -> None:
    assert import_circle({name: path.read_text("utf-8") for name, path in modules(ROOT)}) == []


@pytest.mark.parametrize(
    "planted",
    [
        {"inferix.a.x": "from .y import f", "inferix.a.y": "from .x import g"},
        {"inferix.a.x": "from . import y", "inferix.a.y": "def f():\n    from . import x"},
        {"inferix.a.x": "import inferix.a.y", "inferix.a.y": "if TYPE_CHECKING:\n    from ..a.x import g"},
        {"inferix.a": "from .b import f", "inferix.b.__init__": "from . import z", "inferix.b.z": "from .. import a"},
    ],
)
def test_planted_circles_are_found(planted: dict[str, str]) -> None:
    ring = import_circle(planted)
    assert ring[0] == ring[-1] and set(ring) <= set(planted)


def test_imports_without_a_circle_are_accepted() -> None:
    sources = {"inferix.a.x": "from . import y\nfrom .z import f", "inferix.a.y": "", "inferix.a.z": ""}
    assert import_circle(sources) == []


def test_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    tops = {name.split("/")[0] for name in built.wheel_names}
    assert tops == {"inferix", f"inferix_runtime-{project_version()}.dist-info"}
    code = {name for name in built.wheel_names if name.endswith(".py")}
    assert code == {f"inferix/{path.relative_to(ROOT).as_posix()}" for _, path in modules(ROOT)}
    assert not [name for name in built.wheel_names if name == "inferix/setup.py" or "tests/" in name]
    card = "inferix/models/tinyworld/README.md"
    weights = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("models/tinyworld/weights/**/*.*")]
    assert {"inferix/py.typed", card, *(f"inferix/{name}" for name in weights)} <= set(built.wheel_names)


def test_an_unpacked_wheel_runs(built: Built) -> None:
    """From an empty folder, with the wheel before anything installed."""
    environment = dict(os.environ, PYTHONPATH=str(built.wheel))
    script = "import inferix; print(inferix.__file__); import sys; sys.argv[1:] = ['--version']"
    script += "; from inferix.cli.main import main"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; main()"], cwd=built.wheel, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    file, version = done.stdout.splitlines()
    assert Path(file) == built.wheel / "inferix" / "__init__.py"
    assert version == f"inferix {project_version()}"


USER_FILE = """import inferix

engine = inferix.load(device="cpu")
reveal_type(engine)
inferix.make_preset(3)
engine.opne()
"""


def test_mypy_sees_the_types_in_a_user_s_file(built: Built, tmp_path: Path) -> None:
    """In an environment of its own that holds the wheel and nothing else; without py.typed mypy refuses the package."""
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    shutil.copytree(built.wheel / "inferix", site / "inferix")
    (tmp_path / "user.py").write_text(USER_FILE)
    (tmp_path / "mypy.ini").write_text("[mypy]\n")
    places = ("--python-executable", str(tmp_path / "venv/bin/python"), "--cache-dir", str(tmp_path / "cache"))
    command = [sys.executable, "-m", "mypy", *places, "--config-file", "mypy.ini", "user.py"]
    environment = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}

    def messages() -> dict[int, str]:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.stderr == "" and done.returncode == 1, done.stdout + done.stderr
        found = re.findall(r"^user\.py:(\d+): (?:error|note): (.*)$", done.stdout, re.MULTILINE)
        return {int(line): message for line, message in reversed(found)}

    seen = messages()
    assert seen.keys() == {4, 5, 6} and '"inferix.runtime.engine.Engine"' in seen[4]
    assert "[arg-type]" in seen[5] and "[attr-defined]" in seen[6]
    (site / "inferix/py.typed").unlink()
    assert "[import-untyped]" in messages()[1]


def test_source_distribution_holds_every_file_of_the_repository(built: Built) -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so there is no list of the repository's files")
    tracked, untracked = (set(run("git", "ls-files", *more, cwd=ROOT).splitlines()) for more in ((), UNTRACKED))
    files = {name for name in tracked if not name.startswith(".") and (ROOT / name).exists()}
    there = {path.relative_to(built.source).as_posix() for path in built.source.rglob("*") if path.is_file()}
    assert files - there == set()
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in there - files if not name.startswith("inferix_runtime.egg-info/")} <= made | untracked


def test_the_page_of_the_index_has_no_links_into_the_repository(built: Built) -> None:
    (metadata,) = built.wheel.glob("*.dist-info/METADATA")
    text = metadata.read_text("utf-8")
    assert re.findall(r"\]\((?!https?:)[^)]*\)", text) == []
    assert "Name: inferix-runtime\n" in text
    assert "docs/models.md" in text


def test_cmake_configures(tmp_path: Path) -> None:
    beside_python = Path(sys.executable).with_name("cmake")
    cmake = str(beside_python) if beside_python.exists() else shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed; it comes with the [dev] extra")
    assert f"inferix {project_version()}" in run(cmake, "-S", str(ROOT), "-B", str(tmp_path), cwd=tmp_path)


def pins(name: str) -> dict[str, str]:
    """Exact versions by lower-case name of a file of constraints."""
    lines = (ROOT / "constraints" / name).read_text("utf-8").splitlines()
    listed = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin) for pin in listed)
    return {pin.split("==")[0].lower(): pin.split("==")[1] for pin in listed}


def test_constraints_are_exact_and_cover_the_direct_dependencies() -> None:
    direct = {re.split(r"[<>=]", need)[0].lower() for need in setup_value("DEPENDENCIES")}
    assert direct <= pins("cpu.txt").keys()


@pytest.mark.parametrize("name", ["cpu.txt", "gpu.txt"])
def test_constraints_lie_in_the_ranges_of_setup(name: str) -> None:
    lines = chain(setup_value("DEPENDENCIES"), *setup_value("EXTRAS").values())
    needs, versions = map(Requirement, lines), pins(name)
    named = [(need, versions[need.name.lower()]) for need in needs if need.name.lower() in versions]
    assert [f"{need}: {version}" for need, version in named if version not in need.specifier] == []
