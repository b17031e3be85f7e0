"""Damage to valid files: bytes without regard to their meaning, and values by the format of the file.

A mutation depends on its random generator alone, so a reader's name, a seed and a number reproduce an input.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import PurePosixPath
from random import Random
from typing import Any

import torch
import yaml

Files = dict[str, bytes]  # a small folder: content by relative path
Mutation = Callable[[bytes, Random], bytes]

SENTINEL = "made-by-an-input"  # file that the commands in hostile inputs would create
HEAD = 2048  # bytes at the start of a file, which have its structure in most formats
LARGEST = 4 << 20  # bytes of a mutated file

# Text that `json.dumps` cannot write, by the placeholder that stands for it until the value is text.
PLACEHOLDERS = {
    "@deep-list@": "[" * 50_000 + "]" * 50_000, "@deep-object@": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "@digits@": "9" * 5000, "@integer@": "9" * 400, "@float@": "1e999", "@cut@": '"', "@surrogate@": '"\\ud800"',
    "@twenty@": "[" * 20 + "]" * 20,
}  # fmt: skip
SAME_KEY = "@same-key@"
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, -(2**63), 2**64, 0.0, -0.0, 0.5, 1e308, -1e308, float("nan"),
    float("inf"), "", "x", "0", "1e9", "nan", "\0", "../x", "/dev/zero", ".", "x" * 20_000, "\u202e\u0007", "💥",
    [], {}, [None], [[]], {"": None}, {"a": {"b": []}}, [0] * 3, [1, 2], ["x"], list(range(500)), *PLACEHOLDERS,
)  # fmt: skip


def mutate(files: Files, targets: tuple[str, ...], structured: bool, random: Random) -> Files:
    """The files with one of `targets` changed by one to three mutations, of its format if `structured`."""
    name = random.choice(targets)
    content = files[name]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        mutation = by_format(name) if structured else random.choice(BYTES)
        try:
            content = mutation(content, random)[:LARGEST]
        except DAMAGED:  # by an earlier mutation, or with a value that cannot be written
            content = random.choice(BYTES)(content, random)[:LARGEST]
    return {**files, name: content}


class Unreadable(Exception):
    """Content without the structure that a mutation changes."""


DAMAGED = (  # errors of the libraries that take a format apart and put it together
    Unreadable, yaml.YAMLError, pickle.PickleError, zipfile.BadZipFile, zlib.error, struct.error, ArithmeticError,
    AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


def by_format(name: str) -> Mutation:
    return FORMATS.get(PurePosixPath(name).suffix, fields)


# bytes


def place(content: bytes, random: Random) -> int:
    return random.randrange(min(len(content), HEAD) if random.random() < 0.6 else len(content)) if content else 0


def flip(content: bytes, random: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8, 32)) if content else 0):
        changed[place(content, random)] ^= 1 << random.randrange(8)
    return bytes(changed)


def cut_out(content: bytes, random: Random) -> bytes:
    first = place(content, random)
    return content[:first] + content[first + random.choice((1, 2, 4, 16, 200, 5000)) :]


def truncate(content: bytes, random: Random) -> bytes:
    return content[: place(content, random)]


def insert(content: bytes, random: Random) -> bytes:
    first, count = place(content, random), random.choice((1, 2, 4, 64, 1000))
    return content[:first] + random.choice((random.randbytes(count), b"\0" * count, b"\xff" * count)) + content[first:]


def duplicate(content: bytes, random: Random) -> bytes:
    first = place(content, random)
    part = content[first : first + random.choice((1, 8, 64, 1000))]
    return content[:first] + part * random.choice((2, 3, 20)) + content[first + len(part) :]


def splice(content: bytes, random: Random) -> bytes:
    """A part of the content over another part of it."""
    first, other, count = place(content, random), place(content, random), random.choice((4, 16, 128, 1000))
    return content[:first] + content[other : other + count] + content[first + count :]


def fields(content: bytes, random: Random) -> bytes:
    """An integer field of 1 to 8 bytes, aligned, set to an extreme or by one from its value."""
    width = random.choice((1, 2, 2, 4, 4, 8))
    if len(content) < width:
        raise Unreadable
    order = random.choice(("little", "big"))
    first = place(content[: len(content) - width + 1], random) // width * width
    value = int.from_bytes(content[first : first + width], order)
    top = (1 << 8 * width) - 1
    value = random.choice((0, 1, top, top >> 1, (top >> 1) + 1, value + 1, value - 1, value * 2, value << 8)) & top
    return content[:first] + value.to_bytes(width, order) + content[first + width :]


BYTES: tuple[Mutation, ...] = (flip, cut_out, truncate, insert, duplicate, splice)

# values


def containers(value: Any) -> Iterator[Any]:
    """Every mapping and list that is not empty, the outermost first; without recursion."""
    pending, seen = [value], set()  # YAML can give a list that is in itself
    while pending:
        value = pending.pop()
        if isinstance(value, (dict, list)) and value and id(value) not in seen:
            seen.add(id(value))
            yield value
            pending += value.values() if isinstance(value, dict) else value


def change_value(value: Any, random: Random, odd: tuple[Any, ...] = ODD_VALUES) -> Any:
    """A tree of mappings and lists with one entry replaced, removed, renamed, repeated, moved or nested."""
    inside = list(containers(value))
    if not inside or random.random() < 0.03:
        return random.choice(odd)
    chosen = random.choice(inside[: random.choice((1, 4, len(inside)))])
    key = random.choice(list(chosen)) if isinstance(chosen, dict) else random.randrange(len(chosen))
    action = random.choice(("replace", "replace", "replace", "remove", "rename", "repeat", "swap", "nest", "near"))
    if action == "remove":
        del chosen[key]
    elif action == "swap":
        other = random.choice(inside)
        place = random.choice(list(other)) if isinstance(other, dict) else random.randrange(len(other))
        chosen[key] = other[place] if not isinstance(other[place], (dict, list)) else len(other)
    elif action == "nest":
        chosen[key] = random.choice(([chosen[key]], {"a": chosen[key]}))
    elif action == "near":
        chosen[key] = near(chosen[key], random)
    elif action == "repeat" and isinstance(chosen, dict):
        chosen[f"{SAME_KEY}{key}"] = random.choice((chosen[key], random.choice(odd)))
    elif action == "rename" and isinstance(chosen, dict):
        name = random.choice(("", f"{key}x", str(key).upper(), str(key)[1:], "x" * 5000, "0"))
        chosen[name] = chosen.pop(key)
    elif action in ("repeat", "rename"):
        chosen[key:key] = [chosen[key]] * random.choice((1, 3, 200))
    else:
        chosen[key] = random.choice(odd)
    return value


def near(value: Any, random: Random) -> Any:
    """Another value of the same type, or the same value in another type."""
    if isinstance(value, bool):
        return random.choice((not value, int(value), str(value)))
    if isinstance(value, (int, float)):
        return random.choice((-value, value + 1, value * 2, str(value), [value], float(value), value * 1000))
    if isinstance(value, str):
        return random.choice((value + "x", value[:-1], value.upper(), value * 3, [value], f" {value}"))
    return random.choice((None, [], {}))


def json_text(value: Any) -> bytes:
    text = json.dumps(value).replace(SAME_KEY, "")
    for name, stands_for in PLACEHOLDERS.items():
        text = text.replace(f'"{name}"', stands_for).replace(name, stands_for)
    return text.encode()


def change_json(content: bytes, random: Random) -> bytes:
    return json_text(change_value(json.loads(content), random))


YAML_PARTS = (
    f"x: !!python/object/apply:os.system ['touch {SENTINEL}']", f"- !!python/object/new:os.system [touch {SENTINEL}]",
    f"!!python/object/apply:subprocess.Popen [[touch, {SENTINEL}]]", "x: !!python/name:os.system", "a: &a [*a]", "*a",
    "<<: {a: 1}", "!!binary x", "!!set {a}", "!!timestamp 2001-99-99", "? [a]\n: b", "\t- x", "--- x", "%YAML 9.9",
    "x: 0x" + "f" * 3000, "x: " + "9" * 5000, "x: 1" + ":59" * 500, "[" * 500, "- " * 500, "{a: " * 500, "x: !!int x",
    "x: !!float x", "x: |\n  a\n b", "x: 'a", "x: .inf", "x: .nan", "at: 1\nat: 2", "&a x", "!x y", "? ", ": ",
    "x: !!int ''", "x: 0b", "x: 0o9", "x: 1_000", "[]: 1", "{}: 1", "x: \x00", "#" * 5000, "x: 1e999", "!!null x",
)  # fmt: skip


def change_yaml(content: bytes, random: Random) -> bytes:
    if random.random() < 0.4:
        lines = content.split(b"\n")
        lines.insert(random.randrange(len(lines) + 1), random.choice(YAML_PARTS).encode())
        return b"\n".join(lines)
    value = change_value(yaml.safe_load(content), random)
    if random.random() < 0.5:
        return json_text(value)  # flow style
    text = yaml.safe_dump(value, allow_unicode=True).replace(SAME_KEY, "")
    for name, stands_for in PLACEHOLDERS.items():
        text = text.replace(f"'{name}'", stands_for).replace(name, stands_for)
    return text.encode()


WORDS = (
    "8R", "0R", "-1R", "99999R", "9" * 400 + "R", "x", "R" * 5000, "8", "８R", "8R4U", "stay", "STAY", "\0", "💥",
    "1e9R", "right\n", "_", "8_", ".json", "x.json", "/dev/zero.json", "100000R", "٣R",
)  # fmt: skip


def change_words(content: bytes, random: Random) -> bytes:
    words: list[Any] = content.decode("utf-8", "replace").split()
    if not words:
        raise Unreadable
    first = random.randrange(len(words))
    action = random.choice(("replace", "remove", "insert", "repeat"))
    if action == "repeat":
        words[first:first] = words * min(random.choice((1, 5, 2000)), LARGEST // len(words))
    elif action == "remove":
        del words[first]
    else:
        words[first : first + (action == "replace")] = [random.choice(WORDS)]
    return random.choice((" ", "  ", "\n", "\t")).join(words).encode("utf-8", "surrogatepass")


# safetensors

SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1}


def change_safetensors(content: bytes, random: Random) -> bytes:
    """Entries of the header, also those that then disagree with the data, or whole tensors of a consistent file."""
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    action = random.choice(("header", "header", "entry", "tensor", "tensor", "tensor", "metadata", "length"))
    if action == "header":
        return with_header(json_text(change_value(header, random)), data)
    if action == "length":
        wrong = random.choice((0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1, 100_000_001))
        return struct.pack("<Q", wrong) + content[8:]
    if action == "metadata":
        return with_header(json_text(change_metadata(header, random)), data)
    name = random.choice([name for name in header if name != "__metadata__"])
    if action == "entry":
        change_entry(header[name], random)
        return with_header(json_text(header), data)
    return change_tensor(header, data, name, random)


def with_header(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def change_entry(entry: dict[str, Any], random: Random) -> None:
    first, last = entry["data_offsets"]
    if random.random() < 0.4:
        entry["data_offsets"] = random.choice(
            ([last, first], [first, last + 1], [first, 2**62], [0, last], [first], [-1, last], [first, first],
             [2**64, 0])
        )
    elif random.random() < 0.5:
        shape = entry["shape"]
        entry["shape"] = random.choice(
            (shape[::-1], shape[1:], [*shape, 1], [*shape, 0], [-1, *shape], [2**32, 2**32], [2**62], [1] * 300)
        )
    else:
        entry["dtype"] = random.choice((*SIZES, "F4", "C64", "E8M0", "", None, 1))


def change_metadata(header: dict[str, Any], random: Random) -> dict[str, Any]:
    """Texts of the header's metadata; one that is JSON itself, as a session's, is changed inside."""
    metadata = header.setdefault("__metadata__", {})
    for name, text in metadata.items():
        try:
            value = json.loads(text)
        except ValueError:
            continue
        if isinstance(value, dict) and random.random() < 0.9:
            metadata[name] = json_text(change_value(value, random)).decode()
            return header
    metadata[random.choice((*metadata, "r", "lora_alpha", "format", "lora_adapter_metadata"))] = random.choice(
        ("x", "", "0", "-1", "1e999", "NaN", "9" * 5000, "[" * 5000, "{}", '{"r":[]}', None, 1, {}, "\0")
    )
    return header


def change_tensor(header: dict[str, Any], data: bytes, name: str, random: Random) -> bytes:
    """A consistent file in which one tensor is missing, renamed, of another shape or dtype, or has odd values."""
    entry = header[name]
    first, last = entry["data_offsets"]
    part, shape = data[first:last], list(entry["shape"])
    action = random.choice(("remove", "rename", "shape", "dtype", "values", "extra"))
    if action == "remove":
        del header[name]
        part = b""
    elif action == "rename":
        header[other_name(name, random)] = header.pop(name)
    elif action == "extra":
        header[other_name(name, random)] = {"dtype": "U8", "shape": [3], "data_offsets": [len(data), len(data) + 3]}
        data += b"abc"
    elif action == "values":
        part = random.choice((b"\xff", b"\x7f", b"\0", b"\x80\x7f")) * len(part)
        part = part[: last - first]
    else:
        if action == "shape" and shape:
            side = random.randrange(len(shape))
            shape[side] = random.choice((0, 1, shape[side] + 1, shape[side] * 2, max(0, shape[side] - 1)))
            shape = random.choice((shape, shape, shape[::-1], [*shape, 1], shape[1:], []))
        elif action == "dtype":
            entry["dtype"] = random.choice(list(SIZES))
        count = SIZES[entry["dtype"]]
        for side in shape:
            count *= side
        if count > LARGEST:
            raise Unreadable
        entry["shape"], part = shape, (part * (count // max(1, len(part)) + 1))[:count].ljust(count, b"\0")
    added = len(part) - (last - first)
    for other, other_entry in header.items():
        if other != "__metadata__" and other_entry["data_offsets"][0] >= last and (other_entry is not entry):
            other_entry["data_offsets"] = [offset + added for offset in other_entry["data_offsets"]]
    if name in header:
        header[name]["data_offsets"] = [first, first + len(part)]
    elif action == "rename":
        next(other_entry for other_entry in header.values() if other_entry is entry)["data_offsets"] = [first, last]
    return with_header(json_text(header), data[:first] + part + data[last:])


def other_name(name: str, random: Random) -> str:
    digit = re.sub(r"\d+", lambda _: random.choice(("0", "1", "7", "99999999999999", "-1", "٣")), name, count=1)
    leaf = name.rpartition(".")[2]
    return random.choice((f"module.{name}", f"{name}.x", leaf, digit, digit, "", "x" * 5000, f"{name}\0"))


# files of torch.save


def odd_content() -> tuple[Any, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of prototype layouts
        return (
            None, 0, -1, "x", b"x", [], {}, (), {"a": 1}, [torch.ones(2)], torch.ones(()), torch.ones(0), torch.ones(3),
            torch.ones(2, 2, dtype=torch.int8), torch.ones(2, dtype=torch.complex64), torch.full((2, 2), float("nan")),
            torch.ones(1).expand(1 << 40), torch.ones(1).as_strided((2, 3), (0, 0)), torch.empty(3, device="meta"),
            torch.ones(2, 2).to_sparse(), torch.eye(3).to_sparse_csr(), torch.ones(2, dtype=torch.bool), 2**100,
            torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), torch.nn.Parameter(torch.ones(2)),
            torch.ones(1).expand(3, 1 << 20), float("nan"), {1: torch.ones(1)}, {None: {}}, torch.float32,
            torch.ones(4, dtype=torch.float8_e4m3fn), torch.Size([1]), 10**400, "x" * 20_000,
        )  # fmt: skip


ODD_CONTENT = odd_content()


def change_torch(content: bytes, random: Random) -> bytes:
    """The values of a file of torch.save, or the members of its archive."""
    if random.random() < 0.5:
        return change_archive(content, random)
    value = with_own_dicts(loaded(content))
    for _ in range(random.choice((1, 1, 2, 5))):
        value = change_state(value, random)
    target = io.BytesIO()
    torch.save(value, target, _use_new_zipfile_serialization=random.random() < 0.85)
    return target.getvalue()


@lru_cache(maxsize=8)  # samples are damaged again and again
def loaded(content: bytes) -> Any:
    """The value of a file of torch.save: the program's own, and later mutations of one are only read as tensors."""
    return torch.load(io.BytesIO(content), weights_only=True)


def with_own_dicts(value: Any) -> Any:
    return {key: with_own_dicts(part) for key, part in value.items()} if isinstance(value, dict) else value


def change_state(value: Any, random: Random) -> Any:
    """A nested dict of tensors with one entry replaced, removed, renamed or wrapped, or one tensor reshaped."""
    groups = [group for group in containers(value) if isinstance(group, dict)]
    if not groups or random.random() < 0.03:
        return random.choice(ODD_CONTENT)
    if random.random() < 0.05:
        return {random.choice(("state_dict", "model", "generator", "x", 1, None)): value}
    group = random.choice(groups)
    key = random.choice(list(group))
    action = random.choice(("replace", "replace", "remove", "rename", "shape", "shape", "dtype", "add", "share"))
    entry = group[key]
    if action == "remove":
        del group[key]
    elif action == "rename":
        group[other_name(str(key), random)] = group.pop(key)
    elif action == "add":
        group[random.choice((1, None, "x", "blocks.0.x", ("a", 1), 1.5, ""))] = random.choice(ODD_CONTENT)
    elif action == "share":
        group[key] = group[random.choice(list(group))]
    elif isinstance(entry, torch.Tensor) and action == "shape":
        flat = entry.flatten()
        group[key] = random.choice((flat, flat[:0], flat[None], entry[None], entry.mT if entry.ndim > 1 else flat[:1]))
    elif isinstance(entry, torch.Tensor) and action == "dtype":
        group[key] = entry.to(random.choice((torch.float16, torch.int8, torch.complex64, torch.bool, torch.float64)))
    else:
        group[key] = random.choice(ODD_CONTENT)
    return value


def call_pickle(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls a function with a text."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps((argument,), 2)[2:-1] + b"R."


PICKLES = (
    call_pickle("os", "system", f"touch {SENTINEL}"), call_pickle("posix", "system", f"touch {SENTINEL}"),
    call_pickle("builtins", "exec", f"open('{SENTINEL}','w')"), call_pickle("builtins", "eval", "1"),
    call_pickle("subprocess", "check_call", f"touch {SENTINEL}"), call_pickle("builtins", "open", SENTINEL),
    call_pickle("torch", "load", SENTINEL), call_pickle("collections", "OrderedDict", "x"),
    call_pickle("torch._utils", "_rebuild_tensor_v2", "x"), call_pickle("torch", "Size", "x"),
    call_pickle("builtins", "bytearray", "x"), b"\x80\x02cbuiltins\nbytearray\nK\xff\x85R.",
    b"\x80\x02cbuiltins\nbytearray\n\x8a\x08" + (2**40).to_bytes(8, "little") + b"\x85R.",
    b"\x80\x02" + b"(" * 50_000 + b".", b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".", b"\x80\x02.", b"", b"N.",
    b"\x80\x02}" + b"q\xff" * 3 + b".", b"\x80\x02h\x09.", b"\x80\xff.", b"\x80\x02\x8b\xff\xff\xff\x7f.",
    b"I" + b"9" * 5000 + b"\n.",
    b"\x80\x04\x8d" + b"\xff" * 8 + b".", b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    b"\x80\x02X\xff\xff\xff\x7f.",
    b"\x80\x02]r\xff\xff\xff\x7f.", b"\x80\x04]\x94\x94\x94.", b"\x80\x02U\x07storageQ.",
    b"\x80\x02(U\x07storage\x85tQ.",
)  # fmt: skip


def change_archive(content: bytes, random: Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {part.filename: archive.read(part) for part in archive.infolist()}
    if not members:
        raise Unreadable
    name = random.choice(list(members))
    pickled = next((name for name in members if name.endswith("data.pkl")), name)
    action = random.choice(("pickle", "opcode", "opcode", "opcode", "remove", "bytes", "rename", "packed", "add"))
    if action == "pickle":
        members[pickled] = random.choice(PICKLES)
    elif action == "opcode":
        members[pickled] = change_opcode(members[pickled], random)
    elif action == "remove":
        del members[name]
    elif action == "bytes":
        members[name] = random.choice(BYTES)(members[name], random)
    elif action == "rename":
        other = random.choice((f"{name}x", name.rpartition("/")[2], "../x", "/x", "archive/data/0"))
        members[other] = members.pop(name)
    elif action == "add":
        members[random.choice(("archive/.data/x", "archive/code/x.py", "archive/constants.pkl", "x"))] = b"x = 1\n"
    method = zipfile.ZIP_DEFLATED if action == "packed" else zipfile.ZIP_STORED
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, part in members.items():
            archive.writestr(zipfile.ZipInfo(name), part, method)
    return target.getvalue()


def change_opcode(content: bytes, random: Random) -> bytes:
    """A pickle with one of its numbers, names or instructions changed."""
    places = [actual.start() + 1 for actual in re.finditer(rb"[KMJX]", content)]
    if places and random.random() < 0.6:
        first = random.choice(places)
        value = random.choice((b"\0", b"\x01", b"\xff", b"\x7f", b"\xff\xff\xff\x7f", b"\0\0\0\x40"))
        return content[:first] + value + content[first + len(value) :]
    names = re.findall(rb"c([\w.]+)\n(\w+)\n", content)
    if names and random.random() < 0.6:
        module, name = random.choice(names)
        other = random.choice(
            (b"cos\nsystem\n", b"ctorch\nDoubleStorage\n", b"ctorch\nload\n", b"ctorch._utils\n_rebuild_parameter\n",
             b"ctorch\nQInt8Storage\n", b"ctorch._utils\n_rebuild_sparse_tensor\n", b"cbuiltins\nexec\n")
        )  # fmt: skip
        return content.replace(b"c" + module + b"\n" + name + b"\n", other, 1)
    first = random.randrange(max(1, len(content)))
    instruction = random.choice((b".", b"R", b"0", b"N", b"}", b"]", b"t", b"s", b"b", b"Q"))
    return content[:first] + instruction + content[first + 1 :]


# pictures and videos


def change_png(content: bytes, random: Random) -> bytes:
    """Chunks of a PNG, their checksums right."""
    chunks, first = [], 8
    while first + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, first)
        chunks.append((content[first + 4 : first + 8], content[first + 8 : first + 8 + length]))
        first += 12 + length
    if not chunks:
        raise Unreadable
    number = random.randrange(len(chunks))
    kind, data = chunks[number]
    action = random.choice(("field", "field", "remove", "repeat", "move", "kind", "add", "pixels"))
    if action == "remove":
        del chunks[number]
    elif action == "repeat":
        chunks[number:number] = [chunks[number]] * random.choice((1, 50))
    elif action == "move":
        chunks.insert(random.randrange(len(chunks)), chunks.pop(number))
    elif action == "kind":
        chunks[number] = (random.choice((b"IDAT", b"PLTE", b"tRNS", b"iCCP", b"eXIf", b"acTL", b"fdAT", b"zTXt")), data)
    elif action == "add":
        bomb = zlib.compress(b"\0" * 2_000_000, 9)
        extra = random.choice(
            ((b"zTXt", b"a\0\0" + bomb), (b"iTXt", b"a\0\x01\0\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb),
             (b"eXIf", b"MM\0*"), (b"tRNS", b"\0"), (b"PLTE", b"\0" * 3), (b"acTL", b"\xff" * 8),
             (b"iCCP", b"a\0\0" + zlib.compress(b"x" * 200)))
        )  # fmt: skip
        chunks.insert(random.randrange(1, len(chunks) + 1), extra)
    elif action == "pixels":
        chunks[number] = (kind, zlib.compress(random.choice((b"", b"\x09" * 100, b"\0" * 2_000_000))))
    else:
        chunks[number] = (kind, fields(data, random))
    parts = [content[:8]]
    for kind, data in chunks:
        parts.append(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
    return b"".join(parts)


def change_boxes(content: bytes, random: Random) -> bytes:
    """Boxes of an MP4 at any depth: removed, repeated, of another kind, or with another number in them."""
    boxes = list(mp4_boxes(content, 0, len(content)))
    if not boxes:
        raise Unreadable
    first, last = random.choice(boxes)
    box = content[first:last]
    action = random.choice(("field", "field", "field", "remove", "repeat", "kind", "size"))
    if action == "field":
        box = box[:8] + fields(box[8:], random)
    elif action == "remove":
        box = b""
    elif action == "repeat":
        box *= random.choice((2, 20))
    elif action == "kind":
        box = box[:4] + random.choice((b"free", b"mdat", b"moov", b"stts", b"stsz", b"tkhd", b"xxxx")) + box[8:]
    else:
        box = struct.pack(">I", random.choice((0, 1, 7, 8, 2**31, 2**32 - 1))) + box[4:]
    return content[:first] + box + content[last:]


def mp4_boxes(content: bytes, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """(first, last) bytes of each box, and of those inside the kinds that hold others."""
    while first + 8 <= stop:
        length, kind = struct.unpack_from(">I4s", content, first)
        if not 8 <= length <= stop - first:
            return
        yield first, first + length
        if kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf", b"udta"):
            yield from mp4_boxes(content, first + 8, first + length)
        first += length


def change_segments(content: bytes, random: Random) -> bytes:
    """Segments of a JPEG before its pixels."""
    parts, first = [], 2
    while first + 4 <= len(content) and content[first] == 0xFF and content[first + 1] != 0xDA:
        last = first + 2 + int.from_bytes(content[first + 2 : first + 4], "big")
        parts.append(content[first:last])
        first = last
    if not parts:
        raise Unreadable
    number = random.randrange(len(parts))
    action = random.choice(("field", "field", "field", "remove", "repeat", "move"))
    if action == "remove":
        del parts[number]
    elif action == "repeat":
        parts[number:number] = [parts[number]] * random.choice((1, 50))
    elif action == "move":
        parts.insert(random.randrange(len(parts)), parts.pop(number))
    else:
        parts[number] = parts[number][:2] + fields(parts[number][2:], random)
    return content[:2] + b"".join(parts) + content[first:]


FORMATS: dict[str, Mutation] = {
    ".json": change_json, ".yaml": change_yaml, ".txt": change_words, ".safetensors": change_safetensors,
    ".png": change_png, ".mp4": change_boxes, ".jpg": change_segments, ".pt": change_torch, ".pth": change_torch,
}  # fmt: skip
