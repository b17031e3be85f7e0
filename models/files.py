"""Files of tensors, and modules filled from them once: mapped, never unpickled as code, strict about names.

Tensors are memory-mapped and modules are built on the meta device, so a checkpoint is in memory once.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import InferixError

OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save began with before torch 1.6
WEIGHTS = (".safetensors", ".pt", ".pth")

Model = TypeVar("Model", bound=nn.Module)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None if there is no such file."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InferixError(f"cannot read {path}: {error}; download it again") from error
    if not isinstance(content, dict):
        raise InferixError(f"{path} holds no JSON object; download it again")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, readable by whom the user's new files are; the library makes its own for the owner alone."""
    path.open("wb").close()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, dict(metadata or {}) or None)
    path.chmod(mode)


def read_tensors(path: Path) -> dict[str, Any]:
    """Names to mapped tensors of one file; a training file's names are its dicts of tensors."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        mapped = zipfile.is_zipfile(path)
        if not mapped and (wrong := why_no_pickle(path)):
            raise InferixError(f"cannot read {path}: {wrong}; the file is damaged or no checkpoint")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        said = "it holds more than tensors and plain values, which is not loaded, since that can run code"
        raise InferixError(f"cannot read {path}: {said}; the file is damaged or no checkpoint") from error
    except (OSError, RuntimeError, EOFError, KeyError, SafetensorError) as error:
        said = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise InferixError(f"cannot read {path}: {said}; the file is damaged or no checkpoint") from error
    if not isinstance(content, dict):
        raise InferixError(f"{path} holds a {type(content).__name__}; expected a dict of tensors")
    return content


def why_no_pickle(path: Path) -> str | None:
    """What is wrong with a file that is no whole archive of torch.save; None for one of before torch 1.6."""
    with path.open("rb") as file:
        head = file.read(len(OLD_MAGIC))
    if head == OLD_MAGIC:
        return None
    if head.startswith(b"PK"):
        return "it was cut short"
    return "it was not written by torch.save, and its name does not end in .safetensors"


def fill(
    module: Model,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: Any,
    source: object,
    change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> Model:
    """Give a meta-device module its tensors, each after `change`, one at a time.

    InferixError lists every missing, unexpected or mis-shaped one.
    """
    wanted = module.state_dict()
    wrong = [f"{name} {list(empty.shape)}: missing" for name, empty in wanted.items() if name not in tensors]
    wrong += [f"{name} {list(tensors[name].shape)}: unexpected" for name in tensors if name not in wanted]
    wrong += [
        f"{name}: {list(tensors[name].shape)}, expected {list(empty.shape)}"
        for name, empty in wanted.items()
        if name in tensors and tensors[name].shape != empty.shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        raise InferixError(f"{source} does not fit the model: {'; '.join(wrong[:12])}{more}")
    state = {name: change(name, tensors[name]).to(device=device, dtype=dtype) for name in wanted}
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)
