"""Map Python arguments in the library's error messages to the flags of the command line.

Library errors name the Python argument, as `base=` or `prompt_embeds`. The command prints the flag beside it, in one
place, so that no message below the command line depends on its flags.
"""

from __future__ import annotations

import re

from ..schemes.presets import FIELDS

# Arguments of `inferix.load` and `Engine.open` that have a flag of their own.
ARGUMENTS = (
    "actions", "base", "executor", "graphs", "image", "lora", "lora_partial", "lora_scale", "negative_prompt", "prompt",
    "prompt_embeds", "size", "strength", "text_encoder", "vae", "video",
)  # fmt: skip
FLAGS = {name: f"--{name.replace('_', '-')}" for name in ARGUMENTS}
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")  # values, which may contain anything
ARGUMENT = re.compile(r"(?<![\w-])([a-z][a-z0-9_]*)(=([\w.-]*\w)?)?(?![\w-])")


def flags_of(message: str) -> list[str]:
    """Return the flags for the arguments that a message names and whose flag it does not contain, in order.

    An argument is `name=`, `name=value` or a name with an underscore. `name=value` for a field of the preset becomes
    `--set name=value`.
    """
    flags: list[str] = []
    for name, assigned, value in ARGUMENT.findall(QUOTED.sub("''", message)):
        if name in FLAGS and (assigned or "_" in name):
            flag = FLAGS[name]
        elif name in FIELDS and value:
            flag = f"--set {name}={value}"
        else:
            continue
        if flag not in flags and not re.search(rf"{flag.split()[0]}(?![\w-])", message):
            flags.append(flag)
    return flags


def with_flags(message: str) -> str:
    """Append the flags of the arguments that a message names, in parentheses."""
    flags = flags_of(message)
    return f"{message} ({', '.join(flags)})" if flags else message
