"""The scripts and the notebook of `examples/` run as they stand, in an empty folder."""

import ast
import json
import runpy
from pathlib import Path

import pytest
from torch import Tensor

EXAMPLES = Path(__file__).parents[1] / "examples"
PRINTED = {  # script: a part of what it prints, and a file it writes
    "stream_to_file": ("block 5", "robot.mp4"),
    "steer_live": ("is the first to show 'ghost'", None),
    "fork_and_compare": ("right and left differ by", "fork.png"),
    "own_checkpoint": ("block 0: latents [2, 16, 4, 4], 5 frames", "mine.yaml"),
    "own_kernel": ("refused: example_gated_add: ", None),
}
SLOW = ("fork_and_compare", "own_checkpoint")  # some seconds each

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in PRINTED]
)
def test_a_script_runs(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    words, file = PRINTED[name]
    assert words in capsys.readouterr().out
    assert file is None or (tmp_path / file).stat().st_size > 0


def test_every_script_is_run_and_short():
    scripts = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() == PRINTED.keys()
    assert all(len(path.read_text("utf-8").splitlines()) < 70 for path in scripts.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Cell after cell in one namespace, as a kernel would; the last expression of a cell is its value."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "first_stream.ipynb").read_text("utf-8"))
    assert notebook["nbformat"] == 4
    shared, values = {}, []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            tree = ast.parse("".join(cell["source"]))
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, "notebook", "exec"), shared)
            if last is not None:
                values.append(eval(compile(ast.Expression(last.value), "notebook", "eval"), shared))
    described, pictures, acks, both = values
    assert [index for index, _, _ in described] == [0, 1, 2, 3] and acks == [True]
    assert pictures.size == (4 * 64 * 3, 64 * 3) and both.size == (2 * 64 * 3, 64 * 3)
    assert not any(isinstance(value, Tensor) for value in values)
