"""The VAE against diffusers' AutoencoderKLWan, and streams in any split against the whole clip."""

import dataclasses

import pytest
import torch
from diffusers import AutoencoderKLWan
from oracles import randomise

from inferix.models.wan.vae import TINY_VAE, TINY_VAE22, WAN21_VAE, WAN22_VAE, CausalVae, VaeSpec
from inferix.models.wan.vae_names import to_original, vae_spec_from_shapes

SMALL = dataclasses.replace(WAN21_VAE, base_channels=8, decoder_channels=8)
SMALL22 = dataclasses.replace(WAN22_VAE, base_channels=8, decoder_channels=16)


def make(spec: VaeSpec = SMALL) -> CausalVae:
    return randomise(CausalVae(spec), scale=0.15).eval().requires_grad_(False)


def diffusers_vae(spec: VaeSpec) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=spec.base_channels, z_dim=spec.z_dim, dim_mult=list(spec.multipliers),
        num_res_blocks=spec.num_res_blocks, temperal_downsample=list(spec.temporal_down),
        latents_mean=list(spec.mean), latents_std=list(spec.std), decoder_base_dim=spec.decoder_channels,
        in_channels=spec.picture_channels, out_channels=spec.picture_channels, is_residual=spec.shortcuts,
        patch_size=None if spec.patch == 1 else spec.patch,
    ).eval()  # fmt: skip


def channels(values):
    return torch.tensor(values)[None, :, None, None, None]


@pytest.mark.parametrize("spec", [SMALL, TINY_VAE, SMALL22, TINY_VAE22], ids=["2.1", "tiny", "2.2", "tiny-2.2"])
@torch.no_grad()
def test_equals_diffusers(spec):
    ours, theirs = make(spec), diffusers_vae(spec)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.manual_seed(0)
    pixels = torch.rand(9, 3, 64, 32) * 2 - 1
    clip = pixels.transpose(0, 1)[None]
    mu = theirs.encode(clip).latent_dist.mode()
    want = ((mu - channels(spec.mean)) / channels(spec.std))[0].transpose(0, 1)
    latents = ours.encode(pixels, ours.new_state())
    assert latents.std() > 0.05
    assert (latents - want).abs().max() <= 1e-5
    z = torch.randn(1, spec.z_dim, 4, 4, 3) * 0.5
    want = theirs.decode(z * channels(spec.std) + channels(spec.mean), return_dict=False)[0][0].transpose(0, 1)
    got = ours.decode(z[0].transpose(0, 1), ours.new_state())
    assert got.shape == want.shape == (13, 3, 4 * spec.spatial_stride, 3 * spec.spatial_stride)
    assert got.std() > 0.01 and (got.abs() < 1).any()
    assert (got - want).abs().max() <= 1e-5


@pytest.mark.parametrize("spec", [SMALL, SMALL22], ids=["2.1", "2.2"])
@pytest.mark.parametrize("splits", [[1] * 6, [3, 3], [2, 1, 3], [5, 1]])
@torch.no_grad()
def test_decoding_in_any_split_equals_the_whole_clip(spec, splits):
    vae = make(spec)
    latents = torch.randn(6, spec.z_dim, 4, 4)
    whole = vae.decode(latents, vae.new_state())
    state = vae.new_state()
    parts = torch.cat([vae.decode(part, state) for part in latents.split(splits)])
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("spec", [SMALL, SMALL22], ids=["2.1", "2.2"])
@pytest.mark.parametrize("splits", [[1, 4, 4, 4], [5, 8], [9, 4]])
@torch.no_grad()
def test_encoding_in_any_split_equals_the_whole_clip(spec, splits):
    vae = make(spec)
    pixels = torch.rand(13, 3, 32, 32) * 2 - 1
    whole = vae.encode(pixels, vae.new_state())
    state = vae.new_state()
    assert torch.equal(torch.cat([vae.encode(part, state) for part in pixels.split(splits)]), whole)


@torch.no_grad()
def test_21_latent_frames_are_81_frames():
    vae = make(TINY_VAE)
    assert len(vae.decode(torch.randn(21, 16, 2, 2), vae.new_state())) == 81


@torch.no_grad()
def test_a_cloned_state_goes_on_by_itself():
    vae = make()
    state = vae.new_state()
    vae.decode(torch.randn(2, 16, 2, 2), state)
    fork, rest = state.clone(), torch.randn(2, 16, 2, 2)
    vae.decode(torch.randn(1, 16, 2, 2), fork)
    untouched = state.clone()
    assert torch.equal(vae.decode(rest, state), vae.decode(rest, untouched))
    assert not torch.equal(vae.decode(rest, fork), vae.decode(rest, state))
    assert state.nbytes > 0


@pytest.mark.parametrize("count", [0, 2, 4, 8])
def test_encode_refuses_other_lengths(count):
    vae = make(TINY_VAE)
    with pytest.raises(ValueError, match=str(count)):
        vae.encode(torch.zeros(count, 3, 16, 16), vae.new_state())


@pytest.mark.parametrize("spec", [SMALL, TINY_VAE, WAN21_VAE, SMALL22, TINY_VAE22, WAN22_VAE])
def test_original_names_and_sizes(spec):
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in CausalVae(spec).state_dict().items()}
    original = {to_original(name, spec): shape for name, shape in shapes.items()}
    assert len(original) == len(shapes)
    assert vae_spec_from_shapes(original) == spec
    assert vae_spec_from_shapes(shapes) == spec
    if spec is WAN22_VAE:
        for name in (
            "encoder.downsamples.0.downsamples.2.resample.1.weight",
            "encoder.downsamples.3.downsamples.1.residual.6.bias",
            "decoder.upsamples.0.upsamples.3.time_conv.weight", "decoder.upsamples.2.upsamples.0.shortcut.weight",
        ):  # fmt: skip
            assert name in original
    if spec is WAN21_VAE:
        assert len(original) == 194
        for name in (
            "encoder.conv1.weight", "encoder.downsamples.0.residual.6.bias", "encoder.middle.1.to_qkv.weight",
            "encoder.downsamples.3.shortcut.weight", "encoder.head.0.gamma", "conv1.bias", "conv2.weight",
            "decoder.upsamples.3.time_conv.weight", "decoder.upsamples.3.resample.1.weight",
            "decoder.upsamples.14.residual.0.gamma", "decoder.middle.2.residual.2.weight", "decoder.head.2.bias",
        ):  # fmt: skip
            assert name in original
