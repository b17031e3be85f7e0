"""Help pages of the command: options in panels, and text that is shown as it is written.

Every option is also an environment variable, such as INFERIX_GENERATE_SEED for `inferix generate --seed`.
"""

from __future__ import annotations

import inspect
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

CONTEXT = {"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "INFERIX"}
FEW = 12  # options of a command that has no panels
PANELS = {  # title: names of parameters, in all commands that have them
    "Model": (
        "model", "exported", "base", "vae", "text_encoder", "lora", "lora_scale", "lora_partial", "preset", "names",
        "list_presets", "settings", "offline", "force", "random_weights", "frames_in_window",
    ),
    "Content": (
        "prompt", "prompt_embeds", "negative_prompt", "image", "video", "fit", "strength", "prompt_at", "storyboard",
        "actions", "repeat_actions",
    ),
    "Length and size": ("seconds", "blocks", "size", "seed", "sessions", "minutes", "rounds", "starts", "controls"),
    "Machine": (
        "device", "dtype", "kv_dtype", "executor", "graphs", "precision", "memory", "gpu", "gpus", "parallel", "link",
        "goal", "tflops", "bandwidth",
    ),
    "Output": ("out", "latents_only", "profile", "nvtx", "records", "drift_meter", "svg", "as_json", "table", "sink"),
}  # fmt: skip


class Command(TyperCommand):
    """A command with its options in panels; brackets in help texts are no markup."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        show_as_written(self)
        panels = {name: title for title, names in PANELS.items() for name in names}
        if len(self.params) > FEW:
            for param in self.params:
                if isinstance(param, typer.core.TyperOption) and param.rich_help_panel is None:
                    param.rich_help_panel = panels.get(param.name or "")


class Group(TyperGroup):
    """A group of commands; brackets in help texts are no markup."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        show_as_written(self)


def show_as_written(command: TyperCommand | TyperGroup) -> None:
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    command.help = escape("\n\n".join(" ".join(paragraph.split("\n")) for paragraph in paragraphs))
    for param in command.params:
        if isinstance(param, typer.core.TyperOption | typer.core.TyperArgument):
            param.help, param.show_envvar = escape(param.help or ""), False


def group(kind: type[TyperGroup] = Group) -> typer.Typer:
    """Make the app of a group of commands."""
    return typer.Typer(
        cls=kind,
        context_settings=CONTEXT,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )
