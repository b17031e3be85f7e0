"""Transformer tensor names of each published format, as one explicit table from our names per format.

An entry renames a module path; `*` is the layer number, anywhere in a name. A name that no entry matches stays
unchanged, so a wrong file shows up as unexpected names when the model is filled.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from ...errors import UsageError, nearest, quoted

SHARED_ATTENTION = {
    f"blocks.*.{attn}.{part}": f"blocks.*.{attn}.{part}"
    for attn in ("self_attn", "cross_attn")
    for part in ("q", "k", "v", "o", "norm_q", "norm_k")
}

CAMERA = {
    "camera_embedding.projection": "patch_embedding_wancamctrl",
    "camera_embedding.linear_1": "c2ws_hidden_states_layer1",
    "camera_embedding.linear_2": "c2ws_hidden_states_layer2",
    "blocks.*.camera.linear_1": "blocks.*.cam_injector_layer1",
    "blocks.*.camera.linear_2": "blocks.*.cam_injector_layer2",
    "blocks.*.camera.scale": "blocks.*.cam_scale_layer",
    "blocks.*.camera.shift": "blocks.*.cam_shift_layer",
}

ORIGINAL: dict[str, str] = SHARED_ATTENTION | {
    "patch_embedding": "patch_embedding",
    "text_embedding.linear_1": "text_embedding.0",
    "text_embedding.linear_2": "text_embedding.2",
    "time_embedding.linear_1": "time_embedding.0",
    "time_embedding.linear_2": "time_embedding.2",
    "time_embedding.projection": "time_projection.1",
    "action_embedding.linear_1": "action_embedding.0",
    "action_embedding.linear_2": "action_embedding.2",
    "image_embedding.norm_in": "img_emb.proj.0",
    "image_embedding.linear_1": "img_emb.proj.1",
    "image_embedding.linear_2": "img_emb.proj.3",
    "image_embedding.norm_out": "img_emb.proj.4",
    "image_embedding.position": "img_emb.emb_pos",
    **CAMERA,
    "blocks.*.modulation": "blocks.*.modulation",
    "blocks.*.norm_cross": "blocks.*.norm3",
    "blocks.*.cross_attn.k_image": "blocks.*.cross_attn.k_img",
    "blocks.*.cross_attn.v_image": "blocks.*.cross_attn.v_img",
    "blocks.*.cross_attn.norm_k_image": "blocks.*.cross_attn.norm_k_img",
    "blocks.*.ffn.up": "blocks.*.ffn.0",
    "blocks.*.ffn.down": "blocks.*.ffn.2",
    "head.modulation": "head.modulation",
    "head.linear": "head.head",
}

DIFFUSERS: dict[str, str] = {
    "patch_embedding": "patch_embedding",
    "text_embedding.linear_1": "condition_embedder.text_embedder.linear_1",
    "text_embedding.linear_2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.linear_1": "condition_embedder.time_embedder.linear_1",
    "time_embedding.linear_2": "condition_embedder.time_embedder.linear_2",
    "time_embedding.projection": "condition_embedder.time_proj",
    "action_embedding.linear_1": "condition_embedder.action_embedder.linear_1",
    "action_embedding.linear_2": "condition_embedder.action_embedder.linear_2",
    "image_embedding.norm_in": "condition_embedder.image_embedder.norm1",
    "image_embedding.linear_1": "condition_embedder.image_embedder.ff.net.0.proj",
    "image_embedding.linear_2": "condition_embedder.image_embedder.ff.net.2",
    "image_embedding.norm_out": "condition_embedder.image_embedder.norm2",
    "image_embedding.position": "condition_embedder.image_embedder.pos_embed",
    **CAMERA,
    "blocks.*.modulation": "blocks.*.scale_shift_table",
    "blocks.*.self_attn.q": "blocks.*.attn1.to_q",
    "blocks.*.self_attn.k": "blocks.*.attn1.to_k",
    "blocks.*.self_attn.v": "blocks.*.attn1.to_v",
    "blocks.*.self_attn.o": "blocks.*.attn1.to_out.0",
    "blocks.*.self_attn.norm_q": "blocks.*.attn1.norm_q",
    "blocks.*.self_attn.norm_k": "blocks.*.attn1.norm_k",
    "blocks.*.norm_cross": "blocks.*.norm2",
    "blocks.*.cross_attn.q": "blocks.*.attn2.to_q",
    "blocks.*.cross_attn.k": "blocks.*.attn2.to_k",
    "blocks.*.cross_attn.v": "blocks.*.attn2.to_v",
    "blocks.*.cross_attn.o": "blocks.*.attn2.to_out.0",
    "blocks.*.cross_attn.norm_q": "blocks.*.attn2.norm_q",
    "blocks.*.cross_attn.norm_k": "blocks.*.attn2.norm_k",
    "blocks.*.cross_attn.k_image": "blocks.*.attn2.add_k_proj",
    "blocks.*.cross_attn.v_image": "blocks.*.attn2.add_v_proj",
    "blocks.*.cross_attn.norm_k_image": "blocks.*.attn2.norm_added_k",
    "blocks.*.ffn.up": "blocks.*.ffn.net.0.proj",
    "blocks.*.ffn.down": "blocks.*.ffn.net.2",
    "head.modulation": "scale_shift_table",
    "head.linear": "proj_out",
}

TABLES: Mapping[str, Mapping[str, str]] = MappingProxyType({"original": ORIGINAL, "diffusers": DIFFUSERS})
INVERSE: dict[str, dict[str, str]] = {
    form: {theirs: ours for ours, theirs in table.items()} for form, table in TABLES.items()
}
TWIN = "memory_"  # of a name in a file with a second set of weights
FUSED = "blocks.*.self_attn.to_qkv"  # query, key and value in one tensor, which the reader splits
NUMBER = re.compile(r"\d+")
LAYER = re.compile(r"(?<=^blocks\.)(\d+)(?=\.)")
UNDERSCORED = {  # kohya's trainers write an underscore for every dot
    theirs.replace(".", "_"): ours for table in TABLES.values() for ours, theirs in table.items()
}
UNDERSCORED_LAYER = re.compile(r"^blocks_(\d+)_")
PARAMETERS = {"blocks.*.modulation", "head.modulation", "image_embedding.position"}  # entries that are no modules


def table_of(names: str | Mapping[str, str]) -> Mapping[str, str]:
    """Return the table of a `Format.names`: a name of `TABLES`, or a table itself."""
    return TABLES[names] if isinstance(names, str) else names


def to_format(names: str | Mapping[str, str], name: str) -> str:
    """Convert one of our tensor names to those of a table, or of a name of `TABLES`."""
    return _rename(table_of(names), name)


def from_format(names: str | Mapping[str, str], strip: Collection[str], tensors: Iterable[str]) -> dict[str, str]:
    """Map a file's tensor names to ours, first without the longest of the prefixes `strip`."""
    inverse = {theirs: ours for ours, theirs in table_of(names).items()}
    prefixes = sorted(strip, key=len, reverse=True)

    def bare(name: str) -> str:
        return name.removeprefix(next((prefix for prefix in prefixes if name.startswith(prefix)), ""))

    return {name: _rename(inverse, bare(name)) for name in tensors}


def changed_table(base: str | Mapping[str, str], changes: Mapping[str, str]) -> dict[str, str]:
    """Return a table with some names changed; a key such as `blocks.*` changes the beginning of all names under it.

    Raises UsageError for a key that is none of our names or their beginning, and for two entries of one name.
    """
    table = dict(table_of(base))
    for ours, theirs in sorted(changes.items(), key=lambda item: len(item[0])):
        below = [name for name in ORIGINAL if name.startswith(f"{ours}.")]
        if ours not in ORIGINAL and ours != FUSED and not below:
            raise UsageError(
                f"names has {quoted(ours)}, which is no tensor of this family{nearest(ours, ORIGINAL)}; expected "
                f"{', '.join(list(ORIGINAL)[-8:])}, ..., or the beginning of such names"
            )
        if ours in ORIGINAL or ours == FUSED:
            table[ours] = theirs
        for name in below:
            if table[name].startswith(f"{ours}."):
                table[name] = theirs + table[name].removeprefix(ours)
    if twice := [name for name, count in Counter(table.values()).items() if count > 1]:
        raise UsageError(f"names has {quoted(twice[0])} for two tensors; expected a name of its own for each")
    return table


def twin_of(name: str) -> str | None:
    """Return the name of the plain tensor whose twin a file's tensor is; None for a tensor that is no twin."""
    plain = ".".join(part.removeprefix(TWIN) for part in name.split("."))
    return plain if plain != name else None


def twin_name(name: str) -> str:
    """Return the name of the twin of a file's tensor: of a parameter within blocks, of a module outside of them.

    Source: SGF+ (arXiv 2610.10429), github.com/Zihan-Su/Self_Gradient_Forcing_Plus.
    """
    if not name.startswith("blocks."):
        return f"{TWIN}{name}"
    module, _, leaf = name.rpartition(".")
    return f"{module}.{TWIN}{leaf}"


def our_module(name: str) -> str | None:
    """Return our name for a module or parameter of any published format, dotted or underscored; None if unknown."""
    layer = LAYER.search(name) or UNDERSCORED_LAYER.search(name)
    generic = UNDERSCORED_LAYER.sub("blocks_*_", LAYER.sub("*", name))
    for table in (*INVERSE.values(), UNDERSCORED):
        if ours := table.get(generic):
            return ours.replace("*", layer[1]) if layer else ours
    return name if generic in ORIGINAL else None


def is_parameter(module: str) -> bool:
    """Return True if one of our names is a parameter, not a module with a weight."""
    return LAYER.sub("*", module) in PARAMETERS


def _rename(table: Mapping[str, str], name: str) -> str:
    """Rename a tensor by its own name or its module's; each number in it may be the layer's, `*` in the table."""
    for layer in (None, *NUMBER.finditer(name)):
        generic = name if layer is None else f"{name[: layer.start()]}*{name[layer.end() :]}"
        module, _, leaf = generic.rpartition(".")
        if (renamed := table.get(generic)) is None and module in table:
            renamed = f"{table[module]}.{leaf}"
        if renamed is not None:
            return renamed if layer is None else renamed.replace("*", layer[0])
    return name
