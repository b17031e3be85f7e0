"""Checkpoints of models with a camera, in each layout they are published in."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from inferix import InjectedNoise, load
from inferix.errors import CheckpointError, InferixError, UsageError
from inferix.export.checkpoint import convert, write_random
from inferix.export.targets import TARGETS, check_target
from inferix.kernels.philox import philox_normals
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
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "Wan2.1_VAE.pth").write_bytes((published / "Wan2.1_VAE.pth").read_bytes())
    with pytest.raises(InferixError, match="text encoder"):  # which the base does not have
        load(tmp_path, base=tmp_path / "base", preset="lingbot-v2", device="cpu").open(
            "a canal", image=np.zeros((32, 32, 3), np.uint8), camera=Camera(), size=(32, 32)
        )
    engine = load(tmp_path, base=published, preset="lingbot-v2", device="cpu")
    image = np.zeros((32, 32, 3), np.uint8)
    with engine.open(prompt="a canal", image=image, camera=Camera(), size=(32, 32)) as session:
        assert session.current.rows.any() and session.size == (32, 32)


def test_a_recording_with_its_own_size_noise_and_embeddings_is_made_again(published, tensors, tmp_path):
    """Published names, sizes of the tensors, injected noise and prompt rows give the latents of the seed's stream."""
    layer = {name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.1.")}
    save_file(layer, tmp_path / FILE)
    engine = load(tmp_path, preset="lingbot-v2", base=published, device="cpu", dtype="float64", num_frame_per_block=1)
    assert engine.spec.num_layers == 1 and engine.spec.name != "lingbot-tiny"
    opening = {
        "prompt_embeds": torch.randn(7, engine.spec.text_dim, generator=torch.Generator().manual_seed(2)),
        "image": np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8), "size": (32, 32),
        "camera": Camera(poses=np.eye(4)[None].repeat(8, 0), rate="latent"),
    }  # fmt: skip
    shape, steps = (16, 4, 4), 4
    draws = [
        torch.stack([philox_normals(5, range(block, block + 1), draw, shape) for draw in range(steps)])
        for block in range(2)
    ]
    noise = InjectedNoise(torch.cat([one[0] for one in draws]), torch.stack([one[1:] for one in draws]))
    streams = []
    for given in ({"noise": noise}, {"seed": 5}):
        with engine.open(**opening, **given) as session:
            streams.append(torch.cat([block.latents for block in session.stream(2, decode=False)]))
    assert torch.equal(*streams) and streams[0].isfinite().all()


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
