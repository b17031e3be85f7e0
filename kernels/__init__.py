"""Ops that models and graphs share: a plain reference of each, Triton and library forms, and a spec of each.

`spec` has what an op is as data, `op` makes the torch op of a spec, `tuning` chooses the form that runs, and `catalog`
lists all ops. `register` adds a form of a user's, `using` chooses one, `verify` checks one. `attention`, `rope` and
`philox` are plain torch that the references and models build on.
"""

from __future__ import annotations

from collections.abc import Callable

from .spec import using


def register(op: str, name: str, function: Callable[..., None], *, reads_host: bool = False) -> None:
    """Add a form of your own to an op, for `using(op="name")` and `inferix.load(kernels={op: name})`.

    function: takes the parameters of the op's reference in their order, and writes into the op's outputs; it raises
    NotImplementedError for calls that it is not for. reads_host: it reads tensors on the host, so that it cannot be
    captured in a CUDA graph. Raises UsageError for an unknown op, for other parameters, and for the name of a form that
    the op has already; a form of your own is replaced.
    """
    from .catalog import kernel_spec  # which imports all ops

    kernel_spec(op).register(name, function, reads_host=reads_host)


__all__ = ["register", "using"]
