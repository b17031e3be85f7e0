"""Every `Example:` line of every command's help runs as it is printed, and exits with 0.

The files that an example reads are made by commands that other examples or the documentation show.
"""

import contextlib
import glob
import os
import shlex
import shutil
import sys
from itertools import chain
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from inferix.cli.main import app

pytestmark = pytest.mark.filterwarnings("ignore")
FILES = {  # file or folder that examples read: the command that makes it, or its text
    "tiny/": "inferix checkpoint random --spec wan-tiny --format diffusers tiny/",
    "prompts.txt": "a red robot in a snowy forest by day\na white fox in a green meadow at sunset\n",
    "my_kernel.py": "from inferix.kernels.block_attention.reference import block_attention as my_attention\n",
    "world": "inferix export --out world",
    "outputs": "inferix generate --actions 30R -o outputs/walk.mp4",
    "outputs/*.mp4": "inferix generate --actions 30R -o outputs/walk.mp4",
    "outputs/a/drift.json": "inferix eval drift outputs/*.mp4 --out outputs/a",
    "outputs/lvbench/drift.json": "inferix eval lvbench --videos outputs --out outputs/lvbench",
    "results": "inferix bench block --size 64x64 --rounds 1 --blocks 2 --out results/block.json",
    "results/block.json": "inferix bench block --size 64x64 --rounds 1 --blocks 2 --out results/block.json",
    "results/before.json": "inferix bench block --size 64x64 --rounds 1 --blocks 2 --out results/before.json",
}
DRIVEN = ("inferix play", "inferix serve", "inferix route")  # run until they are stopped; other tests drive them
QUICK = (  # under two seconds each; `make test-all` runs the others
    "inferix plan", "inferix doctor", "inferix checkpoint inspect", "inferix checkpoint random",
    "inferix bench kernels --op",
)  # fmt: skip


def commands(group, path="inferix"):
    """(path, command) of every command and group of the app."""
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{path} {name}")


def examples():
    texts = [command.help or "" for _, command in commands(typer.main.get_command(app))]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return list(dict.fromkeys(line.split(": ", 1)[1] for line in lines if line.startswith("Example: ")))


EXAMPLES = examples()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder for the files of `FILES`, each made once."""
    return tmp_path_factory.mktemp("files")


def read_files(command):
    """The files of `FILES` that a command reads, rather than writes."""
    words = shlex.split(command)
    outputs = {words[index + 1] for index, word in enumerate(words[:-1]) if word in ("-o", "--out")}
    files = [word.partition(":")[0] for word in words]
    return [file for file in files if file in FILES and file not in outputs]


def run(command, store):
    """Run a line of the shell in this process: `&&`, quotes and wildcards, but nothing else of a shell."""
    for name in read_files(command):
        if command != FILES[name]:
            provide(name, store)
    for part in command.split(" && "):
        program, *words = shlex.split(part)
        assert program == "inferix"
        words = list(chain.from_iterable(sorted(glob.glob(word)) if "*.mp4" in word else [word] for word in words))
        done = CliRunner().invoke(app, words)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, (part, done.stderr)


def provide(name, store):
    """Copy one of `FILES` from the store to the working folder; makes it there first."""
    with contextlib.chdir(store):
        if not glob.glob(name) and FILES[name].startswith("inferix "):
            run(FILES[name], store)
        elif not glob.glob(name):
            Path(name).write_text(FILES[name], "utf-8")
    top = name.split("/")[0]
    if (store / top).is_dir() and store != Path.cwd():
        shutil.copytree(store / top, top, dirs_exist_ok=True)
    elif store != Path.cwd():
        shutil.copy(store / top, top)


def marked(example):
    slow = not example.startswith(QUICK)
    return pytest.param(example, id=example, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("example", [marked(line) for line in EXAMPLES if not line.startswith(DRIVEN)])
def test_an_example_runs_as_it_is_printed(tmp_path, monkeypatch, store, example):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INFERIX_ENGINE_CACHE", str(tmp_path / "engines"))
    if "--compile-only" in example:
        pytest.importorskip("triton")
    run(example, store)
    words = shlex.split(example)
    for index, word in enumerate(words[:-1]):
        if word in ("-o", "--out", "--svg", "--save", "--batches"):
            assert os.path.exists(words[index + 1]), word


def test_every_command_has_an_example_of_itself():
    """Groups have one of some command below them."""
    for path, command in commands(typer.main.get_command(app)):
        lines = [line for line in (command.help or "").splitlines() if line.strip().startswith("Example: ")]
        start = path if not hasattr(command, "commands") else path.rsplit(" ", 1)[0] if " " in path else "inferix"
        assert lines and all(line.split(": ", 1)[1].startswith(start) for line in lines), path


def test_a_line_with_a_wrong_option_or_file_is_caught(store):
    with pytest.raises(AssertionError):
        run("inferix plan --presett longlive", store)
    with pytest.raises(AssertionError):
        run("inferix checkpoint inspect missing/", store)


def test_options_are_environment_variables_and_have_short_names(monkeypatch):
    monkeypatch.setenv("INFERIX_PLAN_PRESET", "no-such-preset")
    done = CliRunner().invoke(app, ["plan"])
    assert done.exit_code == 2 and "no-such-preset" in done.stderr
    done = CliRunner().invoke(app, ["generate", "-h"])
    assert done.exit_code == 0
    for text in ("Model", "Content", "Output", "-o", "[default: cuda if there is one]"):
        assert text in " ".join(done.stdout.replace("│", " ").split()), text
    assert sys.platform == "win32" or "INFERIX" not in done.stdout
