"""The command end to end: its outputs, its failures, and the same video for the same seed.

It runs in this process except where a process is the subject: the entry point, signals, the same seed in two of them.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from oracles import write_untrained_world
from safetensors.torch import load_file
from typer.testing import CliRunner

from inferix.cli import doctor, options
from inferix.cli.main import app
from inferix.errors import InferixError
from inferix.models import registry
from inferix.runtime.media import VideoWriter

RUN = [sys.executable, "-m", "inferix"]
SMALL = ["--model", "wan-tiny", "--size", "32x32", "--blocks", "2"]


def inferix(*arguments):
    """Run the command in this process; an error that is not the package's own is raised."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def process(*arguments, cwd=None):
    """Run the command in a process of its own."""
    return subprocess.run([*RUN, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def count_frames(path):
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_generate_writes_a_video_a_sheet_and_a_record(tmp_path):
    done = inferix("generate", *SMALL, "--out", tmp_path / "a.mp4", "--json")
    assert done.exit_code == 0, done.stderr
    assert "untrained" in done.stderr and "--model" in done.stderr
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
    assert done.exit_code == 0, done.stderr
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
        options = ("generate", *SMALL, "--seed", seed, "--latents-only", "--out", tmp_path / f"{name}.mp4")
        done = process(*options) if name == "b" else inferix(*options)
        assert (done.returncode if name == "b" else done.exit_code) == 0, done.stderr
    files = [(tmp_path / f"{name}.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_a_world_follows_actions(tmp_path):
    world = ["--model", write_untrained_world(tmp_path / "world"), "--preset", "tinyworld"]
    options = (*world, "--actions", "2R U", "--prompt", "a dark red fox", "--out", tmp_path / "a.mp4")
    with pytest.warns(UserWarning, match="'dark'"):
        done = inferix("generate", *options)
    assert done.exit_code == 0, done.stderr
    assert count_frames(tmp_path / "a.mp4") == 1 + 3 * 4
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["opened_with"]["actions"] == "['right', 'right', 'up']"
    for repeat, expected in (((), "['right', 'up']"), (("--repeat-actions",), "['right', 'up', 'right', 'up']")):
        longer = ("--prompt", "a fox", "--actions", "R U", "--blocks", "5", "-o", tmp_path / "c.gif", *repeat)
        assert inferix("generate", *world, *longer).exit_code == 0
        assert count_frames(tmp_path / "c.gif") == 1 + 4 * 4
        assert json.loads((tmp_path / "c.json").read_text())["opened_with"]["actions"] == expected
    for arguments, words in (
        ((*world, "--prompt", "a fox", "--repeat-actions"), "--actions"),
        ((*world, "--prompt", "a fox", "--actions", "3Q"), "actions.*'3Q'.*8S"),
        ((*world, "--prompt", "qqq"), "'qqq'"),
        (("--model", "wan-tiny", "--actions", "3R"), "actions"),
    ):
        done = inferix("generate", *arguments, "--out", tmp_path / "b.mp4")
        assert done.exit_code == 2, done.stderr
        assert re.search(words, done.stderr), done.stderr
        assert not (tmp_path / "b.mp4").exists()


def test_image_and_video_begin_the_stream(tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    done = inferix(
        "generate", *SMALL, "--image", tmp_path / "red.png", "--preset", "self-forcing-framewise",
        "--out", tmp_path / "a.mp4",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert count_frames(tmp_path / "a.mp4") == 1 + 4 + 4
    done = inferix("generate", *SMALL, "--video", tmp_path / "a.mp4", "--out", tmp_path / "b.mp4")
    assert done.exit_code == 0, done.stderr
    assert count_frames(tmp_path / "b.mp4") == 9 + 12 + 12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nowhere.pt", "--prompt", "a"], "'nowhere.pt'"),
        (["--preset", "self-forcin"], "'self-forcin'.*'self-forcing'"),
        (["--set", "local_atn_size=6"], "'local_atn_size'.*'local_attn_size'"),
        (["--set", "sink_size"], "--set 'sink_size'.*key=value"),
        (["--set", "device=cuda"], "--set device.*--device"),
        (["--size", "100x100"], "100x100.*96x96.*112x112"),
        (["--size", "big"], "--size 'big'.*832x480"),
        (["--blocks", "0"], "--blocks.*0"),
        (["--blocks", "1.5"], "--blocks"),
        (["--seconds", "-1"], "--seconds.*-1"),
        (["--prompt", ""], "prompt"),
        (["--prompt", "x" * 100_000], "prompt.*100000"),
        (["--prompt", os.fsdecode(b"\xff\xfe")], "prompt.*UTF-8"),
        (["--device", "cuda"], "cuda"),
        (["--device", "gpu"], "'gpu'.*cpu"),
        (["--dtype", "float31"], "'float31'.*'float32'"),
        (["--seed", "-1"], "seed.*-1"),
        (["--image", "setup.cfg"], "image.*setup.cfg"),
        (["--prompt-embeds", "none.safetensors"], "none.safetensors"),
        (["--out", "/proc/none/a.mp4"], "/proc/none"),
        (["--out", "a.flv"], "--out 'a.flv'.*mp4"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, arguments, words):
    if "--device" in arguments and arguments[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    done = inferix("generate", "--model", "wan-tiny", *arguments)
    assert done.exit_code == 2, done.stderr
    assert re.search(words, done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_process_ends_with_an_error_line_and_exit_code_2(tmp_path):
    done = process("generate", "--model", "wan-tiny", "--prompt", os.fsdecode(b"\xff\xfe"), cwd=tmp_path)
    assert done.returncode == 2 and re.search("prompt.*UTF-8", done.stderr.splitlines()[-1]), done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_exit_code_1_and_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"damaged")
    plain = inferix("generate", "--model", tmp_path / "model.pt", "--prompt", "a", "--out", tmp_path / "a.mp4")
    assert plain.exit_code == 1
    assert plain.stderr.startswith("error: ") and "model.pt" in plain.stderr and plain.stderr.count("\n") == 1
    shown = inferix("--debug", "generate", "--model", tmp_path / "model.pt", "--prompt", "a")
    assert shown.exit_code == 1 and "Traceback" in shown.stderr


def restore_sigint() -> None:
    """Undo, in a child process, the ignored SIGINT that it inherits from tests run in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_the_finished_blocks_in_a_playable_file(tmp_path, number, code):
    run = subprocess.Popen(
        [*RUN, "generate", "--set", "num_steps=1", "--blocks", "2000", "--records", str(tmp_path / "a.jsonl"),
         "--out", str(tmp_path / "a.mp4")],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=restore_sigint,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(path.stat().st_size for path in tmp_path.glob("a.jsonl*")):
        time.sleep(0.1)
    run.send_signal(number)
    _, printed = run.communicate(timeout=60)
    assert run.returncode == code, printed
    assert "of 2000 blocks" in printed
    record = json.loads((tmp_path / "a.json").read_text())
    assert count_frames(tmp_path / "a.mp4") >= record["frames"] > 0
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) >= len(record["blocks"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.jsonl", "a.mp4", "a.png"]


@pytest.fixture
def cats(tmp_path, monkeypatch):
    """cat.png, cat.mp4 of 33 frames at 16 FPS, an adapter, a storyboard and actions, in the working folder."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    with VideoWriter("cat.mp4", 16, (32, 32)) as writer:
        writer.add(np.zeros((33, 32, 32, 3), np.uint8))
    Image.new("RGB", (30, 40), "red").save("cat.png")
    Path("cat.json").write_text('["up"]')
    Path("cat.yaml").write_text("prompt: a cat\n")
    Path("cat.safetensors").touch()
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["--image", "cat.png", "--out", "cat.mov"],
        ["--image", "{}/cat.png", "--out", "cat.mkv"],
        ["--video", "cat.mp4", "--out", "cat.mp4"],
        ["--video", "link.mp4", "--out", "cat.mp4"],
        ["--video", "hard.mp4", "--out", "cat.mp4"],
        ["--actions", "cat.json", "--out", "cat.mov"],
        ["--config", "cat.json", "--out", "cat.mov"],
        ["--storyboard", "cat.yaml", "--records", "cat.yaml", "--out", "new.mp4"],
        ["--lora", "cat.safetensors", "--latents-only", "--out", "cat.mov"],
        ["--prompt-embeds", "cat.safetensors", "--latents-only", "--out", "cat.mov"],
        ["--text-encoder", "cat.safetensors", "--latents-only", "--out", "cat.mov"],
        ["--set", "fast_vae=cat.safetensors", "--latents-only", "--out", "cat.mov"],
        ["--model", "ck", "--out", "ck/config.mp4"],
        ["--model", "ck/w.pt", "--out", "ck/config.mp4"],
        ["--out", "new.mp4", "--records", "new.json"],
        ["--out", "new.mp4", "--records", "new.png"],
        ["--out", "new.mp4", "--records", "./new.mp4"],
        ["--out", "trace.mp4", "--profile", "."],
        ["--image", "p/trace.json", "--out", "new.mp4", "--profile", "p"],
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_no_output_is_an_input_or_another_output(cats, arguments):
    """Refused before anything is loaded or written."""
    Path("link.mp4").symlink_to("cat.mp4")
    os.link("cat.mp4", "hard.mp4")
    for folder, names in {"ck": ("config.json", "w.pt"), "p": ("trace.json",)}.items():
        Path(folder).mkdir()
        for name in names:
            Path(folder, name).write_text("{}")
    if "cat.yaml" in arguments:
        Path("cat.yaml").write_text("- {at: 1, prompt: a cat}\n")
    if "--config" in arguments:
        Path("cat.json").write_text("{}")
    before = {path: path.read_bytes() for path in cats.rglob("*") if path.is_file()}
    done = inferix("generate", *(argument.format(cats) for argument in arguments))
    assert done.exit_code == 2 and done.output.startswith("error: "), done.output
    assert any(str(argument) in done.output for argument in arguments), done.output
    assert {path: path.read_bytes() for path in cats.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("error", [InferixError("block 2 is not finite"), RuntimeError("DefaultCPUAllocator: no room")])
@pytest.mark.parametrize("kind", [[], ["--latents-only"]], ids=["video", "latents"])
def test_an_error_at_a_block_keeps_those_before_it(tmp_path, monkeypatch, error, kind):
    def failing(session, blocks, cues, decode):
        yield from session.stream(2, decode)
        raise error

    monkeypatch.setattr("inferix.cli.generate.steered", failing)
    files = ("--out", tmp_path / "a.mp4", "--records", tmp_path / "a.jsonl")
    done = inferix("generate", *SMALL[:4], "--blocks", "4", *files, *kind)
    assert done.exit_code == 1 and "2 of 4 blocks" in done.output and str(error).split()[-1] in done.output
    record = json.loads((tmp_path / "a.json").read_text())
    assert len(record["blocks"]) == 2 and str(error).split()[-1] in record["failed"]
    if kind:
        assert len(load_file(tmp_path / "a.safetensors")["latents"]) == 6
    else:
        assert count_frames(tmp_path / "a.mp4") == record["frames"] == 21
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2


def test_a_full_disk_keeps_what_was_made(tmp_path, monkeypatch):
    """A limit of a file's size stands for the disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(session, blocks, cues, decode):
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
        yield from session.stream(blocks, decode)

    monkeypatch.setattr("inferix.cli.generate.steered", limited)
    try:
        done = inferix("generate", *SMALL[:4], "--blocks", "12", "--out", tmp_path / "a.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.exit_code == 1 and "a.mp4" in done.output and "of 12 blocks" in done.output, done.output
    assert json.loads((tmp_path / "a.json").read_text())["failed"]
    assert 0 < count_frames(tmp_path / "a.mp4") < 141
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("name", ["10:30.mp4", "-a.mp4"])
def test_names_with_colons_and_dashes(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    done = inferix("generate", *SMALL[:4], "--blocks", "1", "--out", name)
    assert done.exit_code == 0 and count_frames(tmp_path / name) == 9, done.output


def test_a_video_that_is_too_short_is_told_before_the_first_block(cats):
    common = (*SMALL[:4], "--video", "cat.mp4", "--strength", "0.6", "--out", "out.mp4")
    for length in (["--blocks", "5"], ["--seconds", "3.5"]):
        done = inferix("generate", *common, *length)
        assert done.exit_code == 2 and "33 frames" in done.output and "3 blocks" in done.output, done.output
        assert not Path("out.mp4").exists()
    with VideoWriter("cat.mp4", 16, (32, 32)) as writer:
        writer.add(np.zeros((22, 32, 32, 3), np.uint8))
    assert inferix("generate", *common).exit_code == 0  # without a length, as long as the video
    assert count_frames("out.mp4") == 21


def test_fit_is_chosen_by_name(cats):
    common = (*SMALL[:4], "--preset", "self-forcing-framewise", "--blocks", "1", "--out", "out.mp4")
    common += ("--image", "cat.png")
    first = {}
    for fit in ("crop", "pad"):
        done = inferix("generate", *common, "--fit", fit)
        assert done.exit_code == 0, done.output
        assert json.loads(Path("out.json").read_text())["fit"] == fit
        with av.open("out.mp4") as container:
            first[fit] = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.abs(first["crop"].astype(int) - first["pad"]).max() > 40
    done = inferix("generate", *common, "--fit", "fill")
    assert done.exit_code == 2 and "'fill'" in done.output


def test_a_prompt_that_is_cut_is_warned_of_and_in_the_record(tmp_path):
    with pytest.warns(UserWarning, match="512"):
        done = inferix("generate", *SMALL[:4], "--blocks", "1", "--prompt", "a dog " * 100, "--out", tmp_path / "a.mp4")
    assert done.exit_code == 0, done.output
    (warning,) = json.loads((tmp_path / "a.json").read_text())["warnings"]
    assert "512" in warning and len(warning) < 400


def test_an_empty_negative_prompt_is_taken_and_an_empty_prompt_is_not(tmp_path):
    common = (*SMALL[:4], "--preset", "causal-diffusion", "--set", "num_steps=2", "--out", tmp_path / "a.mp4")
    done = inferix("generate", *common, "--blocks", "1", "--negative-prompt", "", "--prompt", "a cat")
    assert done.exit_code == 0, done.output
    for prompt in ("", "  ", "&nbsp;"):
        done = inferix("generate", *SMALL, "--prompt", prompt, "--out", tmp_path / "b.mp4")
        assert done.exit_code == 2 and "empty" in done.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--actions", "900000000R"], ["--actions", "9" * 5000 + "R"], ["--blocks", str(10**30)], ["--seconds", "1e300"],
        ["--seconds", "nan"], ["--seconds", "inf"], ["--size", "9" * 5000 + "x32"], ["--set", "a=" + "[" * 50_000],
        ["--set", "a=!!int x"], ["--set", "a=&a [*a]"], ["--config", "bomb.yaml"], ["--config", "fifo"],
        ["--storyboard", "fifo"], ["--actions", "fifo.json"], ["--image", "fifo"], ["--video", "/dev/zero"],
        ["--prompt-at", "1e400 x"], ["--config", "cat.mp4"], ["--storyboard", "."],
    ],
    ids=range(19),
)  # fmt: skip
def test_hostile_values_end_in_a_short_line(cats, arguments):
    Path("bomb.yaml").write_text("a: &a [x]\nb: [*a, *a]\n")
    for name in ("fifo", "fifo.json"):
        os.mkfifo(name)
    done = inferix("generate", "--model", "tinyworld", "--preset", "tinyworld", *arguments)
    assert done.exit_code == 2 and len(done.output) < 1500, done.output
    assert not Path("out.mp4").exists()


def test_out_of_memory_is_one_line(monkeypatch):
    monkeypatch.setattr(doctor, "report", lambda: torch.empty(10**15))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert done.output.startswith("error: ") and "inferix plan" in done.output and done.output.count("\n") == 1
    assert isinstance(CliRunner().invoke(app, ["--debug", "doctor"]).exception, RuntimeError)


def test_checkpoint_commands(tmp_path):
    done = inferix("checkpoint", "random", "--spec", "wan-tiny", "--format", "self-forcing", tmp_path / "ck")
    assert done.exit_code == 0, done.stderr
    done = inferix("checkpoint", "inspect", tmp_path / "ck", "--json")
    assert json.loads(done.stdout)["format"] == "self-forcing"
    done = inferix(
        "generate", "--model", tmp_path / "ck", "--prompt", "a", *SMALL[2:], "--out", tmp_path / "a.mp4",
    )  # fmt: skip
    assert done.exit_code == 0 and "untrained" not in done.stderr
    assert len(json.loads((tmp_path / "a.json").read_text())["engine"]["checkpoint"]["sha256"]) == 64


def test_prompts_over_time_and_presets(tmp_path, monkeypatch):
    done = inferix(
        "generate", *SMALL, "--preset", "longlive", "--prompt", "a street", "--prompt-at", "0.5", "snow falls",
        "--out", tmp_path / "a.mp4",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert json.loads((tmp_path / "a.json").read_text())["prompts_at_blocks"] == {"1": "snow falls"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "story.yaml").write_text("- {at: 9, prompt: late}\n")
    for arguments, words in (
        (["--storyboard", tmp_path / "story.yaml"], "9"),
        (["--prompt-at", "soon", "x"], "--prompt-at.*'soon'"),
        (["--prompt-at", "1"], "--prompt-at"),
        (["--strength", "0.5"], "strength.*0.5.*--video"),
        (["--negative-prompt", "blur"], "negative.prompt|guidance"),
        (["--preset", "causal-diffusion"], "--negative-prompt"),
    ):
        done = inferix("generate", *SMALL, "--prompt", "a", *arguments)
        assert done.exit_code == 2 and re.search(words, done.stderr), done.stderr
    shown = inferix("generate", "--list-presets")
    assert shown.exit_code == 0 and "rolling-forcing" in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100


def test_doctor_and_help():
    done = inferix("doctor", "--json")
    assert done.exit_code == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)
    verbs = ("generate", "play", "eval tinyworld", "bench kernels", "doctor", "checkpoint random", "checkpoint inspect",
             "serve", "route")  # fmt: skip
    for verb in verbs:
        shown = inferix(*verb.split(), "--help")
        assert shown.exit_code == 0 and ("Example" in shown.stdout or verb == "doctor")


def loaded_by(code, modules):
    """Those of `modules` that a process has loaded after running `code`."""
    script = f"import sys\n{code}\nprint(*[name for name in {modules!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stderr.splitlines()[-1].split()


def test_help_and_bad_options_load_no_torch():
    """All of them in one process, since none of them loads it."""
    ends = [
        (["--help"], 0), (["--version"], 0), (["generate", "--help"], 0), (["play", "--help"], 0),
        (["plan", "--help"], 0), (["graph", "--help"], 0), (["bench", "block", "--help"], 0), (["eval", "--help"], 0),
        (["checkpoint", "--help"], 0), (["export", "--help"], 0), (["doctor", "--help"], 0), (["serve", "--help"], 0),
        (["route", "--help"], 0),
        (["generate", "--no-such-option"], 2),
        (["generate", "--size", "3"], 2), (["generate", "--blocks", "0"], 2), (["no-such-command"], 2),
    ]  # fmt: skip
    run = (
        "from inferix.cli.main import main\n"
        f"for arguments, code in {ends!r}:\n"
        "    sys.argv = ['inferix', *arguments]\n"
        "    try:\n        main()\n"
        "    except SystemExit as end:\n        assert end.code == code, (arguments, end.code)\n"
        "    assert 'torch' not in sys.modules, arguments"
    )
    assert loaded_by(run, ["torch", "transformers", "av", "PIL"]) == []


def test_a_block_of_the_small_world_loads_no_compiler():
    run = (
        "from inferix import load\n"
        "session = load(device='cpu').open(prompt='a red robot in a snowy forest by day')\n"
        "next(iter(session.stream(1)))"
    )
    assert loaded_by(run, ["torch._dynamo", "sympy", "transformers"]) == []


def test_the_untrained_model_of_the_help_is_the_registry_s():
    assert options.UNTRAINED == registry.UNTRAINED
