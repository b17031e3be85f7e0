"""All rewrites, in the order in which they are done, and what does them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ...errors import UsageError, nearest, quoted
from ...kernels.dense_attention.run import Run
from ..compose import chained
from ..types import BlockGraph, Change
from .adaln import adaln
from .base import Rewrite, launches, on_each_graph
from .cross_attention import cross_attention
from .dead_work import dead_work
from .denoise_step import denoise_step
from .dense_attention import dense_attention
from .gated_norm import gated_norm
from .gelu import gelu
from .lowp import PrecisionMap, lowp
from .merge_qkv import merge_qkv
from .partition import fold, hoist_frames, hoist_prompt
from .patch_embedding import patch_embedding
from .qk_norm_rope import qk_norm_rope
from .rms_norm import rms_norm
from .split_keys import split_keys
from .swiglu import swiglu
from .wide_linear import wide_linear

EVERY_LAYER = PrecisionMap("fp8", ("*",))
REWRITES: dict[str, Rewrite] = {
    rewrite.name: rewrite
    for rewrite in (
        Rewrite("fuse-commit", "a block's commit in the next one's first pass", None, default=False),
        Rewrite("dead-work", "what no later pass, result or state needs is not computed", dead_work),
        Rewrite("patch-embedding", "a convolution over patches as a matmul", on_each_graph(patch_embedding)),
        Rewrite("merge-qkv", "queries, keys and values in one matmul", on_each_graph(merge_qkv)),
        Rewrite(
            "qk-norm-rope", "norm, rotation and the write into pages in one kernel", on_each_graph(qk_norm_rope),
            needs=("merge-qkv",),
        ),
        Rewrite("rms-norm", "norms that no rotation follows in one kernel", on_each_graph(rms_norm)),
        Rewrite(
            "cross-attention", "attention to the prompt over one page of its keys and values, without a copy",
            on_each_graph(cross_attention),
        ),
        Rewrite("dense-attention", "attention over pages that are one run through a library's kernel", None),
        Rewrite("split-keys", "attention over parts of the keys, where a GPU's last wave would not be full", None),
        Rewrite("gated-norm", "gate, norm, residual and the next norm in one kernel", on_each_graph(gated_norm)),
        Rewrite("adaln", "residual, layer norm and modulation in one kernel", on_each_graph(adaln)),
        Rewrite("denoise-step", "unpatchify, solver step and noise in one kernel", on_each_graph(denoise_step)),
        Rewrite("gelu", "GELU in the last step of its matmul", on_each_graph(gelu)),
        Rewrite("swiglu", "SiLU of one half of a projection times the other in one kernel", on_each_graph(swiglu)),
        Rewrite("hoist-prompt", "what the prompt alone decides is computed once per prompt", hoist_prompt),
        Rewrite("hoist-frames", "what a block's cameras alone decide is computed once per block", hoist_frames),
        Rewrite("lowp", "linear layers on FP8 or INT8 operands", lowp(EVERY_LAYER), default=False),
        Rewrite("wide-linear", "half-precision matmuls with a result in float32", on_each_graph(wide_linear)),
        Rewrite("fold", "what weights and timesteps alone decide is computed once", fold),
    )
}  # fmt: skip


def chosen(with_: Collection[str] = (), without: Collection[str] = ()) -> list[str]:
    """Names of the rewrites to do, in order: those done by default, more, and fewer.

    Leaving one out leaves out those that need it. Raises UsageError for an unknown name, for one that is both asked
    for and left out, and for one that is asked for without what it needs.
    """
    for name in (*with_, *without):
        if name not in REWRITES:
            raise UsageError(f"no rewrite {quoted(name)}{nearest(name, REWRITES)}; there are {', '.join(REWRITES)}")
    if both := sorted(set(with_) & set(without)):
        raise UsageError(f"rewrite {both[0]} is both asked for and left out; give one of --with and --without")
    names: list[str] = []
    for name, rewrite in REWRITES.items():
        lacking = [need for need in rewrite.needs if need not in names]
        if name in with_ and lacking:
            raise UsageError(f"rewrite {name} needs {lacking[0]}, which is left out; leave both out, or neither")
        if name not in without and not lacking and (rewrite.default or name in with_):
            names.append(name)
    return names


def rewritten(
    block: BlockGraph,
    names: Collection[str],
    precision: PrecisionMap = EVERY_LAYER,
    multiprocessors: int = 0,
    run: Run | None = None,
) -> BlockGraph:
    """The block after these rewrites, in their order; `changes` says what each did. The given block stays as it is.

    precision: which layers `lowp` packs, and how. multiprocessors: of the GPU that `split-keys` is for, which is left
    out with 0. run: pages that every list is, for `dense-attention`, which is left out without.
    """
    result, set_up = copied(block), {"lowp": lowp(precision)}
    if run is not None:
        set_up["dense-attention"] = dense_attention(run)
    if multiprocessors:
        set_up["split-keys"] = split_keys(multiprocessors)
    for rewrite in REWRITES.values():
        apply = set_up.get(rewrite.name, rewrite.apply)
        if apply is not None and rewrite.name in names:
            before, known = counted(result), {node for graph in result.graphs for node in graph}
            result, places = apply(result)
            after = counted(result)
            for node in (node for graph in result.graphs for node in graph if node not in known):
                node.meta["rewrite"] = rewrite.name
            change = Change(rewrite.name, places, before[0], after[0], before[1], after[1])
            result = replace(result, changes=(*result.changes, change))
    return result


def copied(block: BlockGraph) -> BlockGraph:
    """The block with graphs of its own, which rewrites may change in place."""
    fold_, prompt, frames = (
        None if graph is None else chained(graph.name, graph) for graph in (block.fold, block.prompt, block.frames)
    )
    passes = tuple(chained(graph.name, graph) for graph in block.passes)
    return replace(block, fold=fold_, prompt=prompt, frames=frames, passes=passes)


def counted(block: BlockGraph) -> tuple[int, int]:
    """Calls, and those of them that launch something, of all passes of a block."""
    return sum(len(list(graph)) for graph in block.passes), sum(len(launches(graph)) for graph in block.passes)
