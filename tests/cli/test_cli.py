"""The command as a user meets it: what it writes, how it fails, and that a seed gives one video."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise

import av
import pytest
import torch
from oracles import write_untrained_world
from typer.testing import CliRunner

from inferix.cli import doctor
from inferix.cli.main import app

RUN = [sys.executable, "-m", "inferix"]
SMALL = ["--model", "wan-tiny", "--size", "32x32", "--blocks", "2"]


def inferix(*arguments, cwd=None):
    return subprocess.run([*RUN, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def count_frames(path):
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_generate_writes_a_video_a_sheet_and_a_record(tmp_path):
    done = inferix("generate", *SMALL, "--out", tmp_path / "a.mp4", "--json")
    assert done.returncode == 0, done.stderr
    assert "random, untrained weights" in done.stderr
    assert json.loads(done.stdout)["frames"] == 21
    assert count_frames(tmp_path / "a.mp4") == 21
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["engine"]["network_timesteps"] == pytest.approx([1000, 937.5, 833.333, 625], abs=1e-3)
    assert set(record["versions"]) >= {"inferix", "torch", "python"}
    assert [block["index"] for block in record["blocks"]] == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.mp4", "a.png"]


def test_records_of_a_run_hold_every_stage_and_add_up(tmp_path):
    """A line for each block and control. Stages follow one another, and passes lie within them."""
    done = inferix(
        "generate", *SMALL, "--blocks", "3", "--set", "local_attn_size=6", "--prompt", "a", "--prompt-at", "0.6",
        "snow", "--records", tmp_path / "a.jsonl", "--out", tmp_path / "a.mp4", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    blocks = [line for line in lines if "passes" in line]
    (control,) = [line for line in lines if "control" in line]
    assert [line["block"] for line in blocks] == [0, 1, 2] and [line["pages"] for line in blocks] == [3, 6, 6]
    assert [ack["id"] for line in blocks for ack in line["acks"]] == [control["control"]]
    assert blocks[control["block"]]["acks"]
    stages = ("queue", "encode", "prepare", "denoise", "commit", "decode", "emit")
    for line in blocks:
        seconds, spans = line["seconds"], line["spans"]
        assert set(seconds) == set(spans) == set(stages)
        for before, after in pairwise(stages):
            assert spans[before][0] <= spans[before][1] <= spans[after][0], (before, after)
        assert all(seconds[stage] == pytest.approx(spans[stage][1] - spans[stage][0]) for stage in stages)
        assert len(line["passes"]) == 4 + 1 and min(line["passes"]) > 0
        assert sum(line["passes"][:4]) <= seconds["denoise"] and line["passes"][4] <= seconds["commit"]
        assert line["slack"] is None and line["overload"] == []  # nothing is due: a file is not played
    written = json.loads((tmp_path / "a.json").read_text())["blocks"]
    for line, block in zip(blocks, written, strict=True):
        assert block["timings"] == {stage: line["seconds"][stage] for stage in stages[:-1]}
    assert blocks[-1]["spans"]["decode"][1] - blocks[0]["spans"]["queue"][0] <= json.loads(done.stdout)["seconds"]


def test_the_same_seed_gives_the_same_file_in_two_processes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        done = inferix("generate", *SMALL, "--seed", seed, "--latents-only", "--out", tmp_path / f"{name}.mp4")
        assert done.returncode == 0, done.stderr
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_a_world_follows_actions(tmp_path):
    world = ["--model", write_untrained_world(tmp_path / "world"), "--preset", "tinyworld"]
    done = inferix("generate", *world, "--actions", "2R U", "--prompt", "a dark red fox", "--out", tmp_path / "a.mp4")
    assert done.returncode == 0, done.stderr
    assert "warning: the small world does not know 'dark'" in done.stderr
    assert count_frames(tmp_path / "a.mp4") == 1 + 3 * 4
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["opened_with"]["actions"] == "['right', 'right', 'up']"
    for arguments, said in (
        ((*world, "--prompt", "a fox", "--actions", "3R", "--blocks", "9"), "3 actions, for 4 latent frames"),
        ((*world, "--prompt", "a fox", "--actions", "3Q"), "actions hold '3Q'; expected words such as 8S (stay)"),
        ((*world, "--prompt", "qqq"), "knows no word of 'qqq'"),
        (("--model", "wan-tiny", "--actions", "3R"), "follows no actions"),
    ):
        done = inferix("generate", *arguments, "--out", tmp_path / "b.mp4")
        assert done.returncode == 2, done.stderr
        assert said in done.stderr, done.stderr
        assert not (tmp_path / "b.mp4").exists()


def test_image_and_video_begin_the_stream(tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    done = inferix(
        "generate", *SMALL, "--image", tmp_path / "red.png", "--preset", "self-forcing-framewise",
        "--out", tmp_path / "a.mp4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert count_frames(tmp_path / "a.mp4") == 1 + 4 + 4
    done = inferix("generate", *SMALL, "--video", tmp_path / "a.mp4", "--out", tmp_path / "b.mp4")
    assert done.returncode == 0, done.stderr
    assert count_frames(tmp_path / "b.mp4") == 9 + 12 + 12


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere.pt", "--prompt", "a"], "no such file"),
        (["--preset", "self-forcin"], "did you mean 'self-forcing'"),
        (["--set", "local_atn_size=6"], "did you mean 'local_attn_size'"),
        (["--set", "sink_size"], "key=value"),
        (["--set", "device=cuda"], "use --device"),
        (["--size", "100x100"], "96x96 or 112x112"),
        (["--size", "big"], "WIDTHxHEIGHT"),
        (["--blocks", "0"], "--blocks"),
        (["--blocks", "1.5"], "valid integer"),
        (["--seconds", "-1"], "--seconds"),
        (["--prompt", ""], "empty"),
        (["--prompt", "x" * 100_000], "100000 characters"),
        (["--prompt", os.fsdecode(b"\xff\xfe")], "UTF-8"),
        (["--device", "cuda"], "no GPU"),
        (["--device", "gpu"], "expected cpu"),
        (["--dtype", "float31"], "did you mean 'float32'"),
        (["--seed", "-1"], "seed"),
        (["--image", "setup.cfg"], "image"),
        (["--prompt-embeds", "none.safetensors"], "none.safetensors"),
        (["--out", "/proc/none/a.mp4"], "cannot write"),
        (["--out", "a.gif"], "must end in"),
        (["--nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, said):
    if "--device" in arguments and arguments[1] == "cuda":
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    done = inferix("generate", "--model", "wan-tiny", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_exit_code_1_and_debug_shows_the_traceback(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"damaged")
    plain = inferix("generate", "--model", tmp_path / "model.pt", "--prompt", "a", "--out", tmp_path / "a.mp4")
    assert plain.returncode == 1
    assert plain.stderr.startswith("error: cannot read") and plain.stderr.count("\n") == 1
    shown = inferix("--debug", "generate", "--model", tmp_path / "model.pt", "--prompt", "a", cwd=tmp_path)
    assert shown.returncode == 1 and "Traceback" in shown.stderr


def heed_ctrl_c() -> None:
    """Undo, in a child, what it inherits where a shell runs the tests in the background: SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_keeps_the_finished_blocks_in_a_playable_file(tmp_path):
    run = subprocess.Popen(
        [*RUN, "generate", *SMALL[:2], "--size", "64x64", "--blocks", "500", "--out", str(tmp_path / "a.mp4")],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    part = tmp_path / "a.mp4.part"
    deadline = time.monotonic() + 120
    while not (part.exists() and part.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert "of 500 blocks were finished" in said
    record = json.loads((tmp_path / "a.json").read_text())
    assert count_frames(tmp_path / "a.mp4") >= record["frames"] > 0
    assert not part.exists()


def test_memory_that_runs_out_is_told_in_a_line(monkeypatch):
    monkeypatch.setattr(doctor, "report", lambda: torch.empty(10**15))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "error: memory ran out: " in done.output and "inferix plan says what fits" in done.output
    assert isinstance(CliRunner().invoke(app, ["--debug", "doctor"]).exception, RuntimeError)


def test_checkpoint_commands(tmp_path):
    done = inferix("checkpoint", "random", "--spec", "wan-tiny", "--format", "self-forcing", tmp_path / "ck")
    assert done.returncode == 0, done.stderr
    done = inferix("checkpoint", "inspect", tmp_path / "ck", "--json")
    assert json.loads(done.stdout)["format"] == "self-forcing"
    done = inferix(
        "generate", "--model", tmp_path / "ck", "--prompt", "a", *SMALL[2:], "--out", tmp_path / "a.mp4",
    )  # fmt: skip
    assert done.returncode == 0 and "untrained" not in done.stderr
    assert len(json.loads((tmp_path / "a.json").read_text())["engine"]["checkpoint"]["sha256"]) == 64


def test_prompts_over_time_and_presets(tmp_path):
    done = inferix(
        "generate", *SMALL, "--preset", "longlive", "--prompt", "a street", "--prompt-at", "0.5", "snow falls",
        "--out", tmp_path / "a.mp4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "a.json").read_text())["prompts_at_blocks"] == {"1": "snow falls"}
    (tmp_path / "story.yaml").write_text("- {at: 9, prompt: late}\n")
    for arguments, said in (
        (["--storyboard", tmp_path / "story.yaml"], "beyond the last block"),
        (["--prompt-at", "soon", "x"], "SECONDS"),
        (["--prompt-at", "1"], "too few values"),
        (["--strength", "0.5"], "no video"),
        (["--negative-prompt", "blur"], "no guidance"),
        (["--preset", "causal-diffusion"], "negative prompt"),
    ):
        done = inferix("generate", *SMALL, "--prompt", "a", *arguments, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr, done.stderr
    shown = inferix("generate", "--list-presets")
    assert shown.returncode == 0 and "rolling-forcing" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100


def test_doctor_and_help():
    done = inferix("doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)
    verbs = ("generate", "play", "eval tinyworld", "bench kernels", "doctor", "checkpoint random", "checkpoint inspect")
    for verb in verbs:
        shown = inferix(*verb.split(), "--help")
        assert shown.returncode == 0 and ("Example" in shown.stdout or verb == "doctor")
