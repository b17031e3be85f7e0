"""`inferix graph`: prints, draws and dumps without weights; switches; bad input is one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner, Result

from inferix.cli.main import app
from inferix.runtime.programs.graph_store import stored_for


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["graph", "--model", "wan-tiny", "--size", "32x32", *args])


def test_text_picture_and_json_of_one_run(tmp_path: Path) -> None:
    said = run("--preset", "longlive-infinity", "--svg", str(tmp_path / "block.svg"), "--json")
    assert said.exit_code == 0, said.output
    block = json.loads(said.stdout)
    assert block["preset"] == "longlive-infinity" and all(graph["flops"] > 0 for graph in block["passes"])
    names = [graph["name"] for graph in block["passes"]]
    assert names == ["recache", *(f"denoise {step}" for step in range(4)), "commit"]
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
    narrow = run("--kv-dtype", "int8", "--pass", "commit").stdout
    assert narrow.count("inferix::kv_pages") == 2 * 2  # of each layer into its pages, and what is seen out of them
    assert "dead-work" in run("--rewrites").stdout


def test_the_plan_of_scratch() -> None:
    told = run("--plan").stdout
    assert re.search(r"^block: arena \d+ bytes in .* alive together at call \d+, aten::addmm.out \(denoise ", told)
    assert "\nprompt: arena" in told and "\nfold: arena" in told


def test_a_run_starts_from_saved_graphs_and_others_are_refused(tmp_path: Path) -> None:
    """With a new prompt on the way; the run adds nothing, so it traced nothing."""
    scheme = ("--preset", "longlive", "--set", "local_attn_size=6")
    graphs, out = tmp_path / "graphs", tmp_path / "a.mp4"
    made = run(*scheme, "--save", str(graphs))
    assert made.exit_code == 0, made.output
    assert "2 graphs in" in made.stdout and "2 of them new" in made.stdout and "preset longlive, float32" in made.stdout
    held = sorted(path.name for path in graphs.iterdir())
    assert run(*scheme, "--load", str(graphs)).stdout.splitlines()[1:] == made.stdout.splitlines()[1:]
    assert "0 of them new" in run(*scheme, "--save", str(graphs)).stdout
    unnamed = ["graph", "--set", "local_attn_size=6", "--size", "32x32", "--load", str(graphs)]
    assert CliRunner().invoke(app, unnamed).stdout.startswith("2 graphs in") and stored_for(graphs)[0] == "wan-tiny"
    assert run(*scheme, "--load", str(graphs), "--plan").stdout.count("block: arena") == 2

    video = ["generate", "--model", "wan-tiny", "--size", "32x32", *scheme, "--blocks", "3", "--out", str(out)]
    given = ["--executor", "fused", "--graphs", str(graphs), "--prompt-at", "0.6", "snow"]
    done = CliRunner().invoke(app, [*video, *given])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in graphs.iterdir()) == held

    for args, said in (
        (("--dtype", "float64"), "are for dtype 'float32', and this is 'float64'"),
        (("--model", "tinyworld"), "are for model.name 'wan-tiny', and this is 'tinyworld'"),
        (("--set", "sink_size=0"), "are for preset.context.sink_size 3, and this is 0"),
    ):
        refused = run(*scheme, *args, "--load", str(graphs))
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (1, 1) and said in refused.stderr
    identity = json.loads((graphs / "identity.json").read_text())
    for key, value in (("inferix", "0.0.9"), ("torch", "2.0.0"), ("card", "NVIDIA H100 sm_90")):
        (graphs / "identity.json").write_text(json.dumps(identity | {key: value}))
        refused = run(*scheme, "--load", str(graphs))
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (1, 1)
        assert f"are for {key} '{value}', and this is" in refused.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--without", "adalm"), "no rewrite 'adalm'; did you mean 'adaln'?"),
        (("--with", "gelu", "--without", "gelu"), "gelu is both asked for and left out"),
        (("--with", "qk-norm-rope", "--without", "merge-qkv"), "qk-norm-rope needs merge-qkv, which is left out"),
        (("--with", "lowp", "--without", "all", "--lowp", "fp4"), "low precision is 'fp4'; expected one of fp8, int8"),
        (("--keep", "head"), "--keep says which layers --lowp takes"),
        (("--lowp", "int8", "--layers", "blok.*"), "no linear layer of tokens is called 'blok.*'"),
        (("--pass", "denoise 9"), "--pass is 'denoise 9'; this block has 'fold', 'prompt', 'denoise 0'"),
        (("--preset", "krea", "--with", "fuse-commit"), "krea"),
        (("--kv-dtype", "fp4"), "--kv-dtype is 'fp4'; did you mean 'fp8'?"),
        (("--plan", "--json"), "--plan prints where scratch lies; leave --json out"),
        (("--save", "a", "--load", "b"), "--save makes graphs and --load reads them; give one of them"),
        (("--save", "a", "--without", "adaln"), "--without is for a graph that is shown, not for what an engine runs"),
        (("--load", "/no/such/folder"), "/no/such/folder holds no graphs; make some with inferix graph --save"),
        (("--device", "cpu"), "--device is 'cpu', which stored graphs are for; give --save or --load as well"),
        (("--save", "a", "--set", "local_attn_size=-1"), "local_attn_size"),
        (("--svg", "/no/such/folder/block.svg"), "cannot write '/no/such/folder/block.svg'"),
    ],
)
def test_bad_input_is_one_line(args: tuple[str, ...], said: str) -> None:
    found = run(*args)
    assert found.exit_code == 2
    assert said in found.stderr and len(found.stderr.splitlines()) == 1
