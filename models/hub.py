"""Weights by name: the files that a model needs, found in the local Hugging Face cache or downloaded into it.

A name is a preset whose published files are known (`self-forcing`), or `org/name` or `org/name:file` of the hub. Files
that are in the cache are used as they are, and the network is not asked. HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and
HF_HUB_OFFLINE count as in every program that uses huggingface_hub, which is imported when a name is looked up.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ..errors import InferixError, UsageError, nearest, quoted
from ..schemes.presets import About
from .registry import MODELS, PRESETS, find_preset

NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<file>[^:]+))?")
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = ("special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json")
TEXT = (TEXT_ENCODER, *(f"google/umt5-xxl/{name}" for name in TOKENIZER))
TRANSFORMER_PARTS = ("config.json", "model_index.json", "diffusion_pytorch_model*", "transformer/*", "transformer_2/*",
                     "high_noise_model/*", "low_noise_model/*", "transformers/*")  # fmt: skip
VAE_PARTS, TEXT_PARTS = ("Wan2.?_VAE.pth", "vae/*"), ("models_t5_*", "text_encoder/*")
OTHER_PARTS = (*VAE_PARTS, *TEXT_PARTS, "google/umt5-xxl/*", "tokenizer/*")
OFFLINE = "the hub is not asked (offline)"
GIGABYTES = {  # of files whose size is known; messages leave out the others'
    "Wan2.1_VAE.pth": 0.5, "Wan2.2_VAE.pth": 2.8, TEXT_ENCODER: 11.4, "krea-realtime-video-14b.safetensors": 28.6,
    "autoregressive_checkpoint/model.pt": 11.4, "transformers/*": 37.1,
}  # fmt: skip


@dataclass(frozen=True)
class Files:
    """Files of one repository of the hub, as paths in it, or as patterns where the hub cannot be asked."""

    repository: str
    names: tuple[str, ...]

    @property
    def command(self) -> str:
        """The shell command that downloads them into the cache."""
        option = "--include " if has_wildcard(self.names) else ""
        return f"hf download {self.repository} {' '.join(option + shlex.quote(name) for name in self.names)}"


@dataclass(frozen=True)
class Located:
    """Local paths: of a checkpoint, and of the folder of its VAE and text encoder where that is another."""

    model: str
    base: str | None


WAN21 = Files("Wan-AI/Wan2.1-T2V-1.3B", ("Wan2.1_VAE.pth", *TEXT))
BASES = {  # VAE and text encoder by named model; both sizes of Wan 2.1 have the same
    "wan-1.3b": WAN21,
    "wan-14b": WAN21,
    "wan-5b": Files("Wan-AI/Wan2.2-TI2V-5B", ("Wan2.2_VAE.pth", *TEXT)),
    "lingbot-1.3b": WAN21,
    "lingbot-14b": WAN21,
}


def is_hub_name(text: str) -> bool:
    """True if a model or base is `org/name` or `org/name:file` of the hub, and not a path."""
    match = NAME.fullmatch(text)
    if match is None or Path(text).exists():
        return False
    return match["file"] is not None or not (text.endswith(WEIGHTS) or Path(text).parent.exists())


def locate(
    model: str, preset: str | None = None, base: str | None = None, offline: bool = False, alone: bool = False
) -> Located:
    """The paths of a model and of the base that goes with it, each given as a path or a name.

    preset: the one asked for, whose published VAE and text encoder go with a file of the hub. alone: neither is needed
    from elsewhere. Paths and models without files stay as they are. UsageError for names that the hub does not have,
    InferixError, with the commands that download them, for files that are neither in the cache nor to be had.
    """
    needed: list[Files] = []
    about: About | None = None
    if base is not None and is_hub_name(base):
        known = [files for files in BASES.values() if files.repository == base]
        needed.append(known[0] if known else base_of(base, offline))
    if named := model not in MODELS and not Path(model).exists() and (model in PRESETS or is_hub_name(model)):
        wanted, part, about = published(model, preset, offline)
        needed.insert(0, wanted)
        if base is None and not alone and about is not None and about.base in BASES and not has_parts(wanted):
            needed.append(BASES[about.base])
    folders = fetch(model if named else str(base), needed, offline, about)
    path = str(folders.pop(0) / part) if named else model
    return Located(path, str(folders[0]) if folders else base)


def published(model: str, preset: str | None, offline: bool) -> tuple[Files, str, About | None]:
    """Files that a name of a preset or of the hub stands for, the model's among them ("": their folder), and the
    preset's facts.
    """
    if model in PRESETS:
        about = PRESETS[model].about
        if not about.files:
            raise UsageError(
                f"model is {quoted(model)}, a preset of which no published file is known ({about.weights}); "
                "give a path, or org/name:file of the hub"
            )
        return files_of(model, about, offline)
    match = NAME.fullmatch(model)
    assert match is not None
    repository, file = match["repository"], match["file"]
    owner = next((one.about for one in PRESETS.values() if one.about.weights == repository and one.about.files), None)
    if owner is not None and file in (None, owner.files[0]):
        return files_of(model, owner, offline)
    if owner is None and preset is not None:
        owner = find_preset(preset).about
    if file is not None:
        return Files(repository, (file,)), file, owner
    names = listing(repository, offline)
    weights = [name for name in names if name.endswith(WEIGHTS)]
    if any(fnmatch(name, pattern) for name in weights for pattern in TRANSFORMER_PARTS):
        return Files(repository, matching(names, TRANSFORMER_PARTS + OTHER_PARTS)), "", owner
    if len(weights) != 1:
        listed = f": {', '.join(weights[:8])}{', ...' if len(weights) > 8 else ''}" if weights else ""
        raise UsageError(f"{repository} has {len(weights)} files of weights{listed}; name one, {repository}:FILE")
    return Files(repository, (weights[0],)), weights[0], owner


def files_of(name: str, about: About, offline: bool) -> tuple[Files, str, About]:
    """The published files of a preset, the model's among them ("": their folder), and the preset's facts."""
    files = Files(about.weights, about.files)
    if not has_wildcard(about.files):
        return files, about.files[0], about
    try:
        names = matching(listing(about.weights, offline), about.files)
    except UsageError:  # the hub has no such repository
        raise
    except InferixError as error:
        beside = [] if has_parts(files) or about.base not in BASES else [BASES[about.base]]
        reason = OFFLINE if is_offline(offline) else "the hub does not answer"
        raise unavailable(name, [files, *beside], reason, about) from error
    if not names:
        raise UsageError(f"{about.weights} has no files {', '.join(about.files)}; see {page(about.weights)}")
    return Files(about.weights, names), "", about


def has_wildcard(names: Sequence[str]) -> bool:
    return any("*" in name for name in names)


def has_parts(files: Files) -> bool:
    """True if a VAE and a text encoder are among some files."""
    return all(matching(files.names, patterns) for patterns in (VAE_PARTS, TEXT_PARTS))


def base_of(repository: str, offline: bool) -> Files:
    """VAE and text encoder of a repository that is no base known here."""
    names = matching(listing(repository, offline), OTHER_PARTS)
    if not names:
        raise UsageError(f"base is {quoted(repository)}, which has no VAE or text encoder that is known by its name")
    return Files(repository, names)


def matching(names: Sequence[str], patterns: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if any(fnmatch(name, pattern) for pattern in patterns))


def fetch(name: str, needed: Sequence[Files], offline: bool, about: About | None) -> list[Path]:
    """Each repository's folder in the cache, complete as far as needed; what is missing is downloaded."""
    if not needed:
        return []
    missing = [files for files in needed if cached(files) is None]
    if missing and is_offline(offline):
        raise unavailable(name, missing, OFFLINE, about)
    try:
        return [cached(files) or download(files) for files in needed]
    except ConnectionError as error:
        raise unavailable(name, missing, str(error), about) from error


def is_offline(offline: bool) -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return offline or HF_HUB_OFFLINE


def snapshot(repository: str) -> Path | None:
    """The folder of a repository's main branch in the cache; None where there is none."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE).expanduser() / f"models--{repository.replace('/', '--')}"
    reference = folder / "refs" / "main"
    return folder / "snapshots" / reference.read_text("utf-8").strip() if reference.is_file() else None


def cached(files: Files) -> Path | None:
    """The folder of files that are all in the cache, else None. A file counts once it is there as a whole."""
    folder = snapshot(files.repository)
    return folder if folder and all((folder / name).is_file() for name in files.names) else None


def listing(repository: str, offline: bool) -> list[str]:
    """Paths of the files of a repository: on the hub, or in the cache where the hub is not asked or does not answer."""
    import huggingface_hub
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

    reason = OFFLINE
    if not is_offline(offline):
        try:
            return sorted(huggingface_hub.HfApi().list_repo_files(repository))
        except RepositoryNotFoundError as error:
            raise no_repository(repository) from error
        except (HTTPError, OSError) as error:
            reason = first_line(error)
    folder = snapshot(repository)
    paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
    if folder is None or not paths:
        raise InferixError(f"{repository} is not in the Hugging Face cache, and {reason}: hf download {repository}")
    return [path.relative_to(folder).as_posix() for path in paths]


def download(files: Files) -> Path:
    """Download files; one that stopped in the middle goes on where it stopped.

    UsageError for a repository or file that the hub does not have, ConnectionError where it cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

    try:
        folder = Path(huggingface_hub.snapshot_download(files.repository, allow_patterns=list(files.names)))
    except RepositoryNotFoundError as error:
        raise no_repository(files.repository) from error
    except (HTTPError, OSError) as error:
        raise ConnectionError(first_line(error)) from error
    absent = [name for name in files.names if not (folder / name).is_file()]
    if absent:
        near = nearest(absent[0], listing(files.repository, False))
        raise UsageError(f"{files.repository} has no file {quoted(absent[0])}{near}; see {page(files.repository)}")
    return folder


def no_repository(repository: str) -> UsageError:
    return UsageError(
        f"no repository {quoted(repository)} that can be read on {page('')}; check the name, or log in "
        "(hf auth login) if it asks for that"
    )


def unavailable(name: str, missing: Sequence[Files], reason: str, about: About | None) -> InferixError:
    """Error that names what is missing, the reason, and the commands that download it."""
    commands = " && ".join(files.command for files in missing)
    sizes = [f"{one} {GIGABYTES[one]:g} GB" for files in missing for one in files.names if one in GIGABYTES]
    notes = [f"sizes: {', '.join(sizes)}"] if sizes else []
    licence = f"licence of the code: {about.licence}; " if about else ""
    pages = " and ".join(page(files.repository) for files in missing)
    notes.append(f"{licence}licences of the weights: see {pages}")
    return InferixError(
        f"files of {name} are not in the Hugging Face cache, and {reason}. Download them where there is a network: "
        f"{commands} ({'; '.join(notes)})"
    )


def page(repository: str) -> str:
    from huggingface_hub.constants import ENDPOINT

    return f"{ENDPOINT}/{repository}" if repository else ENDPOINT


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
