"""Checkpoints of models with a camera, in each layout they are published in."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from inferix import load
from inferix.errors import CheckpointError, UsageError
from inferix.export.checkpoint import convert, write_random
from inferix.export.targets import TARGETS, check_target
from inferix.models.registry import MODELS, default_model, default_preset, inspect, make_preset, read_checkpoint
from inferix.schemes.camera import Camera

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_random("lingbot-tiny", "lingbot", tmp_path_factory.mktemp("lingbot") / "v2", seed=1)


@pytest.fixture(scope="module")
def tensors(published):
    return load_file(published / "transformers" / FILE)


def test_the_published_folder_and_its_names(published, tensors):
    facts = inspect(published)
    assert (facts["format"], facts["model"], facts["in_channels"]) == ("lingbot", "lingbot-tiny", 36)
    assert facts["vae"].endswith("Wan2.1_VAE.pth") and "umt5" in facts["text_encoder"]
    dim, layers = MODELS["lingbot-tiny"].dim, MODELS["lingbot-tiny"].num_layers
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert shapes["patch_embedding.weight"] == [dim, 36, 1, 2, 2]
    assert shapes["patch_embedding_wancamctrl.weight"] == [dim, 1536]
    linears = ["c2ws_hidden_states_layer1", "c2ws_hidden_states_layer2"] + [
        f"blocks.{layer}.{name}"
        for layer in range(layers)
        for name in ("cam_injector_layer1", "cam_injector_layer2", "cam_scale_layer", "cam_shift_layer")
    ]
    assert all(shapes[f"{name}.weight"] == [dim, dim] and shapes[f"{name}.bias"] == [dim] for name in linears)
    assert not any("img" in name for name in tensors)


def test_shards_at_the_root_without_a_config(published, tensors, tmp_path):
    """Sizes come from shapes; the width of heads is that of all published models."""
    names = sorted(tensors)
    parts = {f"model-0000{number + 1}-of-00002.safetensors": names[number::2] for number in range(2)}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.form, checkpoint.spec) == ("lingbot", MODELS["lingbot-tiny"])
    with pytest.raises(UsageError, match="base"):  # text encoder and VAE are elsewhere
        load(tmp_path, preset="lingbot-v2", device="cpu")
    engine = load(tmp_path, base=published, preset="lingbot-v2", device="cpu")
    image = np.zeros((32, 32, 3), np.uint8)
    with engine.open(prompt="a canal", image=image, camera=Camera(), size=(32, 32)) as session:
        assert session.current.rows.any() and session.size == (32, 32)


@pytest.mark.parametrize("target", TARGETS)
def test_export_targets_refuse_worlds_with_a_camera(target):
    with pytest.raises(UsageError, match=f"{target}.*channels of frames"):
        check_target(TARGETS[target], make_preset("lingbot-v2"), "float32", False)


@pytest.mark.parametrize("form", ["original", "diffusers"])
def test_conversion_keeps_the_published_names(published, tensors, form, tmp_path):
    convert(published, tmp_path / "out", form)
    folder = tmp_path / "out" / ("transformer" if form == "diffusers" else "")
    converted = load_file(folder / FILE)
    assert converted.keys() == tensors.keys() and all(torch.equal(converted[name], tensors[name]) for name in tensors)
    assert read_checkpoint(tmp_path / "out").spec == MODELS["lingbot-tiny"]
    if form == "diffusers":
        index = json.loads((tmp_path / "out" / "model_index.json").read_text())
        assert index["_class_name"] == "LingBotWorldCausalDMDPipeline"


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (lambda t: t.pop("blocks.1.cam_scale_layer.weight"), CheckpointError, r"blocks\.1\.cam_scale_layer\.weight"),
        (lambda t: t.update({"patch_embedding_wancamctrl.weight": torch.zeros(256, 1792)}), UsageError, "1792"),
        (lambda t: t.update({"patch_embedding_wancamctrl.weight": torch.zeros(256, 12)}), UsageError, "12"),
    ],
    ids=["missing", "actions", "other"],
)
def test_files_that_are_no_model_with_a_camera(tensors, change, error, named, tmp_path):
    changed = dict(tensors)
    change(changed)
    save_file(changed, tmp_path / FILE)
    with pytest.raises(error, match=named):
        read_checkpoint(tmp_path)


def test_presets_that_do_not_suit_a_model(published):
    assert default_preset("lingbot-1.3b") == "lingbot-v2-1.3b" and default_model("lingbot-v1") == "lingbot-tiny"
    for model, preset in ((published, "self-forcing"), ("wan-tiny", "lingbot-v2"), ("lingbot-tiny", "longlive")):
        with pytest.raises(UsageError, match=preset):
            load(model, preset=preset, device="cpu")
    with pytest.raises(UsageError, match="vae"):
        load("lingbot-tiny", device="cpu", vae="taehv")


def test_precision_is_the_presets_unless_it_is_given():
    assert load("lingbot-tiny", device="cpu").config.precision == "wide"
    assert load("lingbot-tiny", device="cpu", precision="diffusers").config.precision == "diffusers"
