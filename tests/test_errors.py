"""How values of users stand in messages: in one line, cut, without what a terminal would act on."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from inferix.errors import nearest, quoted, quoted_all

ROOT = Path(__file__).resolve().parents[1]
PATHS = {"path", "folder", "file", "source", "destination"}  # names of variables that hold a path or text of a user's
LIBRARY = (
    "checkpoint.py", "media.py", "plugins.py", "user_files.py", "user_python.py", "user_yaml.py", "cli", "models",
    "runtime", "export", "evaluate", "schemes", "kernels", "graphs", "bench", "serve",
)  # fmt: skip
OURS = ("InferixError", "UsageError", "CheckpointError", "Refusal", "warn")


def bare_values(source: str) -> Iterator[str]:
    """Values that stand in the message of an error or warning as they are, or by `repr` in any length.

    They are paths by the name of the variable, and whatever one of our errors shows by `!r` but constants.
    """
    for call in ast.walk(ast.parse(source)):
        name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
        if not name.endswith(("Error", "Refusal", "warn")):
            continue
        for value in ast.walk(call):
            if not isinstance(value, ast.FormattedValue):
                continue
            text = ast.unparse(value.value)
            by_repr = value.conversion == ord("r") and name.endswith(OURS)
            if (by_repr or text.split(".")[-1] in PATHS) and not text.split(".")[0].isupper():
                yield f"line {value.lineno}: {text}"


def test_messages_quote_values() -> None:
    files = [path for name in LIBRARY for path in sorted((ROOT / name).rglob("*.py")) or [ROOT / name]]
    wrong = {str(path.relative_to(ROOT)): list(bare_values(path.read_text("utf-8"))) for path in files}
    assert {name: lines for name, lines in wrong.items() if lines} == {}


@pytest.mark.parametrize(
    "planted",
    ['raise UsageError(f"no {path}")', 'warn(f"{lora.path} is {1}")', 'raise errors.UsageError(f"{source}: no")',
     'raise Refusal("not_found", f"no {model!r}", 404)', 'UsageError(f"no {id[:64]!r}")'],
)  # fmt: skip
def test_a_planted_bare_value_is_found(planted: str) -> None:
    assert len(list(bare_values(planted))) == 1


def test_quoted_values_and_constants_are_accepted() -> None:
    assert list(bare_values('raise UsageError(f"no {quoted(path)} {path.stat().st_size} {SCHEMA!r}")')) == []


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[31mred", "a\0b", "\udcff", "x" * 5000])
def test_quoted_text_is_one_short_printable_line(text: str) -> None:
    for value in (text, Path(text)):
        assert quoted(value).isprintable() and len(quoted(value)) <= 200
        assert quoted(value)[1:4] == repr(text)[1:4]
    several = quoted_all([text] * 9)
    assert several.isprintable() and len(several) <= 400 and several.endswith(", ...")
    assert quoted_all(["a", Path("b")]) == "'a', 'b'"
    assert nearest(text, [text, "other"]).isprintable()


def test_the_nearest_name_stands_in_brackets() -> None:
    assert nearest("fuse", ["eager", "fused"]) == " (did you mean 'fused'?)"
    assert nearest("fuse", ["eager"]) == ""
