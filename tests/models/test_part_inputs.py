"""VAEs, tiny decoders and text encoders as published: found and read, or refused with a reason."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from small_checkpoint import save, save_json

from inferix.errors import InferixError, UsageError
from inferix.models.registry import MODELS
from inferix.models.text.tiny import write_tiny_text_encoder
from inferix.models.text.umt5_checkpoint import (
    ORIGINAL_FILE,
    ORIGINAL_TOKENIZER,
    TEXT_FILES,
    TIED,
    find_text,
    load_text,
)
from inferix.models.wan.configs import diffusers_vae_config
from inferix.models.wan.random import random_tiny_decoder_state, random_vae_state
from inferix.models.wan.taehv import TinyDecoder
from inferix.models.wan.vae_checkpoint import VAE_FILES, find_vae, load_decoder, load_vae
from inferix.models.wan.vae_names import to_original
from inferix.models.wan.vae_spec import TINY_VAE

VAE = random_vae_state(TINY_VAE, 0, torch.float32)
ORIGINAL_VAE = {to_original(name, TINY_VAE): tensor for name, tensor in VAE.items()}
TAEHV = random_tiny_decoder_state(MODELS["wan-tiny"], 0, torch.float32)


def is_vae(path):
    vae = load_vae(path, None, "cpu")
    return vae.spec == TINY_VAE and all(torch.equal(tensor, VAE[name]) for name, tensor in vae.state_dict().items())


def prefixed(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("names", [VAE, ORIGINAL_VAE], ids=["diffusers", "original"])
@pytest.mark.parametrize(
    ("file", "wrap"),
    [
        ("vae.pth", lambda tensors: {"state_dict": tensors}),
        ("vae.ckpt", lambda tensors: {"model_state_dict": prefixed("module.", tensors), "step": 1}),
        ("vae.pt", lambda tensors: {"vae": tensors}),
        ("vae.safetensors", dict),
        ("a.safetensors", lambda tensors: prefixed("model.", tensors)),
        ("b.safetensors", lambda tensors: prefixed("vae.", tensors)),
        ("c.safetensors", lambda tensors: prefixed("first_stage_model.", tensors)),
    ],
)
def test_a_vae_in_any_wrapping(tmp_path, names, file, wrap):
    assert is_vae(save(wrap(names), tmp_path / file))


@pytest.mark.parametrize("name", [*VAE_FILES, *(f"vae/{name}" for name in VAE_FILES[:4])])
def test_a_vae_is_found_under_published_names(tmp_path, name):
    file = save(ORIGINAL_VAE, tmp_path / name)
    assert find_vae([tmp_path / "none", tmp_path]) == file and is_vae(file)


def test_a_vae_in_diffusers_folders(tmp_path):
    file = save(VAE, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    save({}, tmp_path / "vae" / "diffusion_pytorch_model_old.safetensors")
    save_json(diffusers_vae_config(TINY_VAE), tmp_path / "vae" / "config.json")
    assert find_vae([tmp_path]) == find_vae([tmp_path / "vae"]) == file and is_vae(file)
    assert find_vae([tmp_path / "vae" / "none"]) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("z_dim", 48), ("base_dim", 96), ("latents_mean", [0.0]), ("latents_mean", "x"), ("latents_std", [0.0] * 16),
     ("latents_std", [float("nan")] * 16), ("latents_mean", [True] * 16), ("latents_std", None)],
)  # fmt: skip
def test_a_vaes_config_must_agree(tmp_path, key, value):
    file = save(VAE, tmp_path / "vae.safetensors")
    save_json(diffusers_vae_config(TINY_VAE) | {key: value}, tmp_path / "config.json")
    with pytest.raises(UsageError, match=key):
        load_vae(file, None, "cpu")
    save_json({"_class_name": "AutoencoderKL", key: value}, tmp_path / "config.json")
    assert is_vae(file)


@pytest.mark.parametrize("tensors", [VAE, ORIGINAL_VAE, TAEHV], ids=["diffusers", "original", "taehv"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantised_decoders_are_refused(tmp_path, tensors, dtype):
    name = next(name for name in tensors if name.startswith("decoder.") and name.endswith("weight"))
    file = save(tensors | {name: tensors[name].to(getattr(torch, dtype))}, tmp_path / "vae.safetensors")
    with pytest.raises(UsageError, match=f"{name}.*{dtype}"):
        load_decoder(file, torch.float32, "cpu")
    scaled = save(tensors | {name.replace("weight", "scale_weight"): torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(UsageError, match="scale_weight"):
        load_decoder(scaled, torch.float32, "cpu")


def test_tiny_decoders(tmp_path):
    for name, content in {
        "a.pth": {"state_dict": TAEHV},
        "b.safetensors": TAEHV,
        "c.pth": prefixed("module.", TAEHV),
    }.items():
        assert isinstance(load_decoder(save(content, tmp_path / name), torch.float32, "cpu"), TinyDecoder)
    for name, shape in (("decoder.1.weight", (3,)), ("decoder.7.conv.weight", (4, 0, 1, 1)), ("decoder.22.weight", ())):
        file = save(TAEHV | {name: torch.zeros(shape)}, tmp_path / "x.pth")
        with pytest.raises(InferixError, match=r"x\.pth"):
            load_decoder(file, torch.float32, "cpu")


@pytest.mark.parametrize("content", [
    {}, {"state_dict": {}}, {"a": torch.ones(1)}, {"conv2.weight": torch.ones(2)},
    {"conv2.weight": torch.ones(16, 16, 1, 1, 1)},
    {name: tensor for name, tensor in VAE.items() if "resample" not in name},
    {name: tensor for name, tensor in VAE.items() if ".resnets.0." not in name},
    VAE | {"encoder.conv_in.weight": torch.ones(16, 0, 3, 3, 3)}, VAE | {"post_quant_conv.weight": torch.ones(0, 1)},
])  # fmt: skip
def test_files_that_are_no_decoder(tmp_path, content):
    with pytest.raises(InferixError, match=r"x\.pth"):
        load_decoder(save(content, tmp_path / "x.pth"), torch.float32, "cpu")


# text encoders


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """The same encoder in both layouts, and its rows for a prompt."""
    folder = tmp_path_factory.mktemp("text")
    for layout in ("original", "diffusers"):
        write_tiny_text_encoder(folder / layout, layout, 16, 0, torch.float32)
    return folder, rows(find_text([folder / "original"]))


def rows(paths):
    assert paths is not None
    return load_text(paths, 12, torch.float32, "cpu").encode("a cat")


def tensors_of(encoders, layout):
    if layout == "original":
        return torch.load(encoders[0] / "original" / ORIGINAL_FILE, weights_only=True)
    return load_file(encoders[0] / "diffusers" / "text_encoder" / "model.safetensors")


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize(
    ("file", "wrap"),
    [
        ("umt5-xxl-enc-bf16.safetensors", dict),
        ("encoder.pth", dict),
        ("encoder.ckpt", lambda tensors: {"state_dict": prefixed("module.", tensors)}),
        ("a.safetensors", lambda tensors: prefixed("text_encoder.", tensors)),
        ("umt5_xxl_fp16.safetensors", lambda tensors: tensors | {"spiece_model": torch.zeros(9, dtype=torch.uint8)}),
    ],
)
def test_one_file_in_either_names(encoders, tmp_path, layout, file, wrap):
    file = save(wrap(tensors_of(encoders, layout)), tmp_path / file)
    paths = find_text([file], [encoders[0] / "diffusers"])
    assert paths == (file, encoders[0] / "diffusers" / "tokenizer")
    assert torch.equal(rows(paths), encoders[1])


@pytest.mark.parametrize("name", [*TEXT_FILES, *(f"text_encoders/{name}" for name in TEXT_FILES)])
def test_published_names_in_a_base(encoders, tmp_path, name):
    (tmp_path / "google").symlink_to(encoders[0] / "original" / "google")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert find_text([tmp_path]) == (tmp_path / name, tmp_path / ORIGINAL_TOKENIZER)


def test_folders_and_shards_of_an_encoder(encoders, tmp_path):
    tensors = tensors_of(encoders, "diffusers")
    source = encoders[0] / "diffusers"
    assert torch.equal(rows(find_text([source])), encoders[1])
    assert torch.equal(rows(find_text([source / "text_encoder"], [source])), encoders[1])
    folder = tmp_path / "text_encoder"
    places = {name: f"model-{1 + number % 2:05}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save({name: tensor for name, tensor in tensors.items() if places[name] == file}, folder / file)
    save_json({"weight_map": places}, folder / "model.safetensors.index.json")
    save(
        {name: tensor * 2 for name, tensor in tensors.items()}, folder / "model.safetensors"
    )  # left by an older download
    save_json(json.loads((source / "text_encoder" / "config.json").read_text()), folder / "config.json")
    assert torch.equal(rows(find_text([tmp_path], [source])), encoders[1])


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantised_encoders_are_refused(encoders, tmp_path, layout, dtype):
    tensors = tensors_of(encoders, layout)
    name = next(name for name in tensors if ".q." in name)
    file = save(tensors | {name: tensors[name].to(getattr(torch, dtype))}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=f"{name}.*{dtype}"):
        rows(find_text([file], [encoders[0] / "diffusers"]))
    save_json(
        json.loads((encoders[0] / "diffusers" / "text_encoder" / "config.json").read_text()), tmp_path / "config.json"
    )
    with pytest.raises(UsageError, match=dtype):
        rows(find_text([tmp_path], [encoders[0] / "diffusers"]))
    scaled = save(tensors | {name.replace("weight", "scale_weight"): torch.ones(1)}, tmp_path / "scaled.safetensors")
    with pytest.raises(UsageError, match="scale_weight"):
        rows(find_text([scaled], [encoders[0] / "diffusers"]))


def test_an_embedding_under_two_names(encoders, tmp_path):
    tensors = tensors_of(encoders, "diffusers")
    places = [encoders[0] / "diffusers"]
    both = tensors | {TIED: tensors["shared.weight"].clone()}
    assert torch.equal(rows(find_text([save(both, tmp_path / "a.safetensors")], places)), encoders[1])
    other = {name: tensor for name, tensor in both.items() if name != "shared.weight"}
    assert torch.equal(rows(find_text([save(other, tmp_path / "b.safetensors")], places)), encoders[1])
    with pytest.raises(UsageError, match="shared"):
        rows(find_text([save(both | {TIED: both[TIED] * 2}, tmp_path / "c.safetensors")], places))


@pytest.mark.parametrize("change", [
    {"blocks.100000.norm1.weight": torch.zeros(2)}, {"token_embedding.weight": torch.zeros(0, 16)},
    {"blocks.0.pos_embedding.embedding.weight": torch.zeros(32, 0)}, {"blocks.0.attn.q.weight": torch.zeros(3, 16)},
    {"blocks.0.attn.q.weight": torch.tensor(1.0)}, {"norm.weight": torch.full((16,), torch.nan)},
    {"extra": torch.zeros(1)},
])  # fmt: skip
def test_encoders_that_do_not_fit(encoders, tmp_path, change):
    file = save(tensors_of(encoders, "original") | change, tmp_path / "x.pth")
    with pytest.raises(InferixError, match=r"x\.pth"):
        rows(find_text([file], [encoders[0] / "diffusers"]))


@pytest.mark.parametrize("change", [{"model_type": "t5"}, {"d_ff": 3}, {"num_layers": 10**9},
    {"feed_forward_proj": "relu"},
                                    {"num_heads": "4"}, {"layer_norm_epsilon": 1e-5}])  # fmt: skip
def test_an_encoders_config_must_agree(encoders, tmp_path, change):
    source = encoders[0] / "diffusers"
    config = json.loads((source / "text_encoder" / "config.json").read_text())
    save(tensors_of(encoders, "diffusers"), tmp_path / "text_encoder" / "model.safetensors")
    save_json(config | change, tmp_path / "text_encoder" / "config.json")
    with pytest.raises(InferixError, match=next(iter(change))):
        rows(find_text([tmp_path], [source]))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"{", b"[]", b"", b"\xff\xfe", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_broken_tokenizers(encoders, tmp_path, name, content):
    (tmp_path / "tokenizer").mkdir()
    for file in (encoders[0] / "diffusers" / "tokenizer").iterdir():
        (tmp_path / "tokenizer" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer" / name).write_bytes(content)
    with pytest.raises(InferixError, match=name):
        rows((encoders[0] / "diffusers" / "text_encoder", tmp_path / "tokenizer"))


def test_pipes_as_parts(encoders, tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(UsageError, match=r"pipe\.pth"):
        load_decoder(tmp_path / "pipe.pth", torch.float32, "cpu")
    with pytest.raises(UsageError, match=r"pipe\.pth"):
        rows(find_text([tmp_path / "pipe.pth"], [encoders[0] / "diffusers"]))
    (tmp_path / "tokenizer").mkdir()
    os.mkfifo(tmp_path / "tokenizer" / "tokenizer.json")
    with pytest.raises(InferixError, match=r"tokenizer\.json"):
        rows((encoders[0] / "diffusers" / "text_encoder", tmp_path / "tokenizer"))


def test_an_encoder_without_a_tokenizer_says_where_it_is_looked_for(encoders, tmp_path):
    file = save(tensors_of(encoders, "original"), tmp_path / "encoder.pth")
    with pytest.raises(UsageError, match="tokenizer"):
        rows(find_text([file]))
