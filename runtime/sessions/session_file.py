"""A session on disk: one safetensors file with its `SessionState`, decoder state included.

`session_state` gives each field its saved form. This file adds what the session was made with, refuses files of another
model, preset or version, and writes atomically. States to rewind to are not saved.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...errors import InferixError, UsageError
from ...models.files import write_tensors
from ...schemes.presets import Preset
from ..files import check_output, check_paths, write_atomically
from ..resources import Resources
from .session_state import SavedFields, SessionState

KEY = "inferix-session"  # of the header's JSON
VERSION = 1
MODEL_PATHS = ("model", "base", "vae", "lora", "text_encoder", "fast_vae")  # settings that name files read
SAMPLED = 64  # values of each weight that go into a fingerprint
IRRELEVANT = ("name", "about", "rewind_blocks")  # settings of a preset that change no block


def write_session(state: SessionState, resources: Resources, preset: Preset, path: Path) -> None:
    """Write the state of a session between two blocks, once nothing of it is being decoded."""
    file = SavedFields(resources, preset, {"version": VERSION, "made_by": made_by(resources, preset)}, {})
    state.save(file)
    file.header["tensors"] = sorted(file.tensors)
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in file.tensors.items()}
    metadata = {KEY: json.dumps(file.header)}
    check_paths({name: getattr(resources.config, name) for name in MODEL_PATHS}, {"path": path})
    write_atomically(check_output(path), partial(write_whole, unshared(on_host), metadata))


def write_whole(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    try:
        write_tensors(tensors, path, metadata)
    except SafetensorError as error:  # the library's error for a full disk
        raise OSError(str(error)) from error


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
        "model": asdict(resources.spec),
        "preset": {name: value for name, value in settings.items() if name not in IRRELEVANT},
        "decoder": asdict(parts.vae.spec),
        "dtype": {
            "dtype": config.dtype, "precision": config.precision, "kv": config.kv_dtype,
            "lowp": None if config.precision_map is None else asdict(config.precision_map),
        },
        "weights": {"transformer": fingerprint(parts.transformer), "decoder": fingerprint(parts.vae)},
    }
    plain: dict[str, Any] = json.loads(json.dumps(made))  # as a file gives it: lists for tuples
    return plain


def fingerprint(module: nn.Module) -> str:
    """Hash some values of every weight, so that another checkpoint is recognised."""
    digest = hashlib.sha256()
    for name, weight in module.state_dict().items():
        values = weight.flatten()[:: max(1, weight.numel() // SAMPLED)]
        digest.update(name.encode() + values.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_session(path: Path, resources: Resources, preset: Preset) -> SavedFields:
    """Read a saved session. UsageError for a file that this engine cannot continue, InferixError for a broken one."""
    if not path.is_file():
        raise UsageError(f"no saved session {str(path)!r}; expected a file that session.save() wrote")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise UsageError(f"{str(path)!r} is a safetensors file, but no saved session")
            header = json.loads(text)
            check_header(header, resources, preset, path)
            if missing := set(header["tensors"]) - set(file.keys()):
                raise KeyError(min(missing))
            tensors = {name: file.get_tensor(name) for name in header["tensors"]}
            return SavedFields(resources, preset, header, tensors)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        message = " ".join(str(error).split())
        raise InferixError(
            f"{str(path)!r} is cut short or no saved session: {message}; save it again, or use an older copy"
        ) from error
    except KeyError as error:
        raise InferixError(f"{str(path)!r} lacks {error}; save it again, or use an older copy") from error


def check_header(header: dict[str, Any], resources: Resources, preset: Preset, path: Path) -> None:
    """UsageError with the first difference, unless the file was made with what this engine has."""
    if header["version"] != VERSION:
        raise UsageError(
            f"{str(path)!r} has version {header['version']} of the format, this is version {VERSION}; "
            "restore it with the version of inferix that saved it"
        )
    for part, values in made_by(resources, preset).items():
        for name, value in values.items():
            there = header["made_by"][part].get(name)
            if there != value:
                raise UsageError(
                    f"{str(path)!r} was saved with another {part}: {name} is {there!r} there and {value!r} here; "
                    "load the engine as it was loaded then"
                )
    if header["decoder"]["fast"] and resources.parts.fast_vae is None:
        raise UsageError(f"{str(path)!r} was saved while the fast decoder was in use; load the engine with fast_vae")
    resources.spec.latent_size(tuple(header["size"]))
