"""The transformer against diffusers' WanTransformer3DModel, same weights, per-token timesteps."""

import dataclasses

import pytest
import torch
from diffusers import WanTransformer3DModel
from oracles import TINY, DenseAttention, tiny_transformer

from inferix.errors import UsageError
from inferix.kernels.rope import rope_angles
from inferix.models.random import random_state
from inferix.models.registry import MODELS
from inferix.models.transformer import PRECISIONS
from inferix.models.wan.names import from_format, to_format
from inferix.models.wan.transformer import WanTransformer

I2V = dataclasses.replace(TINY, in_channels=36, image_dim=24)
FLF2V = dataclasses.replace(I2V, image_tokens=10)


def diffusers_model(spec):
    return WanTransformer3DModel(
        patch_size=(1, *spec.patch), num_attention_heads=spec.num_heads, attention_head_dim=spec.head_dim,
        in_channels=spec.in_channels, out_channels=spec.out_channels, text_dim=spec.text_dim,
        freq_dim=spec.freq_dim, ffn_dim=spec.ffn_dim, num_layers=spec.num_layers, eps=spec.eps,
        image_dim=spec.image_dim, added_kv_proj_dim=spec.dim if spec.image_dim else None,
        pos_embed_seq_len=spec.image_tokens,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("spec", [TINY, I2V, FLF2V], ids=["t2v", "i2v", "flf2v"])
def test_equals_diffusers_with_a_timestep_per_token(spec):
    spec = dataclasses.replace(spec, text_len=512)  # diffusers finds the image rows by this length
    ours = tiny_transformer(spec, torch.float32, precision="diffusers")
    ours.load_state_dict(random_state(ours, 0, torch.float32))  # outputs of order 1
    theirs = diffusers_model(spec)
    theirs.load_state_dict({to_format("diffusers", k): v for k, v in ours.state_dict().items()}, strict=True)
    torch.manual_seed(1)
    frames, height, width = 3, 6, 8
    latents = torch.randn(1, frames, spec.in_channels, height, width)
    timesteps = torch.tensor([[0.0, 625.0, 937.5]])
    text = torch.randn(1, spec.text_len, spec.text_dim)
    image = torch.randn(1 if not spec.image_tokens else 2, 5, spec.image_dim) if spec.image_dim else None
    angles = rope_angles(range(frames), height // 2, width // 2, spec.head_dim)
    noisy, given = latents.split((spec.out_channels, spec.in_channels - spec.out_channels), dim=2)
    beside = ours.embed_frames(given) if spec.frame_channels else None
    cache = DenseAttention(angles, rope=torch.float32)
    got = ours(noisy, timesteps, ours.embed_text(text, image), cache, frames=beside)
    per_token = timesteps.repeat_interleave(height * width // 4, dim=1)
    want = theirs(latents.transpose(1, 2), per_token, text, image, return_dict=False)[0].transpose(1, 2)
    assert 0.5 < want.abs().max() < 10
    assert (got - want).abs().max() <= 2e-5


@pytest.mark.parametrize("spec", [TINY, I2V, FLF2V], ids=["t2v", "i2v", "flf2v"])
@pytest.mark.parametrize("form", ["original", "diffusers"])
def test_names_are_a_bijection(spec, form):
    with torch.device("meta"):
        ours = set(WanTransformer(spec).state_dict())
    theirs = {name: to_format(form, name) for name in ours}
    assert from_format(form, (), theirs.values()) == {name: ours for ours, name in theirs.items()}


def test_diffusers_names_are_those_of_diffusers():
    with torch.device("meta"):
        ours, theirs = WanTransformer(FLF2V).state_dict(), diffusers_model(FLF2V).state_dict()
    assert {to_format("diffusers", k): v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(
    ("name", "billions"), [("wan-1.3b", 1.419), ("wan-14b", 14.288), ("wan-14b-i2v", 16.4), ("wan-5b", 5.0)]
)
def test_parameter_counts(name, billions):
    with torch.device("meta"):
        count = sum(p.numel() for p in WanTransformer(MODELS[name]).parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.01 if billions != 16.4 else 0.05)


def test_reference_precision_keeps_bfloat16_everywhere():
    spec = TINY
    model = tiny_transformer(spec, torch.bfloat16)
    latents = torch.randn(1, 1, 16, 4, 4).bfloat16()
    context = model.embed_text(torch.randn(1, 12, 16).bfloat16())
    out = model(latents, torch.tensor([[625.0]]), context, DenseAttention(rope_angles([0], 2, 2, spec.head_dim)))
    e, modulation = model.time_embedding(torch.tensor([[625.0]]))
    assert {out.dtype, e.dtype, modulation.dtype} == {torch.bfloat16}


def test_modulation_is_never_narrower_than_the_model(monkeypatch):
    """In float64 a policy of float32 modulation computes what the model's own dtype does."""
    own = PRECISIONS["reference"]
    monkeypatch.setitem(PRECISIONS, "float32-modulation", dataclasses.replace(own, modulation=torch.float32))
    wide = [tiny_transformer(TINY, torch.float64, precision=name) for name in ("diffusers", "float32-modulation")]
    torch.manual_seed(0)
    latents, text = (torch.randn(shape, dtype=torch.float64) for shape in ((1, 1, 16, 4, 4), (1, 12, 16)))
    timesteps, angles = torch.tensor([[625.0]]), rope_angles([0], 2, 2, TINY.head_dim)
    assert wide[0].time_embedding(timesteps)[1].dtype is torch.float64
    results = [
        model(latents, timesteps, model.embed_text(text), DenseAttention(angles))
        for model in (tiny_transformer(TINY, torch.float64), wide[1])
    ]
    assert torch.equal(*results)


def test_sizes_name_the_nearest():
    with pytest.raises(UsageError, match=r"833x481.*832x480.*848x496"):
        MODELS["wan-1.3b"].latent_size((833, 481))
    assert MODELS["wan-1.3b"].tokens_per_frame((832, 480)) == 1560
    assert MODELS["wan-5b"].tokens_per_frame((1280, 704)) == 880


def test_random_weights_beyond_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr("inferix.models.random.host_memory", lambda: 1000)
    with pytest.raises(UsageError, match=r"GB.*inferix plan"):
        random_state(WanTransformer(TINY), 0, torch.float32)
