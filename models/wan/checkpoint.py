"""Read published transformers: detect format and sizes, map tensors by name, fill the model strictly."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import CheckpointError, UsageError, nearest, quoted, quoted_all
from ...schemes.presets import EXPERTS, WITH_MEMORY
from ..family import Checkpoint, Format, merged
from ..files import alike_in_file, check_file, read_json, read_tensors
from ..spec import ModelSpec
from ..state_dicts import EXPERTS as EXPERTS_BY_FOLDER
from ..state_dicts import (
    WEIGHTS,
    Place,
    WeightFiles,
    check_names_one_file,
    choose_state_dict,
    find_weight_files,
    read_weight_files,
    refuse_two_experts,
    state_dicts,
)
from ..text.umt5_checkpoint import TEXT_FILES
from .lora import fitting, read_lora
from .names import from_format, to_format, twin_of
from .spec import FAMILY, MODELS
from .vae_checkpoint import TINY_DECODERS, VAE_FILES

SHARD = "diffusion_pytorch_model.safetensors"
FORMATS: dict[str, Format] = {
    "original": Format("original", SHARD),
    "diffusers": Format("diffusers", SHARD),
    "self-forcing": Format("original", "self_forcing_dmd.pt", ("generator_ema", "generator")),
    "causvid": Format("original", "model.pt", ("generator",)),
    "longlive": Format("original", "longlive_base.pt", ("generator_ema", "generator", "model"), lora="lora.pt"),
    "krea": Format("original", "krea-realtime-video-14b.safetensors"),
    "rolling-forcing": Format("original", "rolling_forcing_dmd.pt", ("generator_ema", "generator")),
    "longlive2": Format("original", "model_bf16.pt", ("generator", "model")),
    "sgf": Format("original", "model.pt", ("generator_ema", "generator")),
    "sgf-plus": Format("original", "model.pt", ("generator_ema", "generator"), twins=True),
    "a14b": Format("original", SHARD, experts=("high_noise_model", "low_noise_model")),
    "a14b-diffusers": Format("diffusers", SHARD, experts=("transformer", "transformer_2")),
    "lingbot": Format("original", SHARD, folder="transformers"),
}
EXPERT_FOLDERS = tuple(layout.experts for layout in FORMATS.values() if layout.experts)
INDEX = "model_index.json"
FIRST_TENSOR = "patch_embedding.weight"  # in every transformer
CAMERA_TENSOR = "patch_embedding_wancamctrl.weight"  # in every transformer with a camera, as published
TRANSFORMER_FOLDERS = ("transformer", "transformers", "unet", "diffusion_models")  # of a pipeline or ComfyUI's models
STEMS = (SHARD.removesuffix(".safetensors"), "model")  # of published shards
PIXEL_RAY, ACTION_RAY = 6, 7  # channels of a pixel that follows a camera, and that follows actions besides
LEFTOVERS = ("_cls_pred_branch.", "_register_tokens", "_gan_ca_blocks.")  # training's critic, not the generator
LONGEST_TEXT = 4096  # rows that a config may ask for
HEAD_DIM = 128  # of every published model; used where there is no config to read it from
SIZES = ("dim", "ffn_dim", "num_heads", "num_layers", "in_channels", "out_channels", "text_dim")


def read_checkpoint(
    path: str | Path,
    form: str | Format | None = None,
    use_ema: bool = True,
    known: Collection[ModelSpec] | None = None,
) -> Checkpoint:
    """Map a checkpoint file or folder; one of the sizes of a `known` model (Wan's, if None) is that model.

    form: a name of `FORMATS`, or a layout that has none. Raises UsageError if it is no transformer, CheckpointError for
    a broken file.
    """
    path, known = Path(path), MODELS.values() if known is None else known
    if isinstance(form, str) and form not in FORMATS:
        raise UsageError(f"no checkpoint format {quoted(form)}{nearest(form, FORMATS)}; there are {', '.join(FORMATS)}")
    if (folders := expert_folders(path)) is not None:
        return read_experts(path, folders, form, use_ema, known)
    refuse_experts(path)
    return read_transformer(path, form, use_ema, known)


def read_experts(
    path: Path, folders: tuple[str, str], form: str | Format | None, use_ema: bool, known: Collection[ModelSpec]
) -> Checkpoint:
    """Map the expert for high noise and the one for low noise, each in a folder of its own."""
    index = read_json(path / INDEX) or {}
    boundary = index.get("boundary_ratio")
    if boundary is not None and not (isinstance(boundary, float) and 0 < boundary < 1):
        raise UsageError(f"{quoted(path / INDEX)}: boundary_ratio is {quoted(boundary)}; expected a number in 0..1")
    names = next(name for name, layout in FORMATS.items() if layout.experts == folders)
    layout = None if form == names else form
    high, low = (read_transformer(path / folder, layout, use_ema, known) for folder in folders)
    if high.spec != low.spec:
        raise UsageError(
            f"{quoted(path)}: {folders[0]} is a {high.spec.name}, {folders[1]} a {low.spec.name}; expected equal sizes"
        )
    return Checkpoint(
        path, names, (*high.files, *low.files), high.tensors, high.spec, None, EXPERTS, (low.tensors,), boundary
    )


def read_transformer(path: Path, form: str | Format | None, use_ema: bool, known: Collection[ModelSpec]) -> Checkpoint:
    """Map one transformer; as `read_checkpoint`."""
    source, config = find_transformer(path, known)
    content = read_weight_files(source)
    name = source.files[0].name
    given = FORMATS[form] if isinstance(form, str) else form
    layouts = list(own_layouts().values()) if given is None else [given]
    place, raw = choose_state_dict(
        path, content, "Wan transformer", lambda tensors: any(is_transformer(tensors, one) for one in (None, *layouts)),
        use_ema, expected_keys(given, name, content), FIRST_TENSOR,
    )  # fmt: skip
    if adapters := adapters_in(path, content):
        warnings.warn(
            f"{quoted(path)} holds an adapter, too ({quoted(adapters[0])}), which is not merged; give the file as "
            "lora to merge it",
            stacklevel=2,
        )
    form = form or detect_format(name, place, raw)
    layout = FORMATS[form] if isinstance(form, str) else form
    if place.keys and layout.weights and not set(place.keys) & set(layout.weights):
        raise UsageError(
            f"{quoted(path)} holds {quoted(str(place))}; expected {' or '.join(layout.weights)}, or another "
            "checkpoint_format"
        )
    twins = {plain: raw[name] for name in raw if (plain := twin_of(name)) is not None}
    tensors = our_tensors(path, {name: tensor for name, tensor in raw.items() if twin_of(name) is None}, layout)
    spec = read_spec(path, config, tensors, known)
    label = form if isinstance(form, str) else layout.file
    lora = published_lora(source, layout)
    if not twins:
        return Checkpoint(path, label, source.files, tensors, spec, lora)
    memory = tensors | our_tensors(path, twins, layout)  # a plain tensor without a twin is its own
    return Checkpoint(path, label, source.files, tensors, spec, lora, WITH_MEMORY, (memory,))


def our_tensors(path: Path, raw: Mapping[str, Tensor], layout: Format) -> dict[str, Tensor]:
    """A file's tensors by our names, joined ones split."""
    tensors: dict[str, Tensor] = {}
    for bare, ours in from_format(layout.names, layout.strip, raw).items():
        for part, value in unfused(ours, raw[bare]).items() if not bare.startswith(LEFTOVERS) else ():
            if part in tensors:
                raise UsageError(f"{quoted(path)} has {quoted(part)} under two names; expected each tensor once")
            tensors[part] = value
    return tensors


def own_layouts() -> dict[str, Format]:
    """Return the formats that have a table of names of their own."""
    return {form: layout for form, layout in FORMATS.items() if not isinstance(layout.names, str)}


def adapters_in(path: Path, content: Mapping[Any, Any]) -> list[str]:
    """Return the places of the adapters in a training file."""
    groups = state_dicts(path, content, ("generator_lora", "lora"))
    return sorted(
        str(place) for place, group in groups.items() if place.keys and any(".lora_" in name for name in group)
    )


def is_transformer(tensors: Mapping[str, Tensor], layout: Format | None = None) -> bool:
    """Return True for the names of a Wan transformer, in any published format or in a layout of its own."""
    names = tensors if layout is None else from_format(layout.names, layout.strip, tensors).values()
    return FIRST_TENSOR in names and any(name.startswith("blocks.") for name in names)


def expected_keys(layout: Format | None, file: str, content: Mapping[Any, Any]) -> tuple[str, ...]:
    """Return the keys of a file's weights, best first: those of its format, or of the format that its name suggests."""
    if layout is None:
        form = next((name for name in named_after(file) if set(FORMATS[name].weights) & content.keys()), "original")
        layout = FORMATS[form]
    return layout.weights


def named_after(file: str) -> list[str]:
    return [form for form, layout in FORMATS.items() if layout.file == file != SHARD]


def published_lora(source: WeightFiles, layout: Format) -> Path | None:
    """Return the adapter that is published with a format's file, if both are in one folder under published names."""
    file = source.files[0]
    if layout.lora is None or file.name != layout.file or not (lora := file.with_name(layout.lora)).is_file():
        return None
    return lora if "generator_lora" in read_tensors(lora) else None


def unfused(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Split a joined [3 * d, ...] tensor into query, key and value; returns any other tensor under its name."""
    if ".self_attn.to_qkv." not in name or tensor.ndim == 0 or len(tensor) % 3:
        return {name: tensor}
    return {name.replace("to_qkv", part): piece for part, piece in zip("qkv", tensor.chunk(3), strict=True)}


def find_transformer(path: Path, known: Collection[ModelSpec]) -> tuple[WeightFiles, dict[str, Any] | None]:
    """Find the transformer's files, and the config beside them if it is a Wan transformer's.

    Raises UsageError if there is no transformer at `path`, or more than one.
    """
    if not path.exists():
        names = [spec.name for spec in known]
        listed = f"{nearest(str(path), names)}; names of models are {', '.join(names)}"
        raise UsageError(f"no checkpoint {quoted(path)}: no such file or folder{listed}")
    if not path.is_dir():
        check_file(path, "checkpoint")
        check_names_one_file(path)
        return WeightFiles((path,)), transformer_config(path.parent)
    folders = [folder for name in TRANSFORMER_FOLDERS if (folder := path / name).is_dir()]
    right_here = published_files(path) if is_transformer_folder(path) else None
    if right_here and folders:
        raise UsageError(f"{quoted(path)} holds a transformer and a folder {quoted(folders[0].name)}; name one of them")
    if right_here:
        return right_here, transformer_config(path)
    for folder in folders or [path]:
        if source := published_files(folder) or only_file(folder):
            return source, transformer_config(folder)
    raise UsageError(f"{quoted(path)} holds no transformer; expected {SHARD}, its shards or a .pt")


def published_files(folder: Path) -> WeightFiles | None:
    """Find the files of a transformer in a folder under a published name; None for other names."""
    files = find_weight_files(folder, STEMS[0])
    if files is None and (folder / f"{STEMS[1]}.safetensors.index.json").exists():
        files = find_weight_files(folder, STEMS[1])
    return files


def is_transformer_folder(folder: Path) -> bool:
    """Return False if the weights directly in a folder are a VAE's, which have the same file name."""
    return (read_json(folder / "config.json") or {}).get("_class_name") != "AutoencoderKLWan"


def only_file(folder: Path) -> WeightFiles | None:
    """Find the only file of tensors in a folder that is no other part of a model. Raises UsageError for several."""
    others = {*TEXT_FILES, *VAE_FILES, *TINY_DECODERS, "words.safetensors", *(form.lora for form in FORMATS.values())}
    files = sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS and file.name not in others)
    if len(files) > 1:
        names = quoted_all(file.name for file in files)
        raise UsageError(f"{quoted(folder)} holds several checkpoints ({names}); name one of them")
    if not files:
        return None
    check_names_one_file(files[0])
    return WeightFiles((files[0],))


def expert_folders(path: Path) -> tuple[str, str] | None:
    """Return the folders of two experts in a folder, that for high noise first; None for any other path.

    CheckpointError where only one of them is there, or none of which the pipeline's index has two.
    """
    if not path.is_dir():
        return None
    index = read_json(path / INDEX) or {}
    second = index.get("transformer_2")
    indexed = index.get("boundary_ratio") is not None or (isinstance(second, list) and any(second))
    for folders in EXPERT_FOLDERS:
        present = [name for name in folders if (path / name).is_dir()]
        known_by = [name for name in present if name in EXPERTS_BY_FOLDER] or ([INDEX] if indexed and present else [])
        if known_by and len(present) == len(folders):
            return folders
        if known_by:
            (absent,) = set(folders) - set(present)
            raise CheckpointError(
                f"{quoted(path)} is of a two-expert model ({quoted(known_by[0])}), but lacks {quoted(absent)}; the "
                "download is not complete"
            )
    return None


def refuse_experts(path: Path) -> None:
    """Raise UsageError for one transformer of a two-expert model, by folder, pipeline index or file name.

    Symbolic links are not resolved: in a model cache the target of a link has no telling name.
    """
    whole = Path(os.path.abspath(path))
    folder = whole if path.is_dir() else whole.parent
    part = folder.name in ("transformer", *EXPERTS_BY_FOLDER)
    if half := re.search(r"(high|low)[-_ ]?noise", whole.name, re.IGNORECASE):
        refuse_two_experts(path, half[0])
    if not part and not path.is_dir():
        return
    root = folder.parent if part else folder
    for name in EXPERTS_BY_FOLDER:
        if (root / name).exists():
            refuse_two_experts(path, name)
    index = read_json(root / INDEX) or {}
    second = index.get("transformer_2")
    if index.get("boundary_ratio") is not None or (isinstance(second, list) and any(second)):
        refuse_two_experts(path, f"transformer_2 in {INDEX}")


def transformer_config(folder: Path) -> dict[str, Any] | None:
    """Read the config in a folder if it is a Wan transformer's; None for the config of another model."""
    config = read_json(folder / "config.json")
    if config is None:
        return None
    kind = config.get("_class_name")
    if kind is None:
        return config if {"dim", "ffn_dim", "num_heads"} <= config.keys() else None
    ours = isinstance(kind, str) and ("Wan" in kind or "LingBotWorld" in kind)
    return config if ours and "Autoencoder" not in kind else None


def detect_format(file: str, place: Place, tensors: Mapping[str, Tensor]) -> str:
    """Detect a file's format: that of its published name if keys and names agree, else by keys and names."""
    if not is_transformer(tensors):  # names of its own
        forms = [form for form, layout in own_layouts().items() if is_transformer(tensors, layout)]
        return next((form for form in named_after(file) if form in forms), forms[0])
    fused = any(".self_attn.to_qkv." in name for name in tensors)
    names = "diffusers" if "condition_embedder.time_embedder.linear_1.weight" in tensors else "original"
    twins = any(twin_of(name) is not None for name in tensors)
    if CAMERA_TENSOR in tensors and names == "original":
        return "lingbot"
    for form in named_after(file):
        layout = FORMATS[form]
        under = set(place.keys) & set(layout.weights) if layout.weights else not place.keys
        if under and layout.names == names and fused == (form == "krea") and twins == layout.twins:
            return form
    if fused or twins:
        return "krea" if fused else "sgf-plus"
    return "self-forcing" if names == "original" and {"generator", "generator_ema"} & set(place.keys) else names


def read_spec(
    path: Path, config: dict[str, Any] | None, tensors: Mapping[str, Tensor], named: Collection[ModelSpec]
) -> ModelSpec:
    """Read sizes from shapes and heads from the config; a known model's spec if the sizes are its.

    Raises CheckpointError if tensors that show a size are missing, UsageError if the config contradicts the shapes.
    """
    try:
        patch = tensors[FIRST_TENSOR]
        sizes: dict[str, Any] = {
            "dim": patch.shape[0],
            "ffn_dim": tensors["blocks.0.ffn.up.weight"].shape[0],
            "num_layers": count_layers(path, tensors),
            "in_channels": patch.shape[1],
            "out_channels": tensors["head.linear.weight"].shape[0] // (patch.shape[3] * patch.shape[4]),
            "text_dim": tensors["text_embedding.linear_1.weight"].shape[1],
        }
        freq_dim = tensors["time_embedding.linear_1.weight"].shape[1]
        image = tensors.get("image_embedding.norm_in.weight")
        position = tensors.get("image_embedding.position")
        image_dim = None if image is None else image.shape[0]
        image_tokens = None if position is None else position.shape[1]
        action = tensors.get("action_embedding.linear_1.weight")
        action_dim = None if action is None else action.shape[1]
        camera = tensors.get("camera_embedding.projection.weight")
        camera_inputs = None if camera is None else camera.shape[1]
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        near = alike_in_file(str(error).strip("'"), tensors)
        raise CheckpointError(f"{quoted(path)} is no complete Wan transformer: no {error} in it{near}") from error
    if 0 in (*sizes.values(), freq_dim):
        raise CheckpointError(f"{quoted(path)} is no Wan transformer: a size is 0 ({sizes})")
    placed = "position_embedding" in tensors
    camera_channels = read_camera(path, tensors, camera_inputs, sizes["num_layers"], patch.shape[3] * patch.shape[4])
    facts = sizes | {"freq_dim": freq_dim, "patch": (patch.shape[3], patch.shape[4]), "image_dim": image_dim}
    known = [
        spec
        for spec in named
        if all(getattr(spec, key) == sizes[key] for key in SIZES if key != "num_heads")
        and (spec.image_dim, spec.action_dim, spec.grid is not None) == (image_dim, action_dim, placed)
        and spec.camera_channels == camera_channels
    ]
    values = read_config(path, config or {}, facts, known)
    if known:
        return known[0]
    if action_dim is not None:
        names = ", ".join(spec.name for spec in named if spec.actions)
        raise UsageError(f"{quoted(path)} follows {action_dim} actions, which have no names; known are {names}")
    like = MODELS["wan-5b"] if sizes["out_channels"] == MODELS["wan-5b"].out_channels else MODELS["wan-1.3b"]
    return ModelSpec(
        name="custom", family=like.family, **sizes, **values, kv_heads=values["num_heads"], freq_dim=freq_dim,
        patch=facts["patch"], image_dim=image_dim, image_tokens=image_tokens, vae_stride=like.vae_stride,
        fps=like.fps, default_size=like.default_size, grid=None, actions=(), camera_channels=camera_channels,
    )  # fmt: skip


def read_camera(
    path: Path, tensors: Mapping[str, Tensor], inputs: int | None, layers: int, patch_area: int
) -> int | None:
    """Read the entries of a pixel's ray from the inputs of the camera embedding; None for a model without one.

    Raises UsageError for a model that follows actions besides, CheckpointError if some of the camera's tensors are
    missing.
    """
    names = [f"camera_embedding.{part}" for part in ("projection", "linear_1", "linear_2")]
    names += [f"blocks.{n}.camera.{part}" for n in range(layers) for part in ("linear_1", "linear_2", "scale", "shift")]
    wanted = [f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")]
    lacking = [name for name in wanted if name not in tensors]
    if len(lacking) == len(wanted):
        return None
    if lacking:
        raise CheckpointError(
            f"{quoted(path)} has camera tensors, but not all: no {quoted(to_format('original', lacking[0]))} and "
            f"{len(lacking) - 1} more; the file is not complete"
        )
    ray = patch_area * MODELS["wan-1.3b"].vae_stride[1] ** 2  # inputs of one entry of each pixel's ray
    if inputs == ACTION_RAY * ray:
        raise UsageError(
            f"{quoted(path)} takes {inputs} camera inputs, those of a model that follows actions besides; expected "
            f"{PIXEL_RAY * ray}, a model that follows a camera alone"
        )
    if inputs != PIXEL_RAY * ray:
        raise UsageError(f"{quoted(path)} takes {inputs} camera inputs; expected {PIXEL_RAY * ray}")
    return PIXEL_RAY


def count_layers(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Count the layers. Raises CheckpointError for a gap in their numbers, before any layer is allocated."""
    layers = {layer[1] for name in tensors if (layer := re.match(r"blocks\.(\d+)\.", name))}
    for number in range(len(layers)):
        if str(number) not in layers:
            some = quoted_all(sorted(layers, key=len)[-3:])
            raise CheckpointError(
                f"{quoted(path)} has {len(layers)} layers, but none called blocks.{number} (it has {some}); "
                "the file is not complete"
            )
    return len(layers)


CONFIG_KEYS = {  # config key: size that the tensors show
    "dim": "dim", "ffn_dim": "ffn_dim", "num_layers": "num_layers", "in_dim": "in_channels", "out_dim": "out_channels",
    "in_channels": "in_channels", "out_channels": "out_channels", "text_dim": "text_dim", "freq_dim": "freq_dim",
    "image_dim": "image_dim",
}  # fmt: skip


def read_config(
    path: Path, config: Mapping[str, Any], facts: Mapping[str, Any], known: list[ModelSpec]
) -> dict[str, Any]:
    """Read num_heads, text_len and eps: from the config, else of the known model of these sizes, else of the family.

    Raises UsageError that names each value which contradicts the tensors' sizes or the known model.
    """
    wrong = [
        f"{key} is {quoted(config[key])}, the tensors have {facts[size]}"
        for key, size in CONFIG_KEYS.items()
        if config.get(key) is not None and not is_size(config[key], facts[size])
    ]
    patch = config.get("patch_size")
    if patch is not None and (not isinstance(patch, list) or patch[-2:] != list(facts["patch"])):
        wrong.append(f"patch_size is {quoted(patch)}, the tensors have {list(facts['patch'])}")
    dim, like = facts["dim"], known[0] if known else None
    values = {
        "num_heads": like.num_heads if like else dim // HEAD_DIM,
        "text_len": like.text_len if like else FAMILY["text_len"],
        "eps": like.eps if like else FAMILY["eps"],
    }
    stated = {key: config[key] for key in values if key in config}
    if "num_attention_heads" in config:
        stated["num_heads"] = config["num_attention_heads"]
        width = config.get("attention_head_dim", HEAD_DIM)
        if not is_count(width) or not is_count(stated["num_heads"]) or width * stated["num_heads"] != dim:
            count = quoted(stated["num_heads"])
            wrong.append(
                f"num_attention_heads is {count} and attention_head_dim {quoted(width)}, the tensors have {dim}"
            )
    for key, value in stated.items():
        if like and value != values[key]:
            wrong.append(f"{key} is {quoted(value)}; {like.name}, which has these sizes, has {values[key]}")
        elif key == "num_heads" and (not is_count(value) or dim % value):
            wrong.append(f"num_heads is {quoted(value)}, expected a divisor of {dim}")
        elif key == "text_len" and (not is_count(value) or value > LONGEST_TEXT):
            wrong.append(f"text_len is {quoted(value)}, expected 1 to {LONGEST_TEXT}")
        elif key == "eps" and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1):
            wrong.append(f"eps is {quoted(value)}, expected a small number")
    if wrong:
        raise UsageError(
            f"config.json beside {quoted(path)} is not of this model: {'; '.join(wrong)}; remove or replace it"
        )
    values |= stated
    if "num_heads" not in stated and dim % HEAD_DIM and not like:
        raise UsageError(
            f"{quoted(path)} is {dim} wide, and no config.json beside it has num_heads; put the model's there"
        )
    return values


def is_count(value: object) -> bool:
    """Return True if a config's value is an integer above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_size(value: object, expected: object) -> bool:
    """Return True if a config's value is the integer `expected`."""
    return isinstance(value, int) and not isinstance(value, bool) and value == expected


def merging(
    checkpoint: Checkpoint, loras: Iterable[tuple[str | Path, float]], partial: bool = False
) -> Callable[[str, Tensor], Tensor]:
    """Return a function (name, weight) -> weight that merges the adapter published with a checkpoint, then `loras`.

    loras: (path, factor) of each adapter. Warns of the published adapter.
    Raises UsageError for an adapter of another base model; with `partial` only if nothing of it fits.
    """
    adapters = [(Path(path), factor) for path, factor in loras]
    published = checkpoint.lora
    if published and not any(path.exists() and path.samefile(published) for path, _ in adapters):
        warnings.warn(
            f"{quoted(published)} is merged, too: it is published with {quoted(checkpoint.files[0].name)}",
            stacklevel=3,
        )
        adapters.insert(0, (published, 1.0))
    for path, factor in adapters:
        if not math.isfinite(factor):
            raise UsageError(
                f"lora_scale is {factor} for {quoted(path)}; expected a number, 1 for the adapter as it is"
            )
    updates = [(fitting(read_lora(path), checkpoint.tensors, partial), factor) for path, factor in adapters]

    def change(name: str, tensor: Tensor) -> Tensor:
        for update, factor in updates:
            tensor = merged(name, tensor, update, factor)
        return tensor

    return change
