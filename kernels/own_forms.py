"""Forms of ops that users bring: a function with the reference's parameters, whose errors name it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import InferixError, UsageError, no_memory, quoted
from ..user_python import raised


@dataclass(frozen=True)
class OwnForm:
    """A user's form of an op.

    reads_host: it reads tensors on the host, so that it cannot be captured in a CUDA graph.
    """

    op: str
    name: str
    function: Callable[..., None]
    reads_host: bool = False

    def __call__(self, *args: Any, **named: Any) -> None:
        """Run the function.

        What it raises becomes an InferixError that names form, file and line, a NotImplementedError a UsageError: the
        form declines such calls. Errors of Inferix and a lack of memory pass as they are.
        """
        try:
            self.function(*args, **named)
        except InferixError:
            raise
        except NotImplementedError as error:
            raise UsageError(f"{self.op}: form {quoted(self.name)} declines this call: {error}") from error
        except Exception as error:  # the function is the user's, and so is what it raises
            if no_memory(error):
                raise
            reason = raised(error, self.source_file or "")
            raise InferixError(f"{self.op}: form {quoted(self.name)} raised {reason}") from error

    @property
    def source_file(self) -> str | None:
        """Path of the file that defines the function; None for a function that is not from a file."""
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        return None if code is None else str(code.co_filename)


def own_form(
    op: str, expected: tuple[str, ...], name: str, function: Callable[..., None], reads_host: bool
) -> OwnForm:
    """Make a user's form; UsageError unless its parameters begin with those `expected`, and others have defaults."""
    signature = f"({', '.join(expected)})"
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise UsageError(f"{op}: form {quoted(name)} is {quoted(function)}; expected a function {signature}") from error
    first, rest = parameters[: len(expected)], parameters[len(expected) :]
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    if tuple(one.name for one in first) != expected or any(
        one.default is one.empty and one.kind not in variable for one in rest
    ):
        has = ", ".join(one.name for one in parameters)
        raise UsageError(f"{op}: parameters of form {quoted(name)} are ({has}); expected {signature}, in this order")
    return OwnForm(op, name, function, reads_host)
