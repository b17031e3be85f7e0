"""Presets, tensor names and ops from outside the package: YAML files, entry points, and errors that show the file."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from inferix import CheckpointError, UsageError, load, plugins
from inferix.export.checkpoint import write_random
from inferix.kernels import catalog
from inferix.models import registry
from inferix.models.registry import FORMATS, PRESETS, find_preset, find_spec, read_checkpoint, read_layout
from inferix.models.wan.names import FUSED, ORIGINAL, changed_table, from_format
from inferix.schemes.presets import Preset


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder of a small checkpoint, its tensors by name)."""
    folder = write_random("wan-tiny", "original", tmp_path_factory.mktemp("tiny") / "model")
    file = folder / "diffusion_pytorch_model.safetensors"
    return folder, load_file(file)


def write(path, text):
    path.write_text(text, "utf-8")
    return str(path)


def test_a_preset_file_may_change_another(tmp_path):
    write(tmp_path / "wide.yaml", "base: longlive\nlocal_attn_size: 9\n")
    found = find_preset(write(tmp_path / "wider.yaml", "base: wide.yaml\nname: mine\nsink_size: 6\n"))
    context = replace(PRESETS["longlive"].context, local_attn_size=9, sink_size=6)
    assert (found.name, found.context) == ("mine", context)
    assert found.about.files == () and found.about.base == PRESETS["longlive"].about.base


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("local_attn_size: 9", "base"),
        ("base: longlife", "'longlive'"),
        ("base: longlive\nlocal_atn_size: 9", "'local_attn_size'"),
        ("base: longlive\nlocal_attn_size: wide", "'wide'"),
        ("base: mine.yaml", "8"),  # itself
        ("base: other.yaml", "'other.yaml'"),
        ("base: longlive\nabout: {weight: here}", "weight"),
        ("base: longlive\nabout: {weights: [1]}", "[1]"),
        ("base: longlive\nname: 3", "3"),
        ("base: longlive\n2: 3", "2"),
        ("- longlive", "base"),
    ],
)
def test_a_wrong_preset_file_is_refused(tmp_path, monkeypatch, text, value):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.yaml", text)
    with pytest.raises(UsageError, match=re.escape(value)):
        find_preset("mine.yaml")


def test_a_preset_file_without_weights_names_the_demo_model(tmp_path):
    path = write(tmp_path / "mine.yaml", "base: tinyworld\nsink_size: 2")
    assert registry.default_model(path) == "tinyworld"
    assert registry.default_model(write(tmp_path / "other.yaml", "base: krea")) == "wan-tiny"


def test_names_of_any_layer_and_of_fused_projections(tiny, tmp_path):
    """Layer numbers in another place, without dots around them, and query, key and value in one tensor."""
    _, tensors = tiny
    changes = {"blocks.*": "h_*", FUSED: "h_*.attn.qkv", "blocks.*.modulation": "h_*.table"}
    changes["head.linear"] = "out.0.proj"
    inverse = changed_table("original", changes)
    written = {}
    for name, tensor in tensors.items():
        if ".self_attn.q." in name:
            parts = [tensors[name.replace(".q.", f".{part}.")] for part in "qkv"]
            layer = name.split(".")[1]
            written[f"wrapped/h_{layer}.attn.qkv.{name.split('.')[-1]}"] = torch.cat(parts)
        elif ".self_attn.k." not in name and ".self_attn.v." not in name:
            short = re.sub(r"^blocks\.(\d+)\.", r"h_\1.", name).replace("head.head", "out.0.proj")
            written[f"wrapped/{re.sub('modulation', 'table', short) if short.startswith('h_') else short}"] = tensor
    assert inverse["blocks.*.ffn.up"] == "h_*.ffn.0"
    file = tmp_path / "mine.safetensors"
    save_file(written, file)
    names = "strip: [wrapped/]\nnames:\n" + "".join(f"  {ours}: {theirs}\n" for ours, theirs in changes.items())
    checkpoint = read_checkpoint(file, names=write(tmp_path / "names.yaml", names))
    expected = read_checkpoint(tiny[0])
    assert checkpoint.spec == expected.spec == find_spec(str(file), tmp_path / "names.yaml")
    assert checkpoint.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(tensor, checkpoint.tensors[name]) for name, tensor in expected.tensors.items())


def test_published_names_convert_as_before():
    for name in ("blocks.11.ffn.0.weight", "time_embedding.0.bias"):
        assert from_format("original", (), [name])[name] != name
    for name in ("head.modulation", "blocks.3.modulation", "other.7"):
        assert from_format("original", (), [name])[name] == name
    assert from_format("original", ("a.", "a.b."), ["a.b.head.head.bias"]) == {"a.b.head.head.bias": "head.linear.bias"}
    assert changed_table("original", {}) == ORIGINAL


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("names: {block.*.ffn.up: x}", "'blocks.*.ffn.up'"),
        ("names: {head.linear: patch_embedding}", "'patch_embedding'"),
        ("names: [head.linear]", "['head.linear']"),
        ("base: orignal", "'original'"),
        ("base: 7", "7"),
        ("container: [a]", "'containers'"),
        ("strip: model.", "'model.'"),
        ("[]", "mapping"),
    ],
)
def test_a_wrong_file_of_names_is_refused(tmp_path, text, value):
    with pytest.raises(UsageError, match=re.escape(value)):
        read_layout(write(tmp_path / "names.yaml", text))


def test_names_contradict_a_format_and_random_weights(tiny, tmp_path):
    names = write(tmp_path / "names.yaml", "base: original")
    with pytest.raises(UsageError, match=r"checkpoint_format.*'original'"):
        load(tiny[0], names=names, checkpoint_format="original", device="cpu")
    with pytest.raises(UsageError, match="names"):
        load("wan-tiny", names=names, device="cpu")


def test_an_error_shows_the_ten_names_that_are_nearest(tiny, tmp_path):
    """For a file whose layers have another name, for one without the first tensor, and for one tensor renamed."""
    folder, tensors = tiny
    other = {name.replace("patch_embedding", "patch_embed"): tensor for name, tensor in tensors.items()}
    file = tmp_path / "other.safetensors"
    save_file(other, file)
    with pytest.raises(UsageError, match=r"patch_embed\.weight") as caught:
        read_checkpoint(file)
    near = re.findall("'(.*?)'", str(caught.value).split("nearest in the file: ")[1])
    assert len(near) == 10 and set(near) <= set(other) and "patch_embed.weight" in near
    save_file({name.replace("ffn.0", "mlp.0"): tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(CheckpointError, match=r"nearest in the file: .*blocks\.0\.mlp\.0\.weight"):
        read_checkpoint(file)
    renamed = {name.replace("blocks.1.ffn.2", "blocks.1.down"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "renamed.safetensors")
    with pytest.raises(CheckpointError, match=r"nearest in the file: .*blocks\.1\.down\.weight"):
        load(folder / "renamed.safetensors", device="cpu")
    (folder / "renamed.safetensors").unlink()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Install a package with these entry points; what they registered is removed afterwards."""
    known = [(values, dict(values)) for values in (PRESETS, FORMATS, catalog.SPECS)]
    monkeypatch.syspath_prepend(tmp_path)

    def install(points, module):
        info = tmp_path / "brook_video-1.0.dist-info"
        info.mkdir()
        write(info / "METADATA", "Metadata-Version: 2.1\nName: brook-video\nVersion: 1.0\n")
        write(info / "entry_points.txt", points)
        write(tmp_path / "brook_video.py", module)

    yield install
    for values, before in known:
        values.clear()
        values.update(before)


MODULE = """
from dataclasses import replace
from inferix import PRESETS, Format
from inferix.kernels.rms_norm import SPEC as RMS
PRESET = replace(PRESETS["longlive"], window_blocks=1)
FORMAT = Format(names="original", file="brook.pt", weights=("student",))
SPEC = replace(RMS, name="brook_norm")
"""


def test_an_installed_package_adds_presets_formats_and_ops(package):
    package(
        "[inferix.presets]\nbrook = brook_video:PRESET\n[inferix.formats]\nbrook = brook_video:FORMAT\n"
        "[inferix.ops]\nbrook = brook_video:SPEC\n",
        MODULE,
    )
    registry.register_installed()
    catalog.register_installed()
    assert find_preset("brook").name == "brook"
    assert FORMATS["brook"].weights == ("student",)
    assert catalog.op_spec("brook_norm").name == "brook_norm"
    with pytest.raises(UsageError, match="'brook'"):
        registry.register_installed()
    with pytest.raises(UsageError, match="'brook_norm'"):
        catalog.register_installed()


@pytest.mark.parametrize("target", ["brook_video:MISSING", "brook_absent:PRESET", "brook_video:FORMAT"])
def test_a_broken_entry_point_names_its_package(package, target):
    package(f"[inferix.presets]\nbrook = {target}\n", MODULE)
    with pytest.raises(UsageError, match=r"'brook'.*'brook-video'"):
        list(plugins.installed("inferix.presets", Preset))
