"""A session on disk: one safetensors file with its `SessionState`, decoder state included.

`session_state` gives each field its saved form and checks it. This file adds what the session was made with and a
checksum, refuses files of another model, preset or version, and writes atomically. States to rewind to are not saved.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import InferixError, UsageError, quoted
from ...models.files import check_file, parse_json, reason, write_tensors
from ...models.fingerprints import fingerprint
from ...models.spec import ModelSpec
from ...schemes.context import ContextPolicy
from ...schemes.presets import Preset
from ...schemes.sampler_spec import SamplerSpec
from ..files import check_output, check_paths, write_atomically
from ..resources import Resources
from .saved_values import InvalidField, fields_of, invalid, list_of
from .session_state import SavedFields, SessionState

KEY = "inferix-session"  # of the header's JSON
NOTE = "inferix-note"  # of a caller's text, which no checksum covers
VERSION = 2
MODEL_PATHS = ("model", "base", "vae", "lora", "text_encoder", "fast_vae")  # settings that name files read
DEFAULTS = {  # settings of presets as a file gives them; one saved before there was a setting lacks it
    setting.name: json.loads(json.dumps(setting.default))
    for part in (Preset, SamplerSpec, ContextPolicy)
    for setting in fields(part)
    if setting.default is not MISSING
}
COMMON = ("version", "made_by", "tensors", "checksum")  # in the header, besides the fields
IRRELEVANT = ("name", "about", "rewind_blocks", "precision")  # of a preset: they change no block, or are in `dtype`


def write_session(
    state: SessionState, resources: Resources, preset: Preset, path: Path, note: str | None = None
) -> None:
    """Write the state of a session between two blocks, once nothing of it is being decoded."""
    file = SavedFields(resources, preset, {"version": VERSION, "made_by": made_by(resources, preset)}, {})
    state.save(file)
    file.header["tensors"] = sorted(file.tensors)
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in file.tensors.items()}
    header = json.loads(json.dumps(file.header))
    metadata = {KEY: json.dumps(header | {"checksum": checksum(header, on_host)})}
    metadata |= {} if note is None else {NOTE: note}
    check_paths({name: getattr(resources.config, name) for name in MODEL_PATHS}, {"path": path})
    write_atomically(check_output(path), lambda part: write_tensors(unshared(on_host), part, metadata))


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those that share memory with an earlier one cloned: the format allows no sharing."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return separate


def made_by(resources: Resources, preset: Preset) -> dict[str, Any]:
    """What must be equal for a session to continue bit for bit: sizes, settings, and a fingerprint of the weights."""
    fields, config, parts = asdict(preset), resources.config, resources.parts
    settings = {**fields.pop("sampler"), **fields.pop("context"), **fields}
    made = {
        "model": model_sizes(resources.spec),
        "preset": {name: value for name, value in settings.items() if name not in IRRELEVANT},
        "decoder": asdict(parts.vae.spec),
        "dtype": {
            "dtype": config.dtype, "precision": config.precision, "kv": config.kv_dtype,
            "lowp": None if config.precision_map is None else asdict(config.precision_map),
        },
        "weights": parts.fingerprints
        or {
            "transformer": fingerprint(parts.transformer), "decoder": fingerprint(parts.vae),
            **{f"transformer.{number}": fingerprint(more) for number, more in enumerate(parts.more, 1)},
        },
    }
    plain: dict[str, Any] = json.loads(json.dumps(made))  # as a file gives it: lists for tuples
    return plain


def model_sizes(spec: ModelSpec) -> dict[str, Any]:
    """Sizes of a model as saved files have them: older ones lack what most models do not have."""
    sizes = asdict(spec)
    del sizes["family"]  # weights and sizes identify a model
    if spec.kv_heads == spec.num_heads:
        del sizes["kv_heads"]
    if spec.camera_channels is None:
        del sizes["camera_channels"]
    return sizes


def checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the header, but for the checksum in it, and of every tensor's name, dtype, shape and bytes."""
    content = {name: value for name, value in header.items() if name != "checksum"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_session(path: Path, resources: Resources, preset: Preset) -> SavedFields:
    """Read a saved session. UsageError for a file that this engine cannot continue, InferixError for a broken one."""
    check_file(path, "saved session")
    name = quoted(path)
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise UsageError(f"{name} is a safetensors file, but no saved session")
            header = parse_header(text)
            check_header(header, resources, preset, path)
            there = set(file.keys())
            for tensor in list_of("tensors", header["tensors"]):
                if not isinstance(tensor, str) or tensor not in there:
                    raise InvalidField(f"the file lacks {quoted(tensor)}")
            if extra := there - set(header["tensors"]):
                raise InvalidField(f"tensor {quoted(min(extra))} is not in the header")
            saved = SavedFields(resources, preset, header, {tensor: file.get_tensor(tensor) for tensor in there})
        SessionState.check_saved(saved, COMMON)
        if header["checksum"] != checksum(header, saved.tensors):
            raise InvalidField(f"checksum {quoted(header['checksum'])} is not that of the content: it was changed")
        return saved
    except (OSError, SafetensorError, RecursionError) as error:
        raise InferixError(
            f"{name} is cut short or no saved session: {reason(error)}; save it again, or use an older copy"
        ) from error
    except InvalidField as error:
        raise InferixError(f"{name} is damaged: {error}; save it again, or use an older copy") from error


def read_note(path: Path) -> str | None:
    """The note of a saved session, None if it has none. UsageError for no file, InferixError for a broken one."""
    check_file(path, "saved session")
    try:
        with safe_open(path, "pt") as file:
            note: str | None = (file.metadata() or {}).get(NOTE)
    except (OSError, SafetensorError) as error:
        raise InferixError(f"{quoted(path)} is cut short or no saved session: {reason(error)}") from error
    return note


def parse_header(text: str) -> Any:
    """Parse the header's JSON. InvalidField for other text, or a key given twice."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise InvalidField(reason(error)) from error


def check_header(header: Any, resources: Resources, preset: Preset, path: Path) -> None:
    """UsageError with the first difference, unless the file was made with what this engine has."""
    if not isinstance(header, dict):
        raise invalid("the header", header, "a JSON object")
    for name in COMMON:
        if name not in header and not (name == "checksum" and header.get("version") != VERSION):
            raise InvalidField(f"the header lacks {name!r}")
    if header["version"] != VERSION:
        raise UsageError(
            f"{quoted(path)} has version {quoted(header['version'])} of the format, this is version {VERSION}; "
            "restore it with the version of inferix that saved it"
        )
    here = made_by(resources, preset)
    parts = fields_of("made_by", header["made_by"], list(here))
    for part, values in here.items():
        there = parts[part]
        if not isinstance(there, dict):
            raise invalid(f"made_by.{part}", there, "a JSON object")
        for name, value in values.items():
            if there.get(name, DEFAULTS.get(name)) != value:
                raise UsageError(
                    f"{quoted(path)} was saved with another {part}: {name} is {quoted(there.get(name))} there and "
                    f"{quoted(value)} here; load the engine as it was loaded then"
                )
