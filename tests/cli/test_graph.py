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
    done = run("--preset", "longlive-infinity", "--svg", str(tmp_path / "block.svg"), "--json")
    assert done.exit_code == 0, done.output
    block = json.loads(done.stdout)
    assert block["preset"] == "longlive-infinity" and all(graph["flops"] > 0 for graph in block["passes"])
    names = [graph["name"] for graph in block["passes"]]
    assert names == ["recache", *(f"denoise {step}" for step in range(4)), "commit"]
    picture = ElementTree.parse(tmp_path / "block.svg").getroot()
    text = "".join(picture.itertext())
    assert all(label in text for label in ("longlive-infinity", "denoise 0", "hoist-prompt"))
    assert [path.name for path in tmp_path.iterdir()] == ["block.svg"]


FEW_STEPS = pytest.mark.parametrize(
    "preset", ["causal-forcing-2step", pytest.param("self-forcing", marks=pytest.mark.slow)]
)


@FEW_STEPS
def test_switches(preset: str) -> None:
    def run_preset(*args: str) -> Result:
        return run("--preset", preset, *args)

    plain = run_preset("--without", "all")
    assert plain.exit_code == 0 and "qk_norm_rope_append" not in plain.stdout
    fewer = run_preset("--without", "merge-qkv", "--without", "fold")
    assert "rms-norm" in fewer.stdout and "qk-norm-rope" not in fewer.stdout and "fold (" not in fewer.stdout
    more = run_preset("--with", "fuse-commit", "--lowp", "fp8", "--keep", "blocks.0.*", "--pass", "commit + denoise 0")
    assert more.stdout.count("inferix::linear_lowp") == 6 and "literal [0.0, 0.0, 0.0, 1000.0" not in more.stdout
    narrow = run_preset("--kv-dtype", "int8", "--pass", "commit").stdout
    assert narrow.count("inferix::kv_pages") == 2 * 2  # per layer one write to its pages and one read
    assert "dead-work" in run_preset("--rewrites").stdout


@FEW_STEPS
def test_the_plan_of_scratch(preset: str) -> None:
    text = run("--preset", preset, "--plan").stdout
    assert re.search(r"^block: arena \d+ bytes .* call \d+, aten::addmm.out \(denoise ", text)
    assert "\nprompt: arena" in text and "\nfold: arena" in text


def test_a_run_starts_from_saved_graphs_and_others_are_refused(tmp_path: Path) -> None:
    """With a new prompt on the way; the run adds nothing, so it traced nothing."""
    scheme = ("--preset", "longlive", "--set", "local_attn_size=6")
    graphs, out = tmp_path / "graphs", tmp_path / "a.mp4"
    made = run(*scheme, "--save", str(graphs))
    assert made.exit_code == 0, made.output
    assert re.match("3 graphs in .*, 3 .*longlive.*float32", made.stdout)
    names = sorted(path.name for path in graphs.iterdir())
    assert run(*scheme, "--load", str(graphs)).stdout.splitlines()[1:] == made.stdout.splitlines()[1:]
    assert re.match("3 graphs in .*, 0 ", run(*scheme, "--save", str(graphs)).stdout)
    unnamed = ["graph", "--set", "local_attn_size=6", "--size", "32x32", "--load", str(graphs)]
    assert CliRunner().invoke(app, unnamed).stdout.startswith("3 graphs in") and stored_for(graphs)[0] == "wan-tiny"
    assert run(*scheme, "--load", str(graphs), "--plan").stdout.count("block: arena") == 3

    video = ["generate", "--model", "wan-tiny", "--size", "32x32", *scheme, "--blocks", "3", "--out", str(out)]
    options = ["--executor", "fused", "--graphs", str(graphs), "--prompt-at", "0.6", "snow"]
    done = CliRunner().invoke(app, [*video, *options])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in graphs.iterdir()) == names

    for args, words in (
        (("--dtype", "float64"), "dtype 'float32'.*'float64'"),
        (("--model", "tinyworld"), "model.name 'wan-tiny'.*'tinyworld'"),
        (("--set", "sink_size=0"), "preset.context.sink_size 3.* 0"),
    ):
        refused = run(*scheme, *args, "--load", str(graphs))
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (1, 1)
        assert re.search(words, refused.stderr), refused.stderr
    identity = json.loads((graphs / "identity.json").read_text())
    for key, value in (("inferix", "0.0.9"), ("torch", "2.0.0"), ("card", "NVIDIA H100 sm_90")):
        (graphs / "identity.json").write_text(json.dumps(identity | {key: value}))
        refused = run(*scheme, "--load", str(graphs))
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (1, 1)
        assert f"{key} '{value}'" in refused.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--without", "adalm"), "'adalm'.*'adaln'"),
        (("--with", "gelu", "--without", "gelu"), "gelu.*--with.*--without"),
        (("--with", "qk-norm-rope", "--without", "merge-qkv"), "qk-norm-rope.*merge-qkv"),
        (("--with", "lowp", "--without", "all", "--lowp", "fp4"), "'fp4'.*fp8, int8"),
        (("--keep", "head"), "--keep.*--lowp"),
        (("--lowp", "int8", "--layers", "blok.*"), r"'blok\.\*'"),
        (("--pass", "denoise 9"), "--pass.*'denoise 9'.*'fold', 'prompt', 'denoise 0'"),
        (("--preset", "krea", "--with", "fuse-commit"), "krea.*commit"),
        (("--kv-dtype", "fp4"), "--kv-dtype.*'fp4'.*'fp8'"),
        (("--plan", "--json"), "--plan.*--json"),
        (("--save", "a", "--load", "b"), "--save.*--load"),
        (("--save", "a", "--without", "adaln"), "--without"),
        (("--load", "/no/such/folder"), "/no/such/folder.*--save"),
        (("--device", "cpu"), "--device.*'cpu'.*--save.*--load"),
        (("--save", "a", "--set", "local_attn_size=-1"), "--set local_attn_size=21"),
        (("--svg", "/no/such/folder/block.svg"), "'/no/such/folder/block.svg'"),
    ],
)
def test_bad_input_is_one_line(args: tuple[str, ...], words: str) -> None:
    done = run(*args)
    assert done.exit_code == 2
    assert re.search(words, done.stderr) and len(done.stderr.splitlines()) == 1, done.stderr
