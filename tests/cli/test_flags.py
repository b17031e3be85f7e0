"""Errors of the library name Python arguments; the command adds the flags."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from inferix.cli import doctor
from inferix.cli.flags import FLAGS, flags_of, with_flags
from inferix.cli.main import app
from inferix.errors import UsageError


@pytest.mark.parametrize(
    ("message", "flags"),
    [
        ("no VAE in 'a.pt'; give base, a folder that has one", ["--base"]),
        ("give a prompt or prompt_embeds, and not both", ["--prompt", "--prompt-embeds"]),
        ("krea encodes pictures again; leave vae out", ["--vae"]),
        ("lora_scale is 0.5, but there is no adapter; give lora", ["--lora-scale", "--lora"]),
        ("it is an adapter; give it as lora", ["--lora"]),
        ("it fits in part; merge the rest with lora_partial", ["--lora-partial"]),
        ("give negative_prompt, or set guidance_scale=1", ["--negative-prompt", "--set guidance_scale=1"]),
        ("no end of graphs; give a window such as local_attn_size=21", ["--set local_attn_size=21"]),
        ("--lora-scale is nan; expected a number for lora_scale", []),
        ("no value; expected key=value, such as --set local_attn_size=21", []),
        ("'give base' and 'sink_size=3' are no checkpoints", []),
        ("the video shows a prompt of size 3; give one of them", []),
        ("use_ema is False; leave use_ema out", []),
        ("line=1 of the file is broken", []),
    ],
)  # fmt: skip
def test_arguments_become_flags(message: str, flags: list[str]) -> None:
    assert flags_of(message) == flags
    assert with_flags(message).startswith(message) and all(flag in with_flags(message) for flag in flags)


def test_every_flag_is_an_option_of_generate() -> None:
    generate = get_command(app).commands["generate"]
    options = {option for param in generate.params for option in param.opts}
    assert set(FLAGS.values()) <= options


def test_the_printed_line_has_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    def report() -> None:
        raise UsageError("no VAE here; give base, a folder that has one")

    monkeypatch.setattr(doctor, "report", report)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ") and "give base" in done.stderr and "--base" in done.stderr
    assert done.stderr.count("\n") == 1


WITH_SET = {  # commands with --set, by their needed arguments, and an option of their own
    "generate": ([], "device"),
    "serve": ([], "device"),
    "plan": ([], "size"),
    "export": (["--out", "engine"], "dtype"),
    "graph": ([], "dtype"),
    "bench block": ([], "device"),
    "bench stream": ([], "device"),
    "bench parallel": (["--model", "wan-tiny"], "device"),
    "eval run": (["--prompts", "prompts.txt", "--out", "study"], "size"),
}


def commands(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{path}{name} ")
        yield f"{path}{name}", command


def test_every_command_with_settings_is_listed() -> None:
    having = {name for name, command in commands(get_command(app)) if any("--set" in p.opts for p in command.params)}
    assert having == WITH_SET.keys()


@pytest.mark.parametrize("command", WITH_SET)
def test_a_setting_with_an_option_of_its_own_is_refused(command: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a canal\n")
    needed, key = WITH_SET[command]
    done = CliRunner().invoke(app, [*command.split(), *needed, "--set", f"{key}=1"])
    error = done.stderr if done.exception is None or isinstance(done.exception, SystemExit) else str(done.exception)
    assert done.exit_code != 0 and f"--{key}" in error and key in error
    assert {path.name for path in tmp_path.iterdir()} == {"prompts.txt"}
