"""Scorers with published weights: small random weights in the published layouts against the library's own pipeline,
missing and wrong files, and the adapters to packages that are not installed, against stand-ins of their networks."""

import hashlib
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from inferix.errors import CheckpointError, InferixError, UsageError
from inferix.evaluate import learned_scorers as learned
from inferix.evaluate.external_scorers import AmtRebuild, MusiqSpaq, RaftMoving
from inferix.evaluate.metrics import LEARNED, chosen_scorers
from inferix.evaluate.scorers import View
from inferix.evaluate.video_drift import drift, linked_views

SIDE, WIDTH = 32, 24
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def frames(count, height=40, width=52):
    generator = np.random.default_rng(1)
    coarse = generator.integers(0, 256, (count, 5, 6, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(part).resize((width, height), Image.Resampling.BICUBIC)) for part in coarse]


def views(pictures, fps=8.0):
    return list(linked_views(pictures, fps, frozenset()))


def write_clip(folder, weights):
    torch.manual_seed(len(folder.name))
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**layers, "image_size": SIDE, "patch_size": 8, "projection_dim": WIDTH},
        text_config={**layers, "vocab_size": 9, "projection_dim": WIDTH, "eos_token_id": 8, "bos_token_id": 7},
        projection_dim=WIDTH,
    )
    write(CLIPModel(config), folder, weights, "vision_model.encoder.layers.1.self_attn.q_proj.weight")


def write_dino(folder, weights):
    torch.manual_seed(7)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8
    )
    write(ViTModel(config), folder, weights, "encoder.layer.1.attention.attention.query.weight")


def write(model, folder, weights, published_name):
    """Save a model with the names that the published file has."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    assert published_name in tensors
    if weights.endswith(".bin"):
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_clip(folder / "clip-vit-large-patch14", "model.safetensors")
    write_clip(folder / "clip-vit-base-patch32", "pytorch_model.bin")
    write_dino(folder / "dino-vitb16", "pytorch_model.bin")
    torch.save({"weight": torch.randn(1, WIDTH), "bias": torch.tensor([5.0])}, folder / "sa_0_4_vit_l_14_linear.pth")
    return folder


@pytest.fixture
def manifest(folder, monkeypatch):
    """The manifest with the sizes and hashes of the small files."""
    for name, recipe in learned.LEARNED.items():
        files = tuple(
            replace(file, bytes=path.stat().st_size, sha256=digest(path)) if path.exists() else file
            for file in recipe.files for path in [folder / file.path]
        )  # fmt: skip
        monkeypatch.setitem(learned.LEARNED, name, replace(recipe, files=files))


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def resized(frame, kind):
    """A frame with its short side at SIDE, float in 0..1 [h, w, 3]."""
    height, width = frame.shape[:2]
    short = min(height, width)
    size = int(width * SIDE / short), int(height * SIDE / short)
    return np.asarray(Image.fromarray(frame).resize(size, kind)) / 255


def batched(pictures, mean, std):
    normal = [(picture - np.array(mean)) / np.array(std) for picture in pictures]
    return torch.from_numpy(np.stack(normal)).permute(0, 3, 1, 2).float()


def clip_features(path, pictures):
    """Image features by preparation written out, and by the library's whole model."""
    middles = []
    for frame in pictures:
        picture = resized(frame, Image.Resampling.BICUBIC)
        top, left = (picture.shape[0] - SIDE) // 2, (picture.shape[1] - SIDE) // 2
        middles.append(picture[top : top + SIDE, left : left + SIDE])
    model = CLIPModel.from_pretrained(path).eval()
    with torch.no_grad():
        vision = model.vision_model(batched(middles, CLIP_MEAN, CLIP_STD)).pooler_output
        return model.visual_projection(vision)


def test_clip_features_are_those_of_the_librarys_model(folder, manifest):
    pictures = frames(3)
    scorer = learned.learned_scorer("clip_b32", folder, "cpu")
    expected = clip_features(folder / "clip-vit-base-patch32", pictures)
    assert np.abs(scorer.score(views(pictures)) - expected.numpy()).max() < 1e-5
    assert scorer.weights == digest(folder / "clip-vit-base-patch32" / "pytorch_model.bin")


def test_the_aesthetic_score_is_a_linear_head_on_normalised_features(folder, manifest):
    pictures = frames(3)
    features = clip_features(folder / "clip-vit-large-patch14", pictures)
    head = torch.load(folder / "sa_0_4_vit_l_14_linear.pth")
    expected = (features / features.norm(dim=-1, keepdim=True) @ head["weight"][0] + head["bias"]) / 10
    scorer = learned.learned_scorer("clip_l14_aesthetic", folder, "cpu")
    assert np.abs(scorer.score(views(pictures)) - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("size", [(40, 40), (40, 52)])
def test_dino_features_are_those_of_the_librarys_model(folder, manifest, size):
    pictures = frames(2, *size)
    prepared = batched([resized(frame, Image.Resampling.BILINEAR) for frame in pictures],
                       learned.IMAGENET_MEAN, learned.IMAGENET_STD)  # fmt: skip
    tensors = torch.load(folder / "dino-vitb16" / "pytorch_model.bin")
    save_file(tensors, folder / "dino-vitb16" / "model.safetensors")
    model = ViTModel.from_pretrained(folder / "dino-vitb16").eval()
    with torch.no_grad():
        expected = model(prepared, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    features = learned.learned_scorer("dino_b16", folder, "cpu").score(views(pictures))
    assert np.abs(features - expected.numpy()).max() < 1e-5


def test_a_folder_with_weights_adds_its_metrics(folder, manifest):
    names = [scorer.name for scorer in chosen_scorers(None, folder)]
    assert names[-3:] == ["clip_l14_aesthetic", "clip_b32", "dino_b16"] and "sharpness" in names
    video = drift(frames(8), 8, [scorer for scorer in chosen_scorers(["dino_b16"], folder)], segments=2)
    assert video.metrics["dino_b16"].error is None and len(video.metrics["dino_b16"].scores) == 2


def test_every_learned_metric_has_a_recipe():
    assert tuple(learned.LEARNED) == LEARNED


@pytest.mark.parametrize("name", LEARNED)
def test_missing_weights_say_which_file_where_and_its_hash(name, tmp_path, monkeypatch):
    monkeypatch.setattr("inferix.evaluate.learned_scorers.find_spec", lambda package: object())
    file = learned.LEARNED[name].files[-1]
    for other in learned.LEARNED[name].files[:-1]:
        (tmp_path / other.path).parent.mkdir(exist_ok=True)
        (tmp_path / other.path).write_text("{}")
    with pytest.raises(UsageError) as caught:
        chosen_scorers([name], tmp_path)
    assert all(part in str(caught.value) for part in (name, file.path, file.url, file.sha256))
    with pytest.raises(UsageError, match=file.path):
        chosen_scorers([name])


@pytest.mark.parametrize("name", ["musiq_spaq", "raft_moving_share"])
def test_a_missing_package_is_named(name, tmp_path):
    with pytest.raises(UsageError, match=learned.LEARNED[name].package):
        chosen_scorers([name], tmp_path)


def test_other_weights_than_the_published_ones_are_refused(folder, tmp_path):
    with pytest.raises(UsageError, match=r"clip-vit-base-patch32.*a63082132ba4f97a"):
        learned.learned_scorer("clip_b32", folder, "cpu")
    with pytest.raises(UsageError, match="no folder"):
        chosen_scorers(None, tmp_path / "gone")


def test_weights_that_do_not_fit_their_config_are_refused(folder, tmp_path):
    place = tmp_path / "dino-vitb16"
    place.mkdir()
    (place / "config.json").write_bytes((folder / "dino-vitb16" / "config.json").read_bytes())
    tensors = torch.load(folder / "dino-vitb16" / "pytorch_model.bin")
    torch.save({name: tensor for name, tensor in tensors.items() if "layer.1" not in name}, place / "weights.bin")
    with pytest.raises(CheckpointError, match=r"missing.*layers\.1"):
        learned.dino_network(place, "weights.bin", "cpu")
    (place / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match=r"config\.json"):
        learned.dino_network(place, "weights.bin", "cpu")


class Recorded(torch.nn.Module):
    """A stand-in for a network of another package: it records its inputs and returns what it was made with."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.calls = answer, []

    def forward(self, *inputs, **settings):
        self.calls.append((inputs, settings))
        return self.answer(*inputs)


def test_musiq_takes_pictures_in_0_to_1_of_at_most_512_pixels(monkeypatch, tmp_path):
    network = Recorded(lambda x: x.mean((1, 2, 3))[:, None] * 100)
    module = ModuleType("pyiqa.archs.musiq_arch")
    module.MUSIQ = lambda pretrained_model_path: network
    for name in ("pyiqa", "pyiqa.archs"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "pyiqa.archs.musiq_arch", module)
    scorer = MusiqSpaq.load(tmp_path, "0" * 64, "cpu")
    grey = np.full((60, 1024, 3), 51, np.uint8)
    assert scorer.score(views([grey, grey])) == pytest.approx([20, 20])
    ((pixels,), _) = network.calls[0]
    assert pixels.shape == (2, 3, 30, 512) and pixels.dtype == torch.float32
    network.answer = lambda x: x.mean((1, 2, 3))
    with pytest.raises(InferixError, match=r"MUSIQ.*\[2\].*\[2, 1\]"):
        scorer.score(views([grey, grey]))


def test_raft_takes_padded_pairs_in_0_to_255_and_its_flow_is_compared_with_the_threshold():
    network = Recorded(None)
    scorer = RaftMoving("raft_moving_share", "pair", "", "", network, "cpu")
    pair = views(frames(2, 20, 30), fps=8.0)[1:]
    limit = 6 / 256 * 20 / 2**0.5
    for speed, moving in ((0.9 * limit, 0.0), (1.1 * limit, 1.0)):
        network.answer = lambda one, other, speed=speed: (None, torch.full((1, 2, *one.shape[-2:]), speed))
        assert scorer.score(pair) == [moving]
    inputs, settings = network.calls[0]
    assert [tuple(part.shape) for part in inputs] == [(1, 3, 24, 32)] * 2
    assert settings == {"iters": 20, "test_mode": True}
    assert torch.equal(inputs[1][0, :, 2:22, 1:31].permute(1, 2, 0).byte(), torch.from_numpy(pair[0].frame.copy()))
    network.answer = lambda one, other: torch.zeros(1, 2, 3, 4)
    with pytest.raises(InferixError, match=r"RAFT.*\[1, 2, 3, 4\]"):
        scorer.score(pair)


def test_amt_rebuilds_every_second_frame_from_its_neighbours():
    network = Recorded(lambda one, other, half: {"imgt_pred": (one + other) * half})
    scorer = AmtRebuild("amt_s_rebuild", "pair", "", "", network, "cpu", partial=True)
    levels = [0, 30, 100, 200, 200]
    pictures = [np.full((20, 30, 3), level, np.uint8) for level in levels]
    scores = scorer.score(views(pictures)[1:])
    assert np.isnan(scores[[0, 2]]).all()
    assert scores[[1, 3]] == pytest.approx([1 - 20 / 255, 1 - 50 / 255])
    assert all(tuple(part.shape) == (1, 3, 32, 32) for part in network.calls[0][0][:2])
    network.answer = lambda one, other, half: {"imgt_pred": one / 0}
    with pytest.raises(InferixError, match="not finite"):
        scorer.score(views(pictures)[1:])


def test_a_package_of_another_version_is_refused(monkeypatch, tmp_path):
    for name in ("pyiqa", "pyiqa.archs", "pyiqa.archs.musiq_arch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(InferixError, match="MUSIQ"):
        MusiqSpaq.load(tmp_path, "", "cpu")


def test_views_of_pairs_keep_two_frames_back():
    chained = views(frames(3))
    assert isinstance(chained[2].previous.previous, View)
