"""Map Python arguments in the library's error messages to the flags of the command line.

Library errors name the Python argument, as in "give base" or "prompt_embeds is ...". The command prints the flag after
the message, in one place, so that no message below the command line depends on its flags.
"""

from __future__ import annotations

import re

from ..schemes.presets import FIELDS

# Arguments of `inferix.load` and `Engine.open` that `generate` has a flag for.
ARGUMENTS = (
    "actions", "base", "executor", "gpus", "graphs", "image", "kernels", "lora", "lora_partial", "lora_scale", "model",
    "names", "negative_prompt", "parallel", "prompt", "prompt_embeds", "size", "strength", "text_encoder", "vae",
    "video",
)  # fmt: skip
FLAGS = {name: f"--{name.replace('_', '-')}" for name in ARGUMENTS} | {"kernels": "--form"}
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")  # values, which may contain anything
NAME = "|".join(sorted(ARGUMENTS, key=len, reverse=True))
ADVICE = rf"(?:give|leave|set|drop|as)\s+(?:a\s+)?(?:{NAME})(?:\s+(?:or|and)\s+(?:{NAME}))*"
ARGUMENT = re.compile(
    rf"(?<![\w-])(?:(?P<advice>{ADVICE})|(?P<setting>[a-z]\w*)=(?P<value>[\w.-]*\w)|(?P<name>[a-z]\w*_\w*))(?![\w-])"
)


def flags_of(message: str) -> list[str]:
    """Return the flags for the arguments that a message names and whose flag it does not contain, in order.

    An argument is named by an imperative ("give base", "leave vae out"), by a name with an underscore, or, for a field
    of the preset, by `name=value`, whose flag is `--set name=value`.
    """
    flags: list[str] = []
    for match in ARGUMENT.finditer(QUOTED.sub("''", message)):
        if match["advice"]:
            named = [FLAGS[name] for name in re.findall(rf"\b(?:{NAME})\b", match["advice"])]
        elif match["setting"]:
            named = [f"--set {match[0]}"] if match["setting"] in FIELDS else []
        else:
            named = [FLAGS[match["name"]]] if match["name"] in FLAGS else []
        flags += [flag for flag in named if flag not in flags and not contains(message, flag.split()[0])]
    return flags


def contains(message: str, flag: str) -> bool:
    return re.search(rf"{flag}(?![\w-])", message) is not None


def with_flags(message: str) -> str:
    """Append the flags of the arguments that a message names, in parentheses."""
    flags = flags_of(message)
    return f"{message} ({', '.join(flags)})" if flags else message
