"""`merge_parts`: attention over all keys from attention over parts of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..op import Op
from ..spec import ANY_FLOAT, ARCHITECTURES, FLOATS, Arg, Implementation, KernelSpec
from . import reference

SPEC = KernelSpec(
    name="merge_parts",
    reference=reference.merge_parts,
    outputs=("out", "lse"),
    like="out",
    args={
        "results": Arg("parts rows tokens heads dim", (torch.float32,)),
        "sums": Arg("parts rows heads tokens", (torch.float32,)),
        "out": Arg("rows tokens heads dim", ANY_FLOAT),
        "lse": Arg("rows heads tokens", (torch.float32,)),
    },
    family="elementwise",
    label="merge of parts",
    flops="3 * parts * rows * tokens * heads * dim",
    implementations=(Implementation("triton", ".merge_parts.gpu:merge_parts", ARCHITECTURES, FLOATS, (64, 128)),),
    make_inputs=reference.make_inputs,
    test_cases=reference.TEST_CASES,
    bench_cases=reference.BENCH_CASES,
    tolerance=reference.TOLERANCE,
)
OP = Op(SPEC)


def merge_parts(results: Tensor, sums: Tensor, out: Tensor, *, lse: Tensor | None = None) -> Tensor:
    """Join results of parts of the keys, weighted by their shares of the sum of exponentials, in order of the parts.

    results: float32 [parts, R, T, H, D]. sums: float32 [parts, R, H, T], natural logs of the sums of exponentials,
    minus infinity for a part without keys; one part at least has some. out: [R, T, H, D], where to write, in any
    float. lse: float32 [R, H, T], filled with the log of the whole sum.

    Raises UsageError naming the argument that does not fit.
    Source: Flash-Decoding (Dao et al., 2023, pytorch.org/blog/flash-decoding).
    """
    OP(results, sums, out, lse)
    return out


__all__ = ["SPEC", "merge_parts"]
