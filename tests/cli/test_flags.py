"""Errors of the library name Python arguments; the command adds the flags."""

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
