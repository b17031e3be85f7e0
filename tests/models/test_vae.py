"""The VAE against diffusers' AutoencoderKLWan, streams in any split against the whole clip, and a CPU's layers."""

import copy
import dataclasses

import pytest
import torch
from diffusers import AutoencoderKLWan
from oracles import randomise

from inferix.graphs.shards import Axis
from inferix.models.decoder import StreamState
from inferix.models.wan import vae_cpu
from inferix.models.wan.family import WAN
from inferix.models.wan.vae import CausalVae
from inferix.models.wan.vae_cpu import use_cpu_layers
from inferix.models.wan.vae_gpu import InputBuffer, as_clip, use_gpu_layers, with_gpu_layers
from inferix.models.wan.vae_names import to_original, vae_spec_from_shapes
from inferix.models.wan.vae_spec import TINY_VAE, TINY_VAE22, WAN21_VAE, WAN22_VAE, VaeSpec

SMALL = dataclasses.replace(WAN21_VAE, base_channels=8, decoder_channels=8)
SMALL22 = dataclasses.replace(WAN22_VAE, base_channels=8, decoder_channels=16)


def make(spec: VaeSpec = SMALL) -> CausalVae:
    return randomise(CausalVae(spec), scale=0.15).eval().requires_grad_(False)


def as_is(vae: CausalVae) -> CausalVae:
    return vae


both_layers = pytest.mark.parametrize("layers", [as_is, use_cpu_layers], ids=["plain", "cpu"])
all_layers = pytest.mark.parametrize("layers", [as_is, use_cpu_layers, with_gpu_layers], ids=["plain", "cpu", "gpu"])
fast_layers = pytest.mark.parametrize("layers", [use_cpu_layers, with_gpu_layers], ids=["cpu", "gpu"])
SPECS = pytest.mark.parametrize("spec", [SMALL, SMALL22], ids=["2.1", "2.2"])


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


@both_layers
@pytest.mark.parametrize("spec", [SMALL, TINY_VAE, SMALL22, TINY_VAE22], ids=["2.1", "tiny", "2.2", "tiny-2.2"])
@torch.no_grad()
def test_equals_diffusers(spec, layers):
    ours, theirs = layers(make(spec)), diffusers_vae(spec)
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


@all_layers
@SPECS
@torch.no_grad()
def test_decoding_in_any_split_equals_the_whole_clip(spec, layers):
    vae = layers(make(spec))
    latents = torch.randn(6, spec.z_dim, 3, 2)
    whole = vae.decode(latents, vae.new_state())
    for splits in ([1] * 6, [3, 3], [2, 1, 3], [5, 1]):
        state = vae.new_state()
        assert torch.equal(torch.cat([vae.decode(part, state) for part in latents.split(splits)]), whole), splits


@all_layers
@SPECS
@torch.no_grad()
def test_encoding_in_any_split_equals_the_whole_clip(spec, layers):
    vae = layers(make(spec))
    pixels = torch.rand(13, 3, 48, 32) * 2 - 1
    whole = vae.encode(pixels, vae.new_state())
    for splits in ([1, 4, 4, 4], [5, 8], [9, 4]):
        state = vae.new_state()
        assert torch.equal(torch.cat([vae.encode(part, state) for part in pixels.split(splits)]), whole), splits


def plain_and_fast(spec: VaeSpec, dtype: torch.dtype, layers=use_cpu_layers) -> tuple[CausalVae, CausalVae]:
    plain = make(spec).to(dtype)
    return plain, layers(copy.deepcopy(plain))


@SPECS
@fast_layers
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"])
@torch.no_grad()
def test_fast_layers_equal_the_plain_ones(spec, layers, dtype, tolerance):
    plain, fast = plain_and_fast(spec, dtype, layers)
    pixels, latents = torch.rand(9, 3, 32, 64, dtype=dtype) * 2 - 1, torch.randn(3, spec.z_dim, 4, 3, dtype=dtype)
    codes = [vae.encode(pixels, vae.new_state()) for vae in (plain, fast)]
    pictures = [vae.decode(latents, vae.new_state()) for vae in (plain, fast)]
    assert codes[0].std() > 0.05 and pictures[0].std() > 0.01
    assert (codes[1] - codes[0]).abs().max() <= tolerance
    assert (pictures[1] - pictures[0]).abs().max() <= tolerance
    levels = [((picture * 0.5 + 0.5) * 255).round() for picture in pictures]
    assert (levels[1] - levels[0]).abs().max() <= 1


@SPECS
@fast_layers
@torch.no_grad()
def test_fast_layers_in_bfloat16_are_as_near_to_float32_as_the_plain_ones(spec, layers):
    exact = make(spec)
    latents = torch.randn(2, spec.z_dim, 4, 3).bfloat16()
    want = exact.decode(latents.float(), exact.new_state())
    errors = []
    for vae in plain_and_fast(spec, torch.bfloat16, layers):
        state = vae.new_state()
        got = vae.decode(latents, state)
        assert got.dtype is torch.bfloat16
        assert all(history.dtype is torch.bfloat16 for history in state.history.values())
        errors.append((got.float() - want).square().mean().sqrt())
    assert 0 < errors[1] <= 1.1 * errors[0]


@SPECS
@fast_layers
@torch.no_grad()
def test_states_of_plain_and_fast_layers_are_exchanged(spec, layers):
    """Slots, shapes and values; a history from a file is contiguous, and gives the same bits."""
    plain, fast = plain_and_fast(spec, torch.float64, layers)
    latents, rest = torch.randn(2, 2, spec.z_dim, 4, 4, dtype=torch.float64)
    states = [vae.new_state() for vae in (plain, fast)]
    for vae, state in zip((plain, fast), states, strict=True):
        vae.decode(latents, state)
    assert states[0].history.keys() == states[1].history.keys()
    for slot, history in states[0].history.items():
        assert states[1].history[slot].shape == history.shape
        assert (states[1].history[slot] - history).abs().max() <= 1e-10
        assert states[1].history[slot].untyped_storage().nbytes() == history.nbytes  # no view of a larger tensor
    saved = StreamState({slot: tensor.contiguous() for slot, tensor in states[1].history.items()}, states[1].frames)
    want = fast.decode(rest, states[1].clone())
    assert torch.equal(fast.decode(rest, saved), want)
    assert (fast.decode(rest, states[0].clone()) - want).abs().max() <= 1e-10
    assert (plain.decode(rest, states[1]) - want).abs().max() <= 1e-10


@SPECS
@torch.no_grad()
def test_frames_convolved_one_by_one_equal_those_of_one_stack(spec, monkeypatch):
    vae = use_cpu_layers(make(spec).double())
    pixels, latents = torch.rand(5, 3, 32, 32).double(), torch.randn(3, spec.z_dim, 4, 4).double()
    want = vae.encode(pixels, vae.new_state()), vae.decode(latents, vae.new_state())
    monkeypatch.setattr(vae_cpu, "STACK_BYTES", 1)
    assert (vae.encode(pixels, vae.new_state()) - want[0]).abs().max() <= 1e-10
    assert (vae.decode(latents, vae.new_state()) - want[1]).abs().max() <= 1e-10


@pytest.mark.parametrize("spec", [SMALL], ids=["2.1"])
def test_gradients_of_cpu_layers_equal_the_plain_ones(spec):
    gradients = []
    latents = torch.randn(2, spec.z_dim, 4, 4, dtype=torch.float64)
    for vae in plain_and_fast(spec, torch.float64):
        vae.requires_grad_(True).decode(latents, vae.new_state()).square().sum().backward()
        gradients.append({name: weight.grad for name, weight in vae.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() <= 1e-10 * max(1, gradient.abs().max()), name


def test_cpu_layers_keep_names_values_and_other_devices():
    vae = make(SMALL)
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    after = use_cpu_layers(vae).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    with torch.device("meta"):
        elsewhere = CausalVae(SMALL)
    classes = [type(layer) for layer in elsewhere.modules()]
    assert [type(layer) for layer in use_cpu_layers(elsewhere).modules()] == classes


@torch.no_grad()
def test_gpu_layers_start_from_zero_caches_as_the_plain_ones():
    plain, fast = plain_and_fast(SMALL, torch.float64, with_gpu_layers)
    latents = torch.randn(2, SMALL.z_dim, 4, 3, dtype=torch.float64)
    plain_state, fast_state = StreamState({}, 1), StreamState({}, 1)
    want = plain.decode(latents, plain_state)
    assert len(want) == 8
    assert (fast.decode(latents, fast_state) - want).abs().max() <= 1e-10


def test_gpu_layers_keep_names_and_values_and_are_for_a_gpu():
    vae = make(SMALL)
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    assert type(use_gpu_layers(vae)) is CausalVae
    fast = with_gpu_layers(vae)
    assert type(fast) is not CausalVae and fast.name == CausalVae.name
    assert list(fast.state_dict()) == list(before)
    assert all(torch.equal(fast.state_dict()[name], weight) for name, weight in before.items())


@torch.no_grad()
def test_ranks_that_decode_columns_take_the_plain_layers():
    fast = with_gpu_layers(make(SMALL).double())
    columns = WAN.column_decoder(fast, Axis()).inner
    assert type(columns) is CausalVae and type(fast) is not CausalVae
    assert columns.post_quant_conv.weight is fast.post_quant_conv.weight
    own, shared = ({tensor.data_ptr() for tensor in memory_of(model)} for model in (columns, fast))
    assert own == shared and len(shared) > len(dict(fast.named_parameters()))  # with what was derived of the weights


def memory_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Weights of a model, and all other tensors that its layers hold."""
    held = [value for layer in model.modules() for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return [*model.parameters(), *model.buffers(), *held]


def test_windows_of_an_input_buffer_are_channels_last_and_share_their_past():
    """A layout that cuDNN takes as it is; the last frames of one window are the first of the next."""
    history = torch.randn(1, 8, 2, 3, 5)
    buffer = InputBuffer(torch.empty(4, 3, 5, 8), 2, [4, 4], history)
    for number, place in enumerate(buffer.places()):
        place.fill_(number + 1.0)
    one, two = (as_clip(window) for window in buffer.windows())
    assert one.shape == two.shape == (1, 8, 6, 3, 5)
    assert all(window.is_contiguous(memory_format=torch.channels_last_3d) for window in (one, two))
    assert torch.equal(one[:, :, :2], history) and torch.equal(two[:, :, :2], one[:, :, -2:])
    assert torch.equal(buffer.history(), two[:, :, -2:])


@torch.no_grad()
def test_float64_is_not_narrowed():
    """Upsampling repeats values, so that a decoder in float64 is one throughout."""
    vae = make(SMALL).double()
    clip = torch.rand(1, 4, 1, 2, 2, dtype=torch.float64)
    enlarged = next(layer for layer in vae.modules() if hasattr(layer, "enlarged")).enlarged(clip)
    assert torch.equal(enlarged[..., ::2, ::2], clip[:, :, 0])


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
