"""The registry of model families, with the models and presets of all of them by name.

`register` adds a family from outside; what is registered here is what the runtime, the benches and the command know.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InferixError, UsageError, nearest, quoted
from ..plugins import installed
from ..schemes.preset_file import is_preset_file, read_preset
from ..schemes.presets import Preset, with_settings
from ..user_files import check_reachable
from .family import Checkpoint, Family, Format
from .format_file import read_format_file
from .magi.family import MAGI
from .scaled_weights import stored_dtype
from .spec import ModelSpec
from .tinyworld.family import TINYWORLD
from .wan.checkpoint import FORMATS as WAN_FORMATS
from .wan.family import WAN

FAMILIES: dict[str, Family] = {}
MODELS: dict[str, ModelSpec] = {}  # named sizes
PRESETS: dict[str, Preset] = {}
FORMATS: dict[str, Format] = WAN_FORMATS  # of Wan checkpoints; another layout of them is one more entry
UNTRAINED: str = WAN.demo  # a named model whose random weights are made in no time
SIZES = ("dim", "ffn_dim", "num_heads", "kv_heads", "num_layers", "in_channels", "out_channels", "text_dim")


def register(family: Family) -> None:
    """Add a family with its models and presets. UsageError for a name that is taken."""
    presets = {preset.name: preset for preset in family.presets}
    names: tuple[tuple[str, Iterable[str], Iterable[str]], ...] = (
        ("family", [family.name], FAMILIES), ("model", family.models, MODELS), ("preset", presets, PRESETS),
        ("format", family.formats, formats()),
    )  # fmt: skip
    for what, new, taken in names:
        if both := set(new) & set(taken):
            raise UsageError(
                f"family {quoted(family.name)}: {what} {quoted(min(both))} is registered already; give another name"
            )
    for spec in family.models.values():
        if spec.family != family.name:
            expected = quoted(family.name)
            raise UsageError(f"model {quoted(spec.name)} has family {quoted(spec.family)}; expected {expected}")
    FAMILIES[family.name] = family
    MODELS.update(family.models)
    PRESETS.update(presets)


def unregister(family: Family) -> None:
    """Remove a family, its models and its presets."""
    del FAMILIES[family.name]
    for known, names in ((MODELS, family.models), (PRESETS, [preset.name for preset in family.presets])):
        for name in names:
            known.pop(name, None)


def family_of(spec: ModelSpec) -> Family:
    """Return the family of a model; UsageError for one that is not registered."""
    return family_named(spec.family, spec.name)


def family_named(name: str, model: str) -> Family:
    """Return the family of this name, which a model has; UsageError for one that is not registered."""
    if name not in FAMILIES:
        known = f"{nearest(name, FAMILIES)}; there are {', '.join(FAMILIES)}"
        raise UsageError(f"model {quoted(model)} has family {quoted(name)}, which is not registered{known}")
    return FAMILIES[name]


def formats() -> list[str]:
    """Names of the checkpoint formats of all families."""
    return list(dict.fromkeys(name for family in FAMILIES.values() for name in family.formats))


def shipped(name: str) -> Path | None:
    """Folder of the weights of a named model that are in the package; None for other models.

    InferixError if they are missing.
    """
    folder = family_of(MODELS[name]).shipped.get(name) if name in MODELS else None
    if folder is not None and not folder.is_dir():
        raise InferixError(
            f"the weights of {name} are missing: no folder {quoted(folder)}; reinstall the package from its "
            f"clone or wheel, or git checkout models/{name}/weights"
        )
    return folder


# Checkpoints


def read_checkpoint(
    path: str | Path, form: str | None = None, use_ema: bool = True, names: str | Path | None = None
) -> Checkpoint:
    """Map a checkpoint file or folder, read by the family that has the format or recognises the file.

    names: YAML file with the checkpoint's tensor names (`format_file`), instead of a format. Raises UsageError if it is
    no transformer, CheckpointError for a broken file.
    """
    path = check_reachable(path, "checkpoint")
    if names is not None:
        if form is not None:
            raise UsageError(f"checkpoint_format is {quoted(form)}, and names say the format too; leave one out")
        family, layout = read_layout(names)
        return family.read_named(path, layout, use_ema, known_to(family))
    family = reader_of(path, form)
    return family.read(path, form, use_ema, known_to(family))


def known_to(family: Family) -> list[ModelSpec]:
    """Return the named sizes of all families that read checkpoints as this one does."""
    alike = [other for other in FAMILIES.values() if type(other).read is type(family).read]
    return [spec for other in alike for spec in other.models.values()]


def read_layout(names: str | Path) -> tuple[Family, Format]:
    """Read a file of tensor names: the family that has its base format, and the layout. UsageError for a bad one."""
    file = read_format_file(names)
    where = f"names {quoted(str(names))}"
    family = next((one for one in reversed(FAMILIES.values()) if file.base in one.formats), None)
    if family is None:
        known = f"{nearest(file.base, formats())}; there are {', '.join(formats())}"
        raise UsageError(f"{where}: no checkpoint format {quoted(file.base)}{known}")
    try:
        table = family.changed_names(file.base, file.names)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    weights = file.containers or family.formats[file.base].weights
    return family, Format(table, Path(names).name, weights, strip=file.strip)


def reader_of(path: Path, form: str | None) -> Family:
    """Return the family that reads a file: the newest that has the format or recognises it, else the first."""
    for family in reversed(FAMILIES.values()):
        if family.recognises(path) if form is None else form in family.formats:
            return family
    return next(iter(FAMILIES.values()))


def inspect(path: str | Path) -> dict[str, Any]:
    """Describe a checkpoint as plain values, without loading it: format, model, sizes, dtypes and files."""
    checkpoint = read_checkpoint(path)
    spec = checkpoint.spec
    absent = {"vae": "not beside it; give base", "text_encoder": "not beside it; give base, or prompt embeddings"}
    parts = family_of(spec).parts_beside(checkpoint)
    return {
        "path": str(path),
        "format": checkpoint.form,
        "model": spec.name,
        **{key: getattr(spec, key) for key in SIZES},
        "head_dim": spec.head_dim,
        **({"weight_sets": list(checkpoint.sets)} if checkpoint.more else {}),
        "tensors": len(checkpoint.tensors),
        "parameters": sum(tensor.numel() for tensor in checkpoint.tensors.values()),
        "dtypes": sorted({str(stored_dtype(tensor)).removeprefix("torch.") for tensor in checkpoint.tensors.values()}),
        "lora": str(checkpoint.lora) if checkpoint.lora else None,
        "files": [str(file) for file in checkpoint.files],
        **{name: absent.get(name, "not beside it") if part is None else str(part) for name, part in parts.items()},
    }


# Presets


def find_preset(name: str) -> Preset:
    """Return the preset of that name, or of that YAML file; UsageError names the nearest for an unknown one."""
    if name in PRESETS:
        return PRESETS[name]
    if is_preset_file(name):
        return read_preset(name, PRESETS)
    known = f"{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}, or give a .yaml file"
    raise UsageError(f"no preset {quoted(name)}{known}")


def default_model(preset: str | None) -> str:
    """Return what runs where no model is named: the demo of the preset's family, or the small world."""
    if preset is None:
        return TINYWORLD.demo
    base = find_preset(preset).about.base
    return family_of(MODELS[base]).demo_of(find_preset(preset)) if base in MODELS else WAN.demo


def default_preset(model: str) -> str:
    """Return the scheme of a named model that has one of its own name, else its family's first."""
    if model in PRESETS:
        return model
    family = family_of(MODELS[model]) if model in MODELS else WAN
    return family.preset_for(model).name


def make_preset(name: str, **overrides: Any) -> Preset:
    """Return the preset of that name or YAML file with some fields replaced."""
    return with_settings(find_preset(name), **overrides)


def find_spec(model: str, names: str | Path | None = None) -> ModelSpec:
    """Return the sizes of a named model, or of a checkpoint file or folder, without its weights."""
    if model in MODELS:
        return MODELS[model]
    if check_reachable(model, "model").exists():
        return read_checkpoint(model, names=names).spec
    known = f"{nearest(model, MODELS)}; expected a path, or one of {', '.join(MODELS)}"
    raise UsageError(f"model is {quoted(model)}{known}")


def register_installed() -> None:
    """Add the presets and formats of installed packages, under the names of their entry points.

    UsageError for a name that is taken.
    """
    for name, preset in installed("inferix.presets", Preset):
        add_installed("preset", PRESETS, name, replace(preset, name=name))
    for name, layout in installed("inferix.formats", Format):
        add_installed("format", FORMATS, name, layout)


def add_installed(what: str, known: dict[str, Any], name: str, value: object) -> None:
    if name in known:
        raise UsageError(f"an installed package has the {what} {quoted(name)}, which is registered already; rename it")
    known[name] = value


for built_in in (WAN, TINYWORLD, MAGI):
    register(built_in)
register_installed()
