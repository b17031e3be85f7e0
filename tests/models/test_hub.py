"""Weights by name against a hub on loopback, in child processes: huggingface_hub reads its settings once."""

import json
import os
import sys
from pathlib import Path

import pytest
from forked import run_code

from inferix.errors import UsageError
from inferix.export.checkpoint import write_random
from inferix.models.hub import BASES, WAN21, is_hub_name, locate
from inferix.models.registry import MODELS, PRESETS
from inferix.models.wan.checkpoint import FORMATS

from .hub import COMMIT, serving

SELF_FORCING = PRESETS["self-forcing"].about
TWO_PARTS = {
    "config.json": b"{}", "diffusion_pytorch_model.safetensors": b"weights", "Wan2.1_VAE.pth": b"vae", "a.mp4": b"",
}  # fmt: skip
REPOSITORIES = {
    SELF_FORCING.weights: {SELF_FORCING.files[0]: b"transformer", "checkpoints/other.pt": b"other"},
    WAN21.repository: {name: name.encode() for name in (*WAN21.names, "README.md")},
    "nobody/folder": TWO_PARTS,
    "nobody/single": {"model.pt": b"single", "README.md": b""},
    "nobody/many": {"a.pt": b"", "b.pt": b""},
}
SCRIPT = """
import json, sys
from inferix.errors import InferixError
from inferix.models.hub import locate
for asked in json.loads(sys.argv[1]):
    try:
        found = locate(**asked)
        print(json.dumps([found.model, found.base]))
    except InferixError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


def look_up(home: Path, endpoint: str, *asked: dict, offline: str = "0") -> list:
    """What `locate` gives for each of the arguments, in one process with a Hugging Face home of its own."""
    return [json.loads(line) for line in child(home, endpoint, offline, SCRIPT, json.dumps(asked)).splitlines()]


def child(home: Path, endpoint: str, offline: str, *arguments: str) -> str:
    """What a Python process prints; huggingface_hub reads its settings in it."""
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": offline, "NO_PROXY": "127.0.0.1"}
    unset = {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"}
    environment = {key: value for key, value in os.environ.items() if key not in unset} | settings
    code, *rest = arguments
    first = "import sys\nassert 'huggingface_hub' not in sys.modules\n"
    ended, printed, errors = run_code(first + code, *rest, environment=environment)
    assert ended == 0, errors
    return printed


def snapshot(home: Path, repository: str) -> Path:
    return home / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / COMMIT


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A home that the published files were downloaded to, what was found, and the requests of first and second time."""
    home = tmp_path_factory.mktemp("hf")
    with serving(REPOSITORIES) as (endpoint, requests):
        first = look_up(home, endpoint, {"model": "self-forcing"}, {"model": SELF_FORCING.weights})
        downloads, count = list(requests), len(requests)
        second = look_up(home, endpoint, {"model": "self-forcing"}, {"model": "self-forcing"})
        assert len(requests) == count  # all in the cache: the hub is not asked
    return home, [*first, *second], downloads


def test_a_preset_is_downloaded_once_with_its_base(filled):
    home, actual, requests = filled
    folder = snapshot(home, SELF_FORCING.weights)
    model, base = folder / SELF_FORCING.files[0], snapshot(home, WAN21.repository)
    assert actual == [[str(model), str(base)]] * 4
    assert model.read_bytes() == b"transformer"
    assert all((base / name).read_bytes() == name.encode() for name in WAN21.names)
    assert not (folder / "checkpoints/other.pt").exists() and not (base / "README.md").exists()
    assert sum(line.startswith("GET") and SELF_FORCING.files[0] in line for line in requests) == 1


@pytest.mark.parametrize("way", [{"offline": True}, {}], ids=["argument", "environment"])
def test_offline_takes_the_cache_and_says_how_to_fill_it(filled, way):
    home = filled[0]
    asked = [
        {"model": "self-forcing"}, {"model": "longlive"},
        {"model": "nobody/single"}, {"model": "nobody/single:model.pt"},
        {"model": f"{SELF_FORCING.weights}:checkpoints/other.pt"}, {"model": "longlive", "base": "here"},
    ]  # fmt: skip
    with serving(REPOSITORIES) as (endpoint, requests):
        hit, *missed = look_up(home, endpoint, *(one | way for one in asked), offline="0" if way else "1")
    assert requests == []
    assert hit == filled[1][0]
    assert {one["error"] for one in missed} == {"InferixError"}
    longlive, single, file, other, alone = (one["message"] for one in missed)
    about = PRESETS["longlive"].about
    assert f"hf download {about.weights} {' '.join(about.files)}" in longlive
    assert WAN21.command not in longlive  # the base is there
    assert about.licence in longlive and f"{endpoint}/{about.weights}" in longlive
    assert "hf download nobody/single" in single and "hf download nobody/single model.pt" in file
    assert f"hf download {SELF_FORCING.weights} checkpoints/other.pt" in other
    assert "hf download" in alone


def test_every_missing_file_is_named_where_nothing_answers(tmp_path):
    (missed,) = look_up(tmp_path, "http://127.0.0.1:9", {"model": "self-forcing"})
    assert missed["error"] == "InferixError"
    command = f"hf download {SELF_FORCING.weights} {SELF_FORCING.files[0]} && {WAN21.command}"
    assert command in missed["message"] and "11.4 GB" in missed["message"]


def test_repositories_files_and_bases_by_name(tmp_path):
    file = "nobody/single:model.pt"
    with serving(REPOSITORIES) as (endpoint, _):
        actual = look_up(
            tmp_path, endpoint, {"model": "nobody/folder"}, {"model": "nobody/single"}, {"model": file},
            {"model": file, "preset": "self-forcing"}, {"model": file, "base": "nobody/folder"},
            {"model": file, "preset": "self-forcing", "alone": True},
            {"model": "nobody/many"}, {"model": "nobody/none"}, {"model": "nobody/single:modle.pt"},
            {"model": file, "base": "nobody/single"},
        )  # fmt: skip
    names = ("nobody/folder", "nobody/single", WAN21.repository)
    folder, single, base = (str(snapshot(tmp_path, name)) for name in names)
    model = f"{single}/model.pt"
    assert actual[:6] == [[folder, None], [model, None], [model, None], [model, base], [model, folder], [model, None]]
    assert not (Path(folder) / "a.mp4").exists()
    many, none, misnamed, no_base = actual[6:]
    assert {one["error"] for one in actual[6:]} == {"UsageError"}
    assert "a.pt, b.pt" in many["message"] and "'nobody/none'" in none["message"]
    assert "'modle.pt'" in misnamed["message"] and "'model.pt'" in misnamed["message"]
    assert "'nobody/single'" in no_base["message"]


def test_a_partial_download_is_no_hit_and_goes_on(tmp_path):
    repositories = {"nobody/single": {"model.pt": b"0123456789"}}
    with serving(repositories) as (endpoint, _):
        ((model, _),) = look_up(tmp_path, endpoint, {"model": "nobody/single:model.pt"})
        blob = Path(model).resolve()
        Path(model).unlink()
        blob.rename(f"{blob}.incomplete")
        Path(f"{blob}.incomplete").write_bytes(b"01234")
        (missed,) = look_up(tmp_path, endpoint, {"model": "nobody/single:model.pt", "offline": True})
        assert "hf download nobody/single model.pt" in missed["message"]
        ((again, _),) = look_up(tmp_path, endpoint, {"model": "nobody/single:model.pt"})
    assert again == model and Path(model).read_bytes() == b"0123456789"


def test_a_model_is_loaded_by_name(tmp_path):
    """A file and its base from two repositories, whose paths in the cache are links to files of other names."""
    folder = write_random("wan-tiny", "self-forcing", tmp_path / "made")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    file = FORMATS["self-forcing"].file
    model = {f"checkpoints/{file}": files.pop(file)}
    script = """
import inferix
engine = inferix.load("nobody/tiny", device="cpu", base="nobody/parts")
with engine.open(prompt="water", size=(32, 32)) as session:
    (block,) = session.stream(1)
print(engine.parts.source, engine.parts.form, len(block.frames))
"""
    with serving({"nobody/tiny": model, "nobody/parts": files}) as (endpoint, _):
        loaded = child(tmp_path / "home", endpoint, "0", script)
    assert loaded.split() == ["nobody/tiny", "self-forcing", "9"]
    again = "from inferix.models.hub import locate; print(locate('nobody/tiny', base='nobody/parts').model)"
    assert child(tmp_path / "home", "http://127.0.0.1:9", "1", again).startswith(str(tmp_path / "home"))


def test_paths_and_models_of_the_package_are_left_alone(tmp_path, monkeypatch):
    """No look-up: huggingface_hub is not even imported."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    for model in (*MODELS, "org/name", "org/missing", "models/model.pt", "./org/model", "/org/name", str(tmp_path)):
        actual = locate(model, base="org/name")
        assert (actual.model, actual.base) == (model, "org/name")


LINGBOT = {name: PRESETS[name].about for name in ("lingbot-v2", "lingbot-v2-1.3b", "lingbot-v1")}
PUBLISHED = {
    LINGBOT["lingbot-v2"].weights: (
        "transformers/config.json", "transformers/diffusion_pytorch_model.safetensors", *WAN21.names
    ),
    LINGBOT["lingbot-v2-1.3b"].weights: ("model-00001-of-00001.safetensors", "model.safetensors.index.json"),
    LINGBOT["lingbot-v1"].weights: ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.bin"),
}  # fmt: skip


def test_folders_of_models_with_a_camera_by_name(tmp_path):
    """Files by patterns; text encoder and VAE lie beside v2 14B, and are those of Wan 2.1 for the others."""
    served = {name: {file: file.encode() for file in (*files, "a.mp4")} for name, files in PUBLISHED.items()}
    asked = [{"model": name} for name in LINGBOT]
    with serving(served | {WAN21.repository: REPOSITORIES[WAN21.repository]}) as (endpoint, _):
        actual = look_up(tmp_path, endpoint, *asked, {"model": LINGBOT["lingbot-v1"].weights})
    base = str(snapshot(tmp_path, WAN21.repository))
    folders = {name: snapshot(tmp_path, about.weights) for name, about in LINGBOT.items()}
    assert actual == [[str(folder), None if name == "lingbot-v2" else base] for name, folder in folders.items()] + [
        [str(folders["lingbot-v1"]), base]
    ]
    for name, about in LINGBOT.items():
        assert all((folders[name] / file).read_bytes() == file.encode() for file in PUBLISHED[about.weights])
        assert not (folders[name] / "a.mp4").exists()
    missed = look_up(tmp_path / "empty", endpoint, *({"model": name, "offline": True} for name in LINGBOT))
    for name, one in zip(LINGBOT, missed, strict=True):
        assert one["error"] == "InferixError" and LINGBOT[name].licence in one["message"]
        assert f"hf download {LINGBOT[name].weights} --include" in one["message"]
        assert (WAN21.command in one["message"]) == (name != "lingbot-v2")
    assert "transformers/* 37.1 GB" in missed[0]["message"] and "11.4 GB" in missed[1]["message"]


@pytest.mark.parametrize("model", ["self-forcing-framewise", "causal-diffusion"])
def test_a_preset_without_published_files_is_refused(model):
    with pytest.raises(UsageError, match=f"{model!r}"):
        locate(model)


def test_what_is_a_name_of_the_hub():
    assert all(map(is_hub_name, ("org/name", "a-b/c.d_e", "org/name:dir/file.pt")))
    assert not any(map(is_hub_name, ("name", "a/b/c", "org/model.pt", "/org/name", "../name", "org/", "C:/x")))


def test_every_published_preset_has_a_base():
    published = [preset.about for preset in PRESETS.values() if preset.about.files]
    assert len(published) >= 8
    assert all(about.base in BASES and is_hub_name(about.weights) for about in published)
