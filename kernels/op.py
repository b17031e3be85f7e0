"""A torch op from its spec: the schema is the reference's signature, and the op chooses the form that runs."""

from __future__ import annotations

from typing import Any

import torch

from .spec import KernelSpec, OpSpec
from .tuning import choose

# `torch.library.custom_op` would wrap each call in Python code of its own: 90 us a call on a CPU instead of 6 us.
LIBRARY = torch.library.Library("inferix", "FRAGMENT")


class Op:
    """`inferix::<name>`, registered with torch; a call checks its arguments first.

    Every argument is positional, in the order of the reference. The op writes into its outputs and returns nothing, so
    that its fake form, which `torch.export` and fake tensors use, has nothing to do.
    """

    def __init__(self, spec: OpSpec) -> None:
        self.spec = spec
        like = spec.names.index(spec.like)

        def run(*args: Any) -> None:
            form = choose(spec, args[like]) if isinstance(spec, KernelSpec) else spec.reference
            form(*args)

        schema = torch.library.infer_schema(spec.reference, mutates_args=spec.outputs)
        LIBRARY.define(spec.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(spec.name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"inferix::{spec.name}", lambda *args, **kwargs: None, lib=LIBRARY)
        self.overload: torch._ops.OpOverload = getattr(torch.ops.inferix, spec.name).default

    def __call__(self, *args: Any) -> None:
        """Check the arguments and run; UsageError for those that do not fit each other."""
        self.spec.check(*args)
        self.overload(*args)
