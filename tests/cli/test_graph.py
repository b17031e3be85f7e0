"""`inferix graph`: prints, draws and dumps without weights; switches; bad input is one line."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from inferix.cli.main import app
from inferix.graphs.dump import from_dict, to_dict


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["graph", "--model", "wan-tiny", "--size", "32x32", *args])


def test_text_picture_and_json_of_one_run(tmp_path: Path) -> None:
    said = run("--preset", "longlive-infinity", "--svg", str(tmp_path / "block.svg"), "--json")
    assert said.exit_code == 0, said.output
    block = from_dict(json.loads(said.stdout))
    assert json.dumps(to_dict(block)) == said.stdout.strip()
    assert [graph.name for graph in block.passes] == ["recache", *(f"denoise {step}" for step in range(4)), "commit"]
    picture = ElementTree.parse(tmp_path / "block.svg").getroot()
    words = "".join(picture.itertext())
    assert all(wanted in words for wanted in ("preset longlive-infinity", "launches as denoise 0", "hoist-prompt"))
    assert [path.name for path in tmp_path.iterdir()] == ["block.svg"]


def test_switches() -> None:
    plain = run("--without", "all")
    assert "as traced: no rewrite was done" in plain.stdout and "qk_norm_rope_append" not in plain.stdout
    fewer = run("--without", "merge-qkv", "--without", "fold")
    assert "rms-norm" in fewer.stdout and "qk-norm-rope" not in fewer.stdout and "fold (" not in fewer.stdout
    more = run("--with", "fuse-commit", "--lowp", "fp8", "--keep", "blocks.0.*", "--pass", "commit + denoise 0")
    assert more.stdout.count("inferix::linear_lowp") == 6 and "literal [0.0, 0.0, 0.0, 1000.0" not in more.stdout
    assert "dead-work" in run("--rewrites").stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--without", "adalm"), "no rewrite 'adalm'; did you mean 'adaln'?"),
        (("--with", "gelu", "--without", "gelu"), "gelu is both asked for and left out"),
        (("--with", "qk-norm-rope", "--without", "merge-qkv"), "qk-norm-rope needs merge-qkv, which is left out"),
        (("--with", "lowp", "--without", "all", "--lowp", "fp4"), "low precision is 'fp4'; expected one of fp8, int8"),
        (("--keep", "head"), "--keep says which layers --lowp takes"),
        (("--lowp", "int8", "--layers", "blok.*"), "no linear layer is called 'blok.*'"),
        (("--pass", "denoise 9"), "--pass is 'denoise 9'; this block has 'fold', 'prompt', 'denoise 0'"),
        (("--preset", "krea", "--with", "fuse-commit"), "krea has no commit that could wait"),
        (("--svg", "/no/such/folder/block.svg"), "cannot write '/no/such/folder/block.svg'"),
    ],
)
def test_bad_input_is_one_line(args: tuple[str, ...], said: str) -> None:
    found = run(*args)
    assert found.exit_code == 2
    assert said in found.stderr and len(found.stderr.splitlines()) == 1
