"""Costs computed from sizes, against real modules, caches, decoder states and passes."""

import weakref
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from inferix.bench.dry_run import FakeCard, WithoutDriver
from inferix.graphs.passes import Group, Pass
from inferix.graphs.rewrites.lowp import PrecisionMap
from inferix.kernels.linear_lowp import pack
from inferix.models.registry import MODELS, family_of
from inferix.models.text.spec import UMT5_XXL, tiny_text
from inferix.models.wan.taehv import TinyDecoder
from inferix.models.wan.transformer import WanTransformer
from inferix.models.wan.vae import CausalVae
from inferix.models.wan.vae_gpu import with_gpu_layers
from inferix.models.wan.vae_spec import TAEW21, TAEW22, TINY_VAE, TINY_VAE22, WAN21_VAE, WAN22_VAE, TinySpec
from inferix.runtime.capacity.costs import (
    cross_bytes,
    decoder_state_bytes,
    packing_saves,
    page_bytes,
    pass_flops,
    pass_scratch,
    prompt_flops,
    token_layers,
    transformer_parameters,
)
from inferix.runtime.kv.contiguous_cache import ContiguousCache
from inferix.runtime.kv.page_store import KV_DTYPES, PageForm

DECODERS = {
    "2.1": WAN21_VAE, "2.2": WAN22_VAE, "tiny-2.1": TINY_VAE, "tiny-2.2": TINY_VAE22, "taehv-2.1": TAEW21,
    "taehv-2.2": TAEW22,
}  # fmt: skip
VAES = {name: spec for name, spec in DECODERS.items() if not isinstance(spec, TinySpec)}
DEFAULT = MODELS["wan-1.3b"].default_size


def build(make, spec, device="meta", dtype=torch.bfloat16):
    with torch.device(device):
        return make(spec).to(dtype).eval().requires_grad_(False)


def decoder(spec, **kwargs):
    return build(TinyDecoder if isinstance(spec, TinySpec) else CausalVae, spec, **kwargs)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def counted(run, *args):
    """Operations that torch counts in a call, attention included."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(*args)
    return counter.get_total_flops()


def one_group(frames, context):
    """A pass over the last `frames` of `context` frames."""
    seen = tuple(range(context))
    return Pass((Group(seen[context - frames :], 0.0, seen, seen),))


class Live(TorchDispatchMode):
    """Follows the bytes of storages that are alive, `tensors` from the start; `peak` is the most beyond those."""

    def __init__(self, *tensors):
        super().__init__()
        self.sizes, self.now = {}, 0
        for tensor in tensors:
            self.note(tensor)
        self.before = self.most = self.now

    @property
    def peak(self):
        return self.most - self.before

    def note(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.drop, storage._cdata)

    def drop(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf)
        self.most = max(self.most, self.now)
        return out


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_every_model(name):
    assert transformer_parameters(MODELS[name]) == count(build(family_of(MODELS[name]).build, MODELS[name]))


@pytest.mark.parametrize("name", DECODERS)
def test_parameters_of_every_decoder(name):
    assert DECODERS[name].parameters == count(decoder(DECODERS[name]))


@pytest.mark.parametrize("spec", [UMT5_XXL, tiny_text(64)], ids=["xxl", "tiny"])
def test_parameters_of_the_text_encoders(spec):
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=spec.vocabulary, d_model=spec.dim, d_kv=spec.head_dim, d_ff=spec.ffn_dim,
        num_layers=spec.num_layers, num_heads=spec.num_heads, relative_attention_num_buckets=spec.buckets,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"):
        assert spec.parameters == count(UMT5EncoderModel(config))


@pytest.mark.parametrize(
    "spec",
    [
        replace(WAN21_VAE, base_channels=8, decoder_channels=8),
        replace(WAN22_VAE, base_channels=8, decoder_channels=8),
        TinySpec(16, (12, 8, 8, 4), (1, 2, 2), 1),
    ],
    ids=["2.1", "2.2", "taehv"],
)
@torch.no_grad()
def test_decoder_state_is_what_a_stream_holds(spec):
    latent = (1, 2)
    module = decoder(spec, device="cpu", dtype=torch.float32)
    state = module.new_state()
    for frames in (2, 1):
        module.decode(torch.zeros(frames, spec.z_dim, *latent), state)
        assert state.nbytes == decoder_state_bytes(spec, latent, "float32")


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_decoding_at_full_size(name):
    """State, operations and scratch of a stream without data; the published figures for Wan 2.1 at 832x480."""
    spec, latent = DECODERS[name], MODELS["wan-1.3b"].latent_size(DEFAULT)
    module = decoder(spec)
    state = module.new_state()
    frames = torch.empty(3, spec.z_dim, *latent, device="meta", dtype=torch.bfloat16)
    for first in (True, False):
        assert counted(module.decode, frames[:1], state) == spec.decode_flops(latent, first)
    assert state.nbytes == decoder_state_bytes(spec, latent, "bfloat16")
    with Live(frames, *module.parameters(), *state.history.values()) as live:
        module.decode(frames, state)
    assert live.peak <= spec.scratch_bytes(latent, 3, 2) <= 1.2 * live.peak
    if name == "2.1":
        assert round(state.nbytes / 2**20) == 1801
        assert [round(spec.decode_flops(latent, first) / 1e12, 2) for first in (True, False)] == [4.35, 13.55]
    if name == "taehv-2.1":
        assert round(3 * spec.decode_flops(latent) / 1e12, 2) == 1.63


@pytest.mark.parametrize("name", [
    "tiny-2.1", "taehv-2.1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("2.1", "2.2"))
])
@torch.no_grad()
def test_decoding_at_full_size_on_a_gpu(name):
    """On fake tensors of a card, where convolutions keep the layout of their input."""
    spec, latent = DECODERS[name], MODELS["wan-1.3b"].latent_size(DEFAULT)
    with WithoutDriver(), FakeCard():
        with default_dtype(torch.bfloat16), torch.device("cuda"):
            module = with_gpu_layers(family_of(MODELS["wan-1.3b"]).build_decoder(spec).eval())
        state, frames = module.new_state(), torch.empty(3, spec.z_dim, *latent, device="cuda", dtype=torch.bfloat16)
        for _ in range(2):
            module.decode(frames[:1], state)
        assert state.nbytes == decoder_state_bytes(spec, latent, "bfloat16")
        with Live(frames, *module.parameters(), *state.history.values()) as live:
            module.decode(frames, state)
    assert live.peak <= spec.scratch_bytes(latent, 3, 2, on_gpu=True) <= 1.25 * live.peak


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", VAES)
@torch.no_grad()
def test_encoding_a_picture(name):
    spec, latent = VAES[name], (6, 4)
    module = decoder(spec)
    picture = torch.empty(1, 3, *(side * spec.spatial_stride for side in latent), device="meta", dtype=torch.bfloat16)
    assert counted(module.encode, picture, module.new_state()) == spec.encode_flops(latent)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_page_is_a_frame_of_the_cache(dtype):
    spec, kind = MODELS["wan-tiny"], getattr(torch, dtype)
    cache = ContiguousCache(spec, (3, 5), False, torch.float64, kind, torch.device("cpu"))
    cache.set_window((0, 1))
    assert cache.nbytes == 2 * page_bytes(spec, 15, dtype)
    for name, kv_dtype in ((dtype, kind), *KV_DTYPES.items()):
        assert PageForm(spec, (3, 5), kind, kv_dtype).nbytes == page_bytes(spec, 15, name)


def test_published_figures():
    """Per frame and per prompt in MiB, per pass of three frames in TFLOP, by frames attended."""
    for name, page, prompt, passes in (
        ("wan-1.3b", 274, 90, {3: 16.2, 6: 20.2, 9: 24.3, 12: 28.3, 21: 40.4}),
        ("wan-14b", 1219, 400, {3: 131.8, 6: 149.7, 9: 167.7, 12: 185.6, 21: 239.5}),
    ):
        spec = MODELS[name]
        tokens = spec.tokens_per_frame(DEFAULT)
        assert round(page_bytes(spec, tokens, "bfloat16") / 2**20) == page
        rows = 2 * spec.text_len * spec.text_dim
        assert round((cross_bytes(spec, "bfloat16") - rows) / 2**20) == prompt
        for context, tflop in passes.items():
            assert pass_flops(spec, tokens, one_group(3, context)).total / 1e12 == pytest.approx(tflop, abs=0.06)


@pytest.mark.parametrize("name", ["wan-tiny", "wan-1.3b", "tinyworld"])
@torch.no_grad()
def test_operations_of_passes_and_prompts(name):
    """At full width, without data: one group that sees the past, and two of which the later sees both."""
    spec = replace(MODELS[name], num_layers=2)  # layers are alike
    height, width = spec.latent_size(spec.default_size)
    tokens, grid = spec.tokens_per_frame(spec.default_size), (height // spec.patch[0], width // spec.patch[1])
    model = build(WanTransformer, spec, dtype=torch.float32)
    both = Pass((Group((3,), 0.0, (0, 2, 3), (0, 2, 3)), Group((4, 5), 9.0, (0, 2, 3, 4, 5), (0, 2, 3, 4, 5))))
    with torch.device("meta"):
        rows = torch.empty(1, spec.text_len, spec.text_dim)
        assert counted(model.embed_text, rows) == prompt_flops(spec)
        text = model.embed_text(rows)
        for run in (one_group(3, 6), both):
            cache = ContiguousCache(spec, grid, False, torch.float64, torch.float32, torch.device("meta"))
            cache.set_window(run.groups[-1].context)
            latents = torch.empty(1, 3, spec.in_channels, height, width)
            actions = None if spec.action_dim is None else torch.empty(1, 3, spec.action_dim)
            given = (latents, torch.empty(1, 3), text, cache.bind(run), actions)
            assert counted(model, *given) == pass_flops(spec, tokens, run).total


class Opaque:
    """Attention that needs no memory of its own, as the kernels' does not."""

    def attend(self, layer, q, k, v):
        return torch.empty_like(q)


@pytest.mark.parametrize("name", ["wan-1.3b", "wan-14b", "wan-5b"])
@torch.no_grad()
def test_scratch_of_a_pass(name, monkeypatch):
    """Never less than what a pass takes, with the rotation in float64 and without any."""
    monkeypatch.setattr("inferix.models.transformer.attention", lambda q, k, v, mask: torch.empty_like(q))
    monkeypatch.setattr("inferix.runtime.kv.contiguous_cache.attention", lambda q, k, v: torch.empty_like(q))
    spec = replace(MODELS[name], num_layers=2)  # scratch is that of one layer
    height, width = spec.latent_size(spec.default_size)
    tokens, frames = spec.tokens_per_frame(spec.default_size), 3
    model = build(WanTransformer, spec)
    with torch.device("meta"):
        text = model.embed_text(torch.empty(1, spec.text_len, spec.text_dim, dtype=torch.bfloat16))
        latents = torch.empty(1, frames, spec.in_channels, height, width, dtype=torch.bfloat16)
        times = torch.empty(1, frames)
    grid = (height // spec.patch[0], width // spec.patch[1])
    cache = ContiguousCache(spec, grid, False, torch.float64, torch.bfloat16, torch.device("meta"))
    cache.set_window(tuple(range(6)))
    pairs = [tensor for pair in text.text for tensor in pair]
    tensors = (latents, times, *model.parameters(), *pairs, *cache.keys, *cache.values)
    peaks = []
    for kv in (Opaque(), cache.bind(one_group(frames, 6))):
        with Live(*tensors) as live:
            model(latents, times, text, kv)
        peaks.append(live.peak)
    most = pass_scratch(spec, tokens, frames, "bfloat16")
    assert max(peaks) <= most <= 1.1 * max(peaks)


@pytest.mark.parametrize("name", ["wan-tiny", "tinyworld"])
def test_layers_that_run_on_every_token_and_what_packing_them_saves(name):
    """Those that a pass calls on as many rows as there are tokens."""
    spec, frames, tokens = MODELS[name], 2, MODELS[name].tokens_per_frame((32, 32))
    model = build(WanTransformer, spec, "cpu", torch.float32)
    called = []
    for layer, part in model.named_modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(
                lambda part, given, out, layer=layer: called.append((layer, given[0].shape[-2], *part.weight.T.shape))
            )
    values = SimpleNamespace(attend=lambda layer, q, k, v: v)
    text = model.embed_text(torch.zeros(1, spec.text_len, spec.text_dim))
    actions = None if spec.action_dim is None else torch.zeros(1, frames, spec.action_dim)
    called.clear()
    latents = torch.zeros(1, frames, spec.in_channels, *spec.latent_size((32, 32)))
    model(latents, torch.zeros(1, frames), text, values, actions)
    actual = [(layer, *sizes) for layer, rows, *sizes in called if rows == frames * tokens]
    assert sorted(actual) == sorted(token_layers(spec))
    precision = PrecisionMap("fp8", ("*",), keep=("blocks.0.*",))
    packed = {layer: model.get_submodule(layer).weight for layer, *_ in actual if precision.has(layer)}
    saved = sum(weight.nbytes - sum(part.nbytes for part in pack(weight, torch.int8)) for weight in packed.values())
    assert packing_saves(spec, "float32", precision) == saved
