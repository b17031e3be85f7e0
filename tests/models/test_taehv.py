"""The tiny decoder's stream against its whole-clip form: every layer over all frames at once."""

import pytest
import torch
import torch.nn.functional as F
from oracles import randomise
from torch.utils._python_dispatch import TorchDispatchMode

from inferix.errors import UsageError
from inferix.models.wan.taehv import Grow, MemoryBlock, TinyDecoder, tiny_spec_from_shapes
from inferix.models.wan.vae_cpu import use_cpu_layers
from inferix.models.wan.vae_gpu import with_gpu_layers
from inferix.models.wan.vae_spec import TAEW21, TAEW22, TinySpec

SMALL = [TinySpec(16, (12, 8, 8, 4), (1, 2, 2), 1), TinySpec(48, (12, 8, 8, 4), (1, 2, 2), 2)]


def make(spec):
    return randomise(TinyDecoder(spec), scale=0.1).eval().requires_grad_(False)


def whole_clip(model, latents):
    """All frames through one layer after the other; a memory block sees its input moved on by a frame."""
    x = torch.tanh(latents / 3) * 3
    for layer in model.decoder:
        if isinstance(layer, MemoryBlock):
            x = layer(x, torch.cat((torch.zeros_like(x[:1]), x[:-1])))
        elif isinstance(layer, Grow):
            x = layer.conv(x)
            x = x.reshape(-1, x.shape[1] // layer.factor, *x.shape[2:])
        else:
            x = layer(x)
    return F.pixel_shuffle(x, model.spec.patch).clamp(0, 1)[3:] * 2 - 1


@pytest.mark.parametrize("layers", [lambda model: model, use_cpu_layers, with_gpu_layers], ids=["plain", "cpu", "gpu"])
@pytest.mark.parametrize("spec", SMALL, ids=["2.1", "2.2"])
@pytest.mark.parametrize("splits", [[7], [3, 3, 1], [1] * 7, [1, 6]])
def test_streaming_equals_the_whole_clip(spec, splits, layers):
    model = make(spec)
    latents = torch.randn(7, spec.z_dim, 4, 6, generator=torch.Generator().manual_seed(1))
    want = whole_clip(model, latents)
    model = layers(model)
    state = model.new_state()
    parts = [model.decode(part, state) for part in latents.split(splits)]
    assert torch.equal(torch.cat(parts), model.decode(latents, model.new_state()))
    assert want.std() > 1e-3
    got = torch.cat(parts)
    assert got.shape == want.shape == (25, 3, 4 * spec.spatial_stride, 6 * spec.spatial_stride)
    assert len(parts[0]) == splits[0] * 4 - 3
    assert (got - want).abs().max() <= 1e-6


@torch.no_grad()
def test_gpu_layers_read_no_weight_but_in_convolutions():
    """Those of a frame and the one before it are paired once, not for each frame."""
    model, readers = with_gpu_layers(make(SMALL[0])), set()

    class Readers(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(isinstance(arg, torch.Tensor) and arg.data_ptr() in pairs for arg in args):
                readers.add(func)
            return func(*args, **(kwargs or {}))

    pairs = {layer.conv[0].weight.data_ptr() for layer in model.modules() if isinstance(layer, MemoryBlock)}
    pairs |= {layer.conv[0].pair_weight.data_ptr() for layer in model.modules() if isinstance(layer, MemoryBlock)}
    with Readers():
        model.decode(torch.randn(2, 16, 2, 2), model.new_state())
    assert readers == {torch.ops.aten.convolution.default}


def test_a_cloned_state_goes_on_by_itself():
    model = make(SMALL[0])
    state = model.new_state()
    model.decode(torch.randn(2, 16, 2, 2), state)
    fork, rest = state.clone(), torch.randn(2, 16, 2, 2)
    model.decode(torch.randn(1, 16, 2, 2), fork)
    again = state.clone()
    assert torch.equal(model.decode(rest, state), model.decode(rest, again))
    assert not torch.equal(model.decode(rest, fork), model.decode(rest, state))


@pytest.mark.parametrize("spec", [*SMALL, TAEW21, TAEW22])
def test_sizes_from_shapes(spec):
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in TinyDecoder(spec).state_dict().items()}
    assert tiny_spec_from_shapes(shapes) == spec
    if spec is TAEW21:
        with torch.device("meta"):
            count = sum(p.numel() for p in TinyDecoder(spec).parameters())
        assert count / 1e6 == pytest.approx(9.8, abs=0.1)
        assert {"decoder.3.conv.0.weight", "decoder.13.conv.weight", "decoder.20.weight"} <= set(shapes)


def test_it_cannot_encode():
    model = make(SMALL[0])
    with pytest.raises(UsageError, match="vae"):
        model.encode(torch.zeros(1, 3, 16, 16), model.new_state())
