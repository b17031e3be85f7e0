"""Write checkpoints in published formats: random ones for tests, and conversions.

A checkpoint is a folder of all parts (transformer, VAE, text encoder, tokenizer). It gets its name only when it is
complete.
"""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import InferixError, UsageError, nearest, quoted
from ..models.files import reason
from ..models.registry import MODELS, family_of, read_checkpoint
from ..runtime.files import settle_on_disk

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONVERTED = ("original", "diffusers")
MAX_SHARD = 5_000_000_000  # bytes


def write_random(spec_name: str, form: str, destination: str | Path, seed: int = 0, dtype: str = "float32") -> Path:
    """Write random weights of a named model as a folder in a format. Raises UsageError for unknown names."""
    formats = family_of(MODELS[spec_name]).formats if spec_name in MODELS else {}
    for what, name, known in (("model", spec_name, MODELS), ("format", form, formats), ("dtype", dtype, DTYPES)):
        if name not in known:
            raise UsageError(f"no {what} {quoted(name)}{nearest(name, known)}; there are {', '.join(known)}")
    spec = MODELS[spec_name]
    with new_folder(destination) as folder:
        family_of(spec).write_random(folder, spec, form, seed, DTYPES[dtype])
    return Path(destination)


def convert(
    source: str | Path,
    destination: str | Path,
    form: str = "diffusers",
    dtype: str | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    max_shard: int = MAX_SHARD,
    progress: Callable[[str], None] = lambda line: None,
    lora_partial: bool = False,
) -> Path:
    """Write any readable checkpoint as safetensors with a config, adapters merged.

    A VAE and a text encoder beside the transformer are written too, the text encoder unchanged.
    form: one of `CONVERTED`. dtype: of transformer and VAE, None for the dtype of the file. max_shard: bytes per file.
    progress: called with the name of each written file. lora_partial: merge an adapter that fits only in part.
    Raises UsageError for bad arguments, InferixError for broken files or a full disk.
    """
    if form not in CONVERTED:
        raise UsageError(f"format is {quoted(form)}{nearest(form, CONVERTED)}; expected one of {', '.join(CONVERTED)}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype is {quoted(dtype)}{nearest(dtype, DTYPES)}; expected one of {', '.join(DTYPES)}")
    if isinstance(max_shard, bool) or not isinstance(max_shard, int) or max_shard < 1:
        raise UsageError(f"max_shard is {max_shard}; expected bytes, 1 or more")
    checkpoint = read_checkpoint(source)
    family, kind = family_of(checkpoint.spec), DTYPES[dtype] if dtype else None
    change = family.merging(checkpoint, [(lora, lora_scale)] if lora else [], lora_partial)
    refuse_inside(destination, checkpoint.path, *([lora] if lora else []))
    with new_folder(destination) as folder:
        family.write(folder, checkpoint, form, kind, max_shard, change, progress)
    return Path(destination)


def refuse_inside(destination: str | Path, *sources: str | Path) -> None:
    """Raise UsageError for an output at, in or above an input: writing it would change the input's folder."""
    target = Path(destination).resolve()
    for source in sources:
        origin = Path(source).resolve()
        folder = origin if origin.is_dir() else origin.parent
        if target == origin or target in origin.parents or (origin.is_dir() and folder in target.parents):
            raise UsageError(
                f"destination {quoted(destination)} lies in or above the input {quoted(source)}; "
                "name a folder elsewhere"
            )


@contextmanager
def new_folder(destination: str | Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `destination` on success and removed on failure.

    Warns of temporary folders that killed runs have left.
    Raises UsageError if `destination` exists and is not an empty folder, InferixError if writing fails.
    """
    destination = Path(destination)
    try:
        taken = os.path.lexists(destination) and (not destination.is_dir() or any(destination.iterdir()))
        if taken:
            raise FileExistsError(errno.EEXIST, "it exists already")
        destination.parent.mkdir(parents=True, exist_ok=True)
        for left in destination.parent.glob(f"{glob.escape(destination.name)}.*.part"):
            warnings.warn(f"{left} is the output of an unfinished run; remove it if no run is writing it", stacklevel=4)
        part = destination.with_name(f"{destination.name}.{secrets.token_hex(4)}.part")
        part.mkdir()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write to {quoted(destination)}: {reason(error)}; name a new folder") from error
    try:
        yield part
        for file in part.rglob("*"):
            settle_on_disk(file)
        if destination.is_dir():
            destination.rmdir()
        part.rename(destination)
        settle_on_disk(destination.parent)
    except OSError as error:
        raise InferixError(
            f"writing {quoted(destination)} failed: {reason(error)}; free some space or choose another place"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
