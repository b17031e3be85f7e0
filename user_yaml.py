"""YAML files that a user gives, read in bounded time and memory; the errors are UsageError."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from .errors import UsageError, cut, quoted
from .user_files import LARGEST_TEXT, read_text

MOST_VALUES = 10_000  # in a YAML text, keys among them
LONGEST_INTEGER = 64  # characters
DEEPEST = 32  # lists and mappings inside one another


def read_yaml(path: str | Path, name: str) -> Any:
    """The content of a YAML file; UsageError if it cannot be read. See `parse_yaml`."""
    return parse_yaml(read_text(path, name), f"{name} {quoted(str(path))}")


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text: null, booleans, numbers, texts, lists and mappings; UsageError for anything else.

    Dates stay texts. Aliases, a key given twice, nesting deeper than 32 and more than 10,000 values are refused: with
    aliases a small text stands for an enormous value. `where` names the text in messages.
    """
    if len(text) > LARGEST_TEXT:
        raise UsageError(f"{where} has {len(text)} characters; expected at most {LARGEST_TEXT}")
    try:
        depth = values = 0
        for event in yaml.parse(text, Loader=Loader):  # without recursion, unlike building the value
            if isinstance(event, yaml.AliasEvent):
                raise UsageError(f"{where} has the alias *{cut(str(event.anchor))}; write its value in its place")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            values += isinstance(event, yaml.NodeEvent)
            if depth > DEEPEST:
                raise UsageError(f"{where} has lists or mappings more than {DEEPEST} deep; expected fewer levels")
            if values > MOST_VALUES:
                raise UsageError(f"{where} has more than {MOST_VALUES} values; expected fewer")
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, ValueError, KeyError, IndexError) as error:  # all but the first: `!!int x`, `!!bool x`
        if isinstance(error, UsageError):
            raise
        message = " ".join(str(error).split())
        raise UsageError(f"{where} is not YAML: {cut(message)}; correct it, or quote it as text") from error


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader, only for the values of JSON; a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in counts.items() if count > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{quoted(twice[0])} stands twice", node.start_mark)
        found: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return found

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(str(node.value)) > LONGEST_INTEGER:
            raise yaml.constructor.ConstructorError(None, None, f"no integer: {quoted(node.value)}", node.start_mark)
        return int(super().construct_yaml_int(node))


PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
Loader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix("tag:yaml.org,2002:") in PLAIN
}
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":merge", ":value"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
