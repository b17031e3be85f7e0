"""MAGI-1's sizes, tables, published names, files and autoencoder."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import inferix
from inferix.errors import CheckpointError, InferixError, UsageError
from inferix.export.checkpoint import convert, write_random
from inferix.graphs.passes import Group, Pass
from inferix.models.decoder import StreamState
from inferix.models.files import read_tensors, write_tensors
from inferix.models.magi.checkpoint import published
from inferix.models.magi.costs import MagiCosts
from inferix.models.magi.family import MAGI
from inferix.models.magi.presets import THREE_PASSES
from inferix.models.magi.solver import intervals, step_condition, times
from inferix.models.magi.spec import MAGI_4B, MAGI_24B, MAGI_TINY, MAGI_TINY_FP8, MagiSpec
from inferix.models.magi.special_tokens import read_special_tokens, special_rows, with_special_tokens
from inferix.models.magi.text import cleaned, load_text
from inferix.models.magi.transformer import MagiTransformer, QuantisedLinear
from inferix.models.magi.vae import VitVae, blend
from inferix.models.magi.vae_spec import SCALE, TINY_VIT_VAE, VIT_VAE, VitVaeSpec
from inferix.models.random import random_state
from inferix.models.registry import make_preset, read_checkpoint
from inferix.runtime.capacity.costs import transformer_bytes

SIXTEEN = (
    0, .00131, .00526, .01200, .02174, .03482, .05172, .07313, .1, .13366, .17606, .23004, .3, .39302, .52128, .70755, 1
)  # fmt: skip
LAYER_KEYS = {
    "ada_modulate_layer.proj.0.weight", "ada_modulate_layer.proj.0.bias", "self_attention.linear_qkv.layer_norm.weight",
    "self_attention.linear_qkv.layer_norm.bias", "self_attention.linear_qkv.q.weight",
    "self_attention.linear_qkv.qx.weight", "self_attention.linear_qkv.k.weight", "self_attention.linear_qkv.v.weight",
    "self_attention.linear_kv_xattn.weight", "self_attention.linear_proj.weight", "self_attention.q_layernorm.weight",
    "self_attention.q_layernorm.bias", "self_attention.k_layernorm.weight", "self_attention.k_layernorm.bias",
    "self_attention.q_layernorm_xattn.weight", "self_attention.q_layernorm_xattn.bias",
    "self_attention.k_layernorm_xattn.weight", "self_attention.k_layernorm_xattn.bias", "self_attn_post_norm.weight",
    "self_attn_post_norm.bias", "mlp_post_norm.weight", "mlp_post_norm.bias", "mlp.layer_norm.weight",
    "mlp.layer_norm.bias", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random("magi-tiny", "magi", tmp_path_factory.mktemp("magi") / "tiny")


@pytest.mark.parametrize(("spec", "count"), [(MAGI_4B, 4_459_898_128), (MAGI_24B, 23_899_281_936)])
def test_parameters_are_the_published_ones(spec: MagiSpec, count: int) -> None:
    with torch.device("meta"):
        model = MagiTransformer(spec)
    costs = MagiCosts(spec)
    assert sum(tensor.numel() for tensor in model.parameters()) == count
    assert costs.prompt_parameters + costs.pass_parameters == count


@pytest.mark.parametrize(("spec", "count"), [(VIT_VAE, 613_755_239), (TINY_VIT_VAE, 1_133_172)])
def test_parameters_of_the_autoencoder(spec: VitVaeSpec, count: int) -> None:
    with torch.device("meta"):
        vae = VitVae(spec)
    assert sum(tensor.numel() for tensor in vae.parameters()) == count == spec.parameters
    assert sum(tensor.numel() for tensor in vae.decoder.parameters()) == spec.decoding_parameters


def test_times_are_the_published_table() -> None:
    assert times(16, 3.0) == pytest.approx(SIXTEEN, abs=5e-6)
    quarter = times(12, 3.0)[:4]
    assert quarter == pytest.approx((0, 0.0053, 0.0120, 0.0217), abs=5e-5) and intervals(12) == [2, 1, 1] * 4
    for steps in (8, 12, 16, 32, 64):
        ends = [times(steps, 3.0)[index * steps // 4] for index in range(5)]
        assert ends == pytest.approx((0, 0.021739, 0.1, 0.3, 1), abs=1e-6)


def test_step_conditions_are_the_published_ones() -> None:
    assert [step_condition(steps, 0) for steps in (64, 32, 16, 8)] == [32, 16, 8, 4]
    assert [step_condition(12, step) for step in range(4)] == [4, 8, 8, 4]


def test_weights_of_the_three_passes() -> None:
    """(prompt and past, past, neither), by time: the published weights change at 0.3, which belongs to the later."""
    assert THREE_PASSES.weights_at(299.9) == THREE_PASSES.weights_at(0) == (7.5, -6.0, -0.5)
    for time in times(16, 3.0)[12:]:
        assert THREE_PASSES.weights_at(1000 * time) == (0.0, 1.0, 0.0)


def test_names_are_the_published_ones(folder: Path) -> None:
    tensors = read_tensors(folder / "model.safetensors")
    own = {name.removeprefix("videodit_blocks.layers.0.") for name in tensors if ".layers.0." in name}
    assert own == LAYER_KEYS
    assert {name for name in tensors if ".layers." not in name} == {
        "x_embedder.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias", "t_embedder.mlp.2.weight",
        "t_embedder.mlp.2.bias", "y_embedder.null_caption_embedding", "y_embedder.y_proj_xattn.0.weight",
        "y_embedder.y_proj_xattn.0.bias", "y_embedder.y_proj_adaln.0.weight", "y_embedder.y_proj_adaln.0.bias",
        "rope.bands", "videodit_blocks.final_layernorm.weight", "videodit_blocks.final_layernorm.bias",
        "final_linear.linear.weight",
    }  # fmt: skip


def test_flops_of_a_pass_are_those_that_torch_counts() -> None:
    with torch.device("meta"):
        model = MagiTransformer(MAGI_TINY)
        context = model.embed_text(torch.zeros(1, MAGI_TINY.text_rows, MAGI_TINY.text_dim))
        latents, levels = torch.zeros(1, 2, 16, 4, 4), torch.zeros(1, 2, 2)

    class Alone:
        def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            k, v = (part.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for part in (k, v))
            parts = (part.transpose(1, 2) for part in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2)

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latents, levels, context, Alone())
    run = Pass((Group((0, 1), 0.0, (0, 1), (0, 1)),), condition=4.0)
    assert MagiCosts(MAGI_TINY).pass_flops(4, run).total == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model.embed_text(torch.zeros(1, MAGI_TINY.text_rows, MAGI_TINY.text_dim))
    assert MagiCosts(MAGI_TINY).prompt_flops == counter.get_total_flops()


# Checkpoints


def test_a_checkpoint_comes_back_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(folder)
    state = MAGI.random_state(MAGI_TINY, 0, torch.float32)
    assert checkpoint.spec == MAGI_TINY and checkpoint.form == "magi"
    assert checkpoint.tensors.keys() == state.keys()
    assert all(torch.equal(tensor, checkpoint.tensors[name]) for name, tensor in state.items())
    convert(folder, tmp_path / "shards", "original", max_shard=100_000)
    again = read_checkpoint(tmp_path / "shards")
    assert len(again.files) > 1 and again.spec == MAGI_TINY
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in state.items())
    with pytest.raises(UsageError, match="diffusers"):
        convert(folder, tmp_path / "other", "diffusers")


def test_sizes_come_from_the_tensors(tmp_path: Path) -> None:
    """Any small size loads; what no tensor shows comes from the config beside them."""
    spec = replace(
        MAGI_TINY, name="custom", dim=48, num_heads=8, kv_heads=8, head_width=8, gated=False, copies=1, rescale=0.5,
        text_len=60, default_size=MAGI_4B.default_size,
    )  # fmt: skip
    state = MAGI.random_state(spec, 0, torch.float32)
    write_tensors({published(name): tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "small_config.json").write_text(json.dumps({"model_config": {"x_rescale_factor": 0.5}}), "utf-8")
    assert read_checkpoint(tmp_path).spec == spec
    (tmp_path / "small_config.json").write_text(json.dumps({"model_config": {"num_layers": 34}}), "utf-8")
    with pytest.raises(UsageError, match=r"num_layers.*34"):
        read_checkpoint(tmp_path)


def test_broken_checkpoints(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "shards", "original", max_shard=100_000)
    first, last = sorted((tmp_path / "shards").glob("model-*.safetensors"))[::3][:2]
    data = last.read_bytes()
    last.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=last.name):
        read_checkpoint(tmp_path / "shards")
    last.unlink()
    with pytest.raises(CheckpointError, match=last.name):
        read_checkpoint(tmp_path / "shards")
    first.unlink()
    with pytest.raises(InferixError, match="no checkpoint"):
        read_checkpoint(tmp_path / "nothing")


def packed(file: Path) -> Path:
    """Compress a file, which it takes the place of."""
    zstandard = pytest.importorskip("zstandard")
    target = file.with_name(f"{file.name}.zst")
    target.write_bytes(zstandard.ZstdCompressor().compress(file.read_bytes()))
    file.unlink()
    return target


def test_compressed_shards(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "shards", "original", max_shard=100_000)
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    last = packed(shards[-1])
    packed(shards[0])
    state = MAGI.random_state(MAGI_TINY, 0, torch.float32)
    again = read_checkpoint(tmp_path / "shards")
    assert last in again.files and again.tensors.keys() == state.keys()
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in state.items())
    whole = tmp_path / "whole"
    convert(folder, whole, "original")
    packed(whole / "model.safetensors")
    assert read_checkpoint(whole).spec == MAGI_TINY
    data = last.read_bytes()
    for broken in (data[: len(data) // 2], data[:3], data[:-200] + bytes(200)):
        last.write_bytes(broken)
        with pytest.raises(CheckpointError, match=last.name):
            read_checkpoint(tmp_path / "shards")
    last.unlink()
    with pytest.raises(CheckpointError, match=last.stem):
        read_checkpoint(tmp_path / "shards")


def test_a_compressed_file_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    bomb = tmp_path / "model.safetensors.zst"
    bomb.write_bytes(zstandard.ZstdCompressor().compress(bytes(10_000_000)))
    with pytest.raises(CheckpointError, match=bomb.name):
        read_tensors(bomb)


def test_compressed_files_without_the_package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InferixError, match="pip install zstandard"):
        read_checkpoint(tmp_path)


# FP8


def test_a_quantised_layer_rounds_as_published() -> None:
    """Inputs in float32 over their divisor, cut to 448, through bfloat16 to e4m3; both scales on the product."""
    for smooth in (False, True):
        layer = QuantisedLinear(8, 5, smooth)
        generator = torch.Generator().manual_seed(1)
        weight = (100 * torch.randn(5, 8, generator=generator)).to(torch.float8_e4m3fn)
        divisor = torch.full((8,), 0.01)
        if smooth:
            divisor = torch.rand(8, generator=generator) + 0.1
            layer.smooth_scale.data = divisor
        layer.input_scale.data = torch.full((1 if smooth else 8,), 0.01)
        layer.weight.data, layer.weight_scale.data = weight, torch.tensor([0.03])
        x = 3 * torch.randn(4, 8, generator=generator)
        x[0, 0] = 1e4
        narrow = torch.tensor([[min(max(a / b, -448), 448) for a, b in zip(row, divisor, strict=True)] for row in x])
        narrow = narrow.bfloat16().to(torch.float8_e4m3fn).float()
        wanted = (narrow @ weight.float().T) * torch.tensor(0.01) * torch.tensor(0.03)
        assert torch.allclose(layer(x), wanted, rtol=1e-6, atol=0)
        assert (layer(x) - x / divisor @ weight.float().T * 3e-4).abs().max() > 1e-3  # the rounding shows


def test_fp8_checkpoints_come_back_as_published(tmp_path: Path) -> None:
    write_random("magi-tiny-fp8", "magi", tmp_path / "fp8")
    tensors = read_tensors(tmp_path / "fp8" / "model.safetensors")
    layer = "videodit_blocks.layers.1"
    dim, ffn = MAGI_TINY.dim, MAGI_TINY.ffn_dim
    shapes = {
        "self_attention.linear_qkv.q": (1, 64, dim), "self_attention.linear_qkv.qx": (1, 64, dim),
        "self_attention.linear_qkv.k": (1, 32, dim), "self_attention.linear_qkv.v": (1, 32, dim),
        "mlp.linear_fc1": (1, 2 * ffn, dim), "self_attention.linear_proj": (1, dim, 128),
        "mlp.linear_fc2": (1, dim, ffn),
    }  # fmt: skip
    for name, size in shapes.items():
        smooth = name.endswith(("proj", "fc2"))
        weight = tensors[f"{layer}.{name}.weight"]
        assert weight.dtype == torch.float8_e4m3fn and tuple(weight.shape) == size
        assert tensors[f"{layer}.{name}.weight_scale"].shape == (1,)
        assert tensors[f"{layer}.{name}.input_scale"].shape == ((1,) if smooth else (size[2],))
        assert (f"{layer}.{name}.smooth_scale" in tensors) == smooth
        assert not smooth or tensors[f"{layer}.{name}.smooth_scale"].shape == (1, size[2])
    assert not any(name.endswith("_scale") for name in tensors if ".layers.1." not in name)
    checkpoint = read_checkpoint(tmp_path / "fp8")
    assert checkpoint.spec == MAGI_TINY_FP8
    module = MAGI.load(checkpoint, "reference", torch.bfloat16, "cpu")
    quantised = module.blocks[1].mlp.linear_fc2
    assert quantised.smooth_scale.dtype == torch.float32 and quantised.weight.dtype == torch.float8_e4m3fn
    assert torch.equal(quantised.weight.float(), tensors[f"{layer}.mlp.linear_fc2.weight"][0].float())
    tensors_held = list(module.parameters())
    narrow = sum(tensor.numel() for tensor in tensors_held if tensor.dtype == torch.float8_e4m3fn)
    scales = sum(tensor.numel() for tensor in tensors_held if tensor.dtype == torch.float32)
    assert narrow == MagiCosts(MAGI_TINY_FP8).narrow_parameters > 0
    held, planned = sum(tensor.nbytes for tensor in tensors_held), transformer_bytes(MAGI_TINY_FP8, "bfloat16")
    assert held == planned + 2 * scales
    convert(tmp_path / "fp8", tmp_path / "again", "original")
    again = read_tensors(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(tensor.float(), again[name].float()) for name, tensor in tensors.items())
    with pytest.raises(UsageError, match="bfloat16"):
        convert(tmp_path / "fp8", tmp_path / "wide", "original", "bfloat16")


def test_fp8_tensors_that_are_not_as_published(tmp_path: Path) -> None:
    write_random("magi-tiny-fp8", "magi", tmp_path / "fp8")
    file = tmp_path / "fp8" / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in read_tensors(file).items()}  # not mapped: the file is replaced
    name = "videodit_blocks.layers.1.mlp.linear_fc1"
    several = tensors[f"{name}.input_scale"].clone()
    several[3] *= 2
    plain = tensors["videodit_blocks.layers.0.mlp.linear_fc1.weight"].to(torch.float8_e4m3fn)
    for change, named in (
        ({f"{name}.input_scale": several}, f"{name}.input_scale"),
        ({f"{name}.weight": tensors[f"{name}.weight"].to(torch.float8_e5m2)}, "float8_e5m2"),
        ({"videodit_blocks.layers.0.mlp.linear_fc1.weight": plain}, "layers.0.mlp.linear_fc1"),
    ):
        write_tensors(tensors | change, file)
        with pytest.raises(UsageError, match=named):
            read_checkpoint(tmp_path / "fp8")


# Captions


def test_a_caption_that_is_too_long_is_refused_before_weights(folder: Path) -> None:
    encoder = load_text(folder / "t5" / "t5-v1_1-xxl", MAGI_TINY.text_len, torch.float32, "cpu")
    with pytest.raises(UsageError, match=rf"72 tokens.*{MAGI_TINY.text_len}"):
        encoder.encode("fox " * 18)
    assert "model" not in vars(encoder)
    assert encoder.encode("a fox").shape == (MAGI_TINY.text_len, MAGI_TINY.text_dim)


def test_no_progress_bars_of_the_encoder(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_text(folder / "t5" / "t5-v1_1-xxl", MAGI_TINY.text_len, torch.float32, "cpu").encode("a fox")
    assert capfd.readouterr().err == ""


def test_special_tokens(tmp_path: Path) -> None:
    table = np.arange(200.0).reshape(100, 2)
    np.savez(tmp_path / "special_tokens.npz", other_tokens=table, caption_token=table[:1], logo_token=table[:1])
    read = read_special_tokens(tmp_path / "special_tokens.npz")
    assert read.dtype == torch.float16 and torch.equal(read.double(), torch.from_numpy(table))
    ids = [(special_rows(read, chunk=chunk, chunks=10)[:, 0] / 2).tolist() for chunk in (0, 2, 3, 9)]
    assert ids == [[14, 1], [14, 1], [13, 1], [7, 1]]  # the duration before the mark of quality
    assert (special_rows(read, ("static", "hq", "2d-anime"))[:, 0] / 2).tolist() == [16, 1, 2]
    caption = torch.randn(5, 2)
    rows = with_special_tokens(caption, read[:2])
    assert torch.equal(rows[:2], read[:2].float()) and torch.equal(rows[2:], caption[:3])
    for names, chunk, named in ((("hd",), 0, "'hd'"), (("hq",), 1, "chunk is 1 of 1")):
        with pytest.raises(UsageError, match=named):
            special_rows(read, names, chunk)
    np.savez(tmp_path / "other.npz", tokens=table)
    with pytest.raises(CheckpointError, match="other_tokens"):
        read_special_tokens(tmp_path / "other.npz")


def test_other_presets_and_models_are_refused_before_weights(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"self-forcing.*magi"):
        inferix.load(folder, preset="self-forcing", device="cpu")
    with pytest.raises(UsageError, match=r"magi-4.5b-distill.*wan"):
        inferix.load("wan-tiny", preset="magi-4.5b-distill", device="cpu")
    with pytest.raises(UsageError, match=r"window_blocks is 4.*10 steps"):
        make_preset("magi-tiny-distill", num_steps=10)
    with pytest.raises(UsageError, match=r"guidance_scale is 3.0"):
        make_preset("magi-tiny-distill", guidance_scale=3.0)


def test_bad_input_is_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a checkpoint's transformer nothing is read but names and shapes; of a text encoder, its tokenizer."""
    write_random("wan-tiny", "diffusers", tmp_path / "wan")
    convert(folder, tmp_path / "cut", "original", max_shard=100_000)
    convert(folder, tmp_path / "missing", "original", max_shard=100_000)
    cut, missing = (sorted((tmp_path / name).glob("model-*.safetensors"))[-1] for name in ("cut", "missing"))
    cut.write_bytes(cut.read_bytes()[:-100])
    missing.unlink()

    def read(*given: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("inferix.models.family.fill", read)
    monkeypatch.setattr("inferix.models.magi.text.load_model", read)
    for model, preset, settings, named in (
        (folder, "self-forcing", {}, r"self-forcing.*magi"),
        (tmp_path / "wan", "magi-tiny-distill", {}, r"magi-tiny-distill.*wan"),
        (folder, "magi-tiny", {"num_steps": 10}, r"window_blocks is 4.*10 steps"),
        (folder, "magi-tiny-distill", {"num_steps": 18}, r"window_blocks is 4.*18 steps"),
        (folder, "magi-tiny-distill", {"guidance_scale": 3.0}, r"guidance_scale is 3\.0"),
        (tmp_path / "cut", "magi-tiny", {}, cut.name),
        (tmp_path / "missing", "magi-tiny", {}, missing.name),
        (folder, "magi-tiny", {"prompts": ["a fox", "fox " * 18]}, rf"72 tokens.*{MAGI_TINY.text_len}"),
        (folder, "magi-tiny", {"prompts": "a fox"}, "prompts is 'a fox'"),
    ):
        with pytest.raises(InferixError, match=named) as caught:
            inferix.load(model, preset=preset, device="cpu", **settings)
        assert "\n" not in str(caught.value)


# Autoencoder


def tiny_vae() -> VitVae:
    with torch.device("meta"):
        vae = VitVae(TINY_VIT_VAE)
    vae.load_state_dict(random_state(vae, 1, torch.float64), assign=True)
    return vae.eval().requires_grad_(False)


def test_the_autoencoder_streams_tile_by_tile() -> None:
    """Tiles of three latent frames do not see each other; a single latent frame becomes one picture."""
    vae, latents = tiny_vae(), torch.randn(6, 16, 8, 8, dtype=torch.float64)
    whole = vae.decode(latents, StreamState())
    parts = [vae.decode(part, StreamState()) for part in latents.split(3)]
    assert whole.shape == (24, 3, 64, 64) and torch.equal(whole, torch.cat(parts))
    assert len(vae.decode(latents[:4], StreamState())) == 13
    pixels = whole.clamp(-1, 1)
    encoded = vae.encode(pixels, StreamState())
    assert encoded.shape == (6, 16, 8, 8)
    assert torch.equal(encoded, torch.cat([vae.encode(part, StreamState()) for part in pixels.split(12)]))
    assert vae.encode(pixels[:4], StreamState()).shape == (1, 16, 8, 8)
    with pytest.raises(ValueError, match="5 frames"):
        vae.encode(pixels[:5], StreamState())


def test_overlapping_tiles_are_blended() -> None:
    """Of a picture of two tiles the first one's own part is that of the tile alone; the overlap fades linearly."""
    vae, latents = tiny_vae(), torch.randn(3, 16, 8, 14, dtype=torch.float64)
    whole, volume = vae.decode(latents, StreamState()), (latents / SCALE).transpose(0, 1)[None]
    first, second = (vae.decoder(part)[0].transpose(0, 1) for part in (volume[..., :8], volume[..., 6:]))
    share = torch.arange(16, dtype=torch.float64) / 16
    faded = first[..., 48:] * (1 - share) + second[..., :16] * share
    wanted = torch.cat((first[..., :48], faded, second[..., 16:48]), dim=3).clamp(-1, 1)
    assert torch.allclose(whole[..., :48, :96], wanted[..., :48, :], atol=1e-12)  # below is another row of tiles
    ones = torch.ones(1, 1, 1, 4, 4)
    assert blend(ones, 0 * ones, 2, 3)[0, 0, 0, :, 0].tolist() == [1.0, 0.5, 0.0, 0.0]


def test_prompts_are_cleaned() -> None:
    assert cleaned("A  <b>Red</b> fox, see https://example.com/a now") == "a red fox, see now"
    assert cleaned("\u72d0\u72f8 fox @someone #12") == "fox"
    assert cleaned("a fox\u2014running \u201cfast\u201d") == 'a fox-running "fast"'
    assert cleaned("") == ""
