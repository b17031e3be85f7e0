"""Read and write files of tensors and JSON, and fill modules from them.

Tensors are memory-mapped and modules are built on the meta device, so a checkpoint is in memory once. Pickles never run
code. The content of a file decides how it is read, not its name. The size of a file bounds the memory that reading it
takes.
"""

from __future__ import annotations

import difflib
import io
import json
import mmap
import pickle
import pickletools
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import LONGEST_QUOTE, CheckpointError, InferixError, UsageError, quoted, quoted_all
from .scaled_weights import FP8, unscaled
from .weight_shards import WeightShards

OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # first bytes of torch.save's files before torch 1.6
OLD_PICKLES = 5  # of such a file, before the values of its tensors
ZSTD = b"\x28\xb5\x2f\xfd"  # first bytes of a zstd file
LARGEST_HEADER = 100_000_000  # bytes of a safetensors file's header, as its own library has it
MOST_UNPACKED = 16  # times the size of a compressed file; weights lose a third of theirs
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST_JSON = 64_000_000  # bytes; the largest published, a tokenizer, has 17 MB
MOST_COMPARED = 4000  # names of a file, for an error about one that it lacks
MOST_SHARING = 4  # times that tensors of one file may use its bytes, as tied weights do
MOST_DIMENSIONS = 64  # of a tensor that torch computes with

Model = TypeVar("Model", bound=nn.Module)


def check_file(path: Path, kind: str) -> None:
    """Raise UsageError unless `path` is a regular file; reading a pipe or a device may never end."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise UsageError(f"no {kind} {quoted(path)}: no such file") from error
    if not stat.S_ISREG(mode):
        form = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise UsageError(f"{kind} {quoted(path)} is {form}; expected a file")


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if the file does not exist. Raises CheckpointError for any other content."""
    if not path.exists():
        return None
    check_file(path, "JSON file")
    if path.stat().st_size > LARGEST_JSON:
        raise CheckpointError(f"{quoted(path)} has {path.stat().st_size} bytes; expected at most {LARGEST_JSON}")
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {quoted(path)}: {reason(error)}; download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{quoted(path)} holds no JSON object; download it again")
    return content


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text. Raises ValueError for other text or a repeated name, RecursionError for deep nesting."""
    if text[: len(LFS_POINTER)] in (LFS_POINTER, LFS_POINTER.decode()):
        raise ValueError("it is a Git LFS pointer, not the file; run git lfs pull")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            raise ValueError(f"it gives {quoted(counts.most_common(1)[0][0])} twice")
        return content

    return json.loads(text, object_pairs_hook=unique)


def reason(error: BaseException) -> str:
    """The first line of an error's message, cut."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or ["it ends too early"])[0][:200]


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError where that fails.

    The file gets the permissions of any new file; the library would make it readable for its owner only.
    """
    path.open("wb").close()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, dict(metadata or {}) or None)
    except SafetensorError as error:
        raise OSError(f"{quoted(path.name)}: {reason(error)}") from error
    path.chmod(mode)


def save_pickle(content: dict[str, Any], path: Path) -> None:
    """Write a file with torch.save. Raises OSError where that fails, as on a full disk."""
    try:
        torch.save(content, path)
    except RuntimeError as error:  # torch's archive writer raises this for an error of the disk
        raise OSError(f"{quoted(path.name)}: {reason(error)}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata in the header of a safetensors file; empty for other files."""
    if file_kind(path) != "safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read {quoted(path)}: {reason(error)}; the file is damaged or no checkpoint"
        ) from error


def read_tensors(path: Path) -> dict[str, Any]:
    """Map the tensors of one file by name; a training file also has names for dicts of tensors.

    Raises UsageError for a file of another kind, CheckpointError for a damaged one.
    """
    kind = file_kind(path)
    if kind == "zstd":
        with unpacked(path) as whole:  # stays mapped when it is deleted
            return mapped(whole, path)
    try:
        if kind == "safetensors":
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            check_dimensions(path, tensors)
            return tensors
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except pickle.UnpicklingError as error:
        why = "it holds more than tensors and plain values, which is not loaded, since that can run code"
        raise CheckpointError(f"cannot read {quoted(path)}: {why}; the file is damaged or no checkpoint") from error
    except (
        OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError, AttributeError, AssertionError,
        ArithmeticError, struct.error, SafetensorError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"cannot read {quoted(path)}: {reason(error)}; the file is damaged or no checkpoint"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{quoted(path)} holds a {type(content).__name__}; expected a dict of tensors")
    check_storage(path, content)
    return content


def read_names(path: Path) -> list[str]:
    """Return the names in a file, as `read_tensors` has them; of a compressed file only its beginning is unpacked."""
    if file_kind(path) != "zstd":
        return list(read_tensors(path))
    with unpacked(path, LARGEST_HEADER) as start:
        head = start.read_bytes()
    try:
        (size,) = struct.unpack_from("<Q", head)
        return [name for name in parse_json(head[8 : 8 + size]) if name != "__metadata__"]
    except (struct.error, ValueError, RecursionError) as error:
        raise damaged(path, error) from error


def mapped(path: Path, source: Path) -> dict[str, Tensor]:
    """Map the tensors of a safetensors file. source: the file that errors name."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise damaged(source, error) from error


def damaged(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"cannot read {quoted(path)}: {reason(error)}; the file is damaged or no checkpoint")


@contextmanager
def unpacked(path: Path, most: int | None = None) -> Iterator[Path]:
    """Yield a temporary file with the content of a zstd file, or with its first `most` bytes and those of a chunk.

    Raises InferixError without the package zstandard or without room, CheckpointError for a damaged file, or one that
    unpacks to more than weights can have.
    """
    try:
        zstandard = import_module("zstandard")
    except ImportError as error:
        message = f"{quoted(path)} is compressed, and zstandard is not installed; pip install zstandard"
        raise InferixError(message) from error
    limit, size = MOST_UNPACKED * path.stat().st_size, 0
    with TemporaryDirectory(prefix="inferix-") as folder:
        whole = Path(folder) / path.stem
        try:
            with path.open("rb") as packed, whole.open("wb") as file:
                for chunk in zstandard.ZstdDecompressor().read_to_iter(packed):
                    size += len(chunk)
                    if size > limit:
                        raise CheckpointError(
                            f"{quoted(path)} unpacks to more than {MOST_UNPACKED} times its {path.stat().st_size} "
                            "bytes, so it holds no weights; download it again"
                        )
                    file.write(chunk)
                    if most is not None and size >= most:
                        break
        except zstandard.ZstdError as error:
            raise damaged(path, error) from error
        except OSError as error:
            message = f"cannot unpack {quoted(path)}: {reason(error)}; set TMPDIR to a place with room"
            raise InferixError(message) from error
        yield whole


def file_kind(path: Path) -> str:
    """Return `safetensors`, `zip`, `pickle` or `zstd`. Raises UsageError that names any other kind of file."""
    check_file(path, "checkpoint")
    try:
        with path.open("rb") as file:
            head = file.read(512)
        archive = zipfile.is_zipfile(path)
    except (OSError, zipfile.BadZipFile) as error:  # an archive in several parts
        raise CheckpointError(f"cannot read {quoted(path)}: {reason(error)}") from error
    if head.startswith(LFS_POINTER):
        raise UsageError(f"{quoted(path)} is a Git LFS pointer, not the weights; run git lfs pull")
    if head.startswith(b"GGUF"):
        raise UsageError(f"{quoted(path)} is a GGUF file; quantised weights are not read, use the bfloat16 file")
    if head.startswith(ZSTD):
        return "zstd"
    if archive:
        if path.suffix == ".safetensors":
            raise UsageError(f"{quoted(path)} was written by torch.save, in spite of its name; rename it to .pt")
        check_archive(path)
        return "zip"
    if path.suffix.lower() == ".json" or head.lstrip()[:1] in (b"{", b"["):
        raise UsageError(f"{quoted(path)} is an index or a config in JSON, not the weights; name its folder")
    if head.lstrip()[:15].lower().startswith((b"<!doctype", b"<html")):
        raise UsageError(f"{quoted(path)} is a web page, not the weights; download the file itself")
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return "safetensors"
    if head == b"":
        raise CheckpointError(f"cannot read {quoted(path)}: it is empty; the file is damaged or no checkpoint")
    if head.startswith(OLD_MAGIC):
        check_old_file(path)
    else:
        why = (
            "it was cut short" if head.startswith(b"PK")
            else "it was not written by torch.save, and is no safetensors file"
        )  # fmt: skip
        raise CheckpointError(f"cannot read {quoted(path)}: {why}; the file is damaged or no checkpoint")
    return "pickle"


def check_archive(path: Path) -> None:
    """Raise CheckpointError for an archive with compressed members; torch.save writes none, and they may be huge.

    Its pickle is checked, too.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise CheckpointError(
                    f"{quoted(path)} is a compressed archive ({quoted(packed[0])}), not one of torch.save; unpack it"
                )
            for part in archive.infolist():
                if part.filename.endswith("data.pkl"):
                    part.CRC = None  # type: ignore[assignment]  # torch can be set to write files without checksums
                    check_pickle(path, io.BytesIO(archive.read(part)))
    except (OSError, ValueError, EOFError, RuntimeError, struct.error, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"cannot read {quoted(path)}: {reason(error)}; the file is damaged or no checkpoint"
        ) from error


def check_old_file(path: Path) -> None:
    """Check the pickles at the start of a file of torch before 1.6; raises CheckpointError."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for _ in range(OLD_PICKLES):
                check_pickle(path, content)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {quoted(path)}: {reason(error)}; the file is damaged or no checkpoint"
        ) from error


def check_pickle(path: Path, stream: Any) -> None:
    """Raise CheckpointError for a pickle that calls `bytearray`, ValueError for one that is damaged.

    The reader of plain pickles allows the call, and its argument may be a length that takes all of the memory.
    """
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "GLOBAL" and str(argument).endswith(" bytearray"):
            raise CheckpointError(
                f"{quoted(path)} holds a bytearray, which is no tensor; the file is damaged or no checkpoint"
            )


def check_dimensions(path: Path, content: Mapping[Any, Any]) -> None:
    """Raise CheckpointError for tensors that torch can hold and cannot compute with."""
    for name, tensor in all_tensors(content):
        if tensor.ndim > MOST_DIMENSIONS:
            raise CheckpointError(
                f"{quoted(path)}: {quoted(name)} has {tensor.ndim} dimensions; expected at most {MOST_DIMENSIONS}"
            )


def check_storage(path: Path, content: Mapping[Any, Any]) -> None:
    """Raise CheckpointError for tensors with more values than their file stores, such as expanded ones."""
    check_dimensions(path, content)
    claimed, storages = 0, {}
    for name, tensor in all_tensors(content):
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            kind = f"{tensor.layout}, {tensor.dtype}, {tensor.device}"
            raise CheckpointError(f"{quoted(path)}: {quoted(name)} is no plain tensor ({kind}); save it as one")
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.itemsize > storage.nbytes():
            raise CheckpointError(
                f"{quoted(path)}: {quoted(name)} is {list(tensor.shape)} over {storage.nbytes()} bytes, so it repeats "
                "values; "
                "save it contiguous"
            )
        claimed += tensor.numel() * tensor.itemsize
        storages[storage.data_ptr()] = storage.nbytes()
    stored = sum(storages.values())
    if claimed > MOST_SHARING * stored:
        raise CheckpointError(
            f"{quoted(path)}: its tensors claim {claimed} bytes and have {stored}; save each by itself"
        )


def all_tensors(content: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for each tensor in nested dicts; visits each dict once."""
    left, seen = [content], {id(content)}
    while left:
        for key, part in left.pop().items():
            if isinstance(part, Tensor):
                yield str(key), part
            elif isinstance(part, dict) and id(part) not in seen:
                seen.add(id(part))
                left.append(part)


def alike_in_file(name: str, names: Iterable[str]) -> str:
    """Format the ten of `names` that are most like `name`, for an error about a tensor that a file lacks."""
    cuts = [other[:LONGEST_QUOTE] for other in islice(names, MOST_COMPARED)]
    found = difflib.get_close_matches(name[:LONGEST_QUOTE], cuts, n=10, cutoff=0.0)
    return f"; nearest in the file: {quoted_all(found, 10)}" if found else ""


def fill(
    module: Model,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: Any,
    source: object,
    change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
    shards: WeightShards | None = None,
) -> Model:
    """Load tensors into a meta-device module, one at a time, each through `change`, in `dtype`.

    Those that a submodule has in its `stored_dtypes`, by name, are in the dtype there.

    shards: parts of the weights that this rank keeps; None for all of them.

    Raises CheckpointError that lists the missing, unexpected or mis-shaped tensors and the ten in the file that are
    most like the first missing one, or names one that is not finite.
    """
    expected = module.state_dict()
    wrong = [f"{name} {list(empty.shape)}: missing" for name, empty in expected.items() if name not in tensors]
    wrong += [f"{quoted(name)} {list(tensors[name].shape)}: unexpected" for name in tensors if name not in expected]
    wrong += [
        f"{name}: {list(tensors[name].shape)}, expected {list(empty.shape)}"
        for name, empty in expected.items()
        if name in tensors and tensors[name].shape != empty.shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        missing = next((name for name in expected if name not in tensors), None)
        others = [name for name in tensors if name not in expected] or tensors
        near = alike_in_file(missing, others) if missing else ""
        raise CheckpointError(f"{quoted(source)} does not fit the model: {'; '.join(wrong[:12])}{more}{near}")
    stored = {
        f"{prefix}.{name}": kind
        for prefix, part in module.named_modules()
        for name, kind in getattr(part, "stored_dtypes", {}).items()
    }
    state = {}
    for name in expected:
        own, tensor = name, change(name, unscaled(tensors[name]))
        kind = stored.get(name, dtype)
        if shards is not None:
            if (part := shards.part(name, tensor, kind)) is None:
                continue
            own, tensor = part
        state[own] = finite(source, name, tensor.to(device=device, dtype=kind))
    if shards is not None:
        shards.divide(module)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def finite(source: object, name: str, tensor: Tensor) -> Tensor:
    """Return the tensor. Raises CheckpointError if a value is infinite or NaN."""
    values = tensor.float() if tensor.dtype in FP8 else tensor  # torch has no isfinite of FP8
    if not values.isfinite().all():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{quoted(source)}: {quoted(name)} is not finite in {kind}; the file is damaged, or take another dtype"
        )
    return tensor
