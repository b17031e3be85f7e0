"""Weights in FP8 or INT8 beside their scales: read as value * scale in every part of a model, or refused by name."""

import json
from pathlib import Path

import pytest
import torch
from small_checkpoint import UP, Q, published, save

from inferix.errors import UsageError
from inferix.export.checkpoint import convert, write_random
from inferix.models.registry import inspect
from inferix.models.scaled_weights import ScaledTensor, unscaled, with_scales
from inferix.models.text.umt5_checkpoint import find_text, load_text
from inferix.models.wan.checkpoint import read_checkpoint
from inferix.models.wan.family import WAN
from inferix.models.wan.vae_checkpoint import load_decoder

FP8, FP8_WIDE, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
MARK = {"float8": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)}
Tensors = dict[str, torch.Tensor]


def scaled(weight: torch.Tensor, dtype: torch.dtype, rows: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, scale and their product."""
    top = 127.0 if dtype == INT8 else torch.finfo(dtype).max
    scale = (weight.abs().amax(dim=1, keepdim=True) if rows else weight.abs().max()) / top
    values = (weight / scale).round().to(dtype) if dtype == INT8 else (weight / scale).to(dtype)
    return values, scale, values.float() * scale


def comfy(weight: torch.Tensor, layer: str) -> tuple[Tensors, torch.Tensor]:
    values, scale, product = scaled(weight, FP8, rows=False)
    return {f"{layer}.weight": values, f"{layer}.scale_weight": scale, "scaled_fp8": torch.empty(2, dtype=FP8)}, product


def comfy_with_inputs(weight: torch.Tensor, layer: str) -> tuple[Tensors, torch.Tensor]:
    values, scale, product = scaled(weight, FP8_WIDE, rows=False)
    parts = {f"{layer}.weight": values, f"{layer}.scale_weight": scale.reshape(1)}
    return parts | {f"{layer}.scale_input": torch.tensor(0.1), "scaled_fp8": torch.empty(0, dtype=FP8)}, product


def comfy_marked(weight: torch.Tensor, layer: str) -> tuple[Tensors, torch.Tensor]:
    values, scale, product = scaled(weight, FP8, rows=False)
    parts = {f"{layer}.weight": values, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": MARK["float8"]}
    return parts | {f"{layer}.input_scale": torch.tensor(0.1)}, product


def by_row(weight: torch.Tensor, layer: str) -> tuple[Tensors, torch.Tensor]:
    values, scale, product = scaled(weight, FP8, rows=True)
    return {f"{layer}.weight": values, f"{layer}.weight_scale": scale}, product


def by_row_flat(weight: torch.Tensor, layer: str) -> tuple[Tensors, torch.Tensor]:
    values, scale, product = scaled(weight, FP8, rows=True)
    return {f"{layer}.weight": values, f"{layer}.weight_scale": scale.flatten().to(torch.float32)}, product


def integers_by_row(weight: torch.Tensor, layer: str) -> tuple[Tensors, torch.Tensor]:
    values, scale, product = scaled(weight, INT8, rows=True)
    return {f"{layer}.weight": values, f"{layer}.weight_scale": scale}, product


LAYOUTS = (comfy, comfy_with_inputs, comfy_marked, by_row, by_row_flat, integers_by_row)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_transformer(tmp_path: Path, layout, prefix: str, suffix: str) -> None:
    tensors, products = published(), {}
    for layer, ours in ((Q, Q), (UP, "blocks.0.ffn.up")):
        parts, products[f"{ours}.weight"] = layout(tensors[f"{layer}.weight"], layer)
        tensors |= parts
    file = save({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, tmp_path / f"model{suffix}")
    checkpoint = read_checkpoint(file)
    module = WAN.load(checkpoint, "reference", torch.float32, "cpu").state_dict()
    for name, product in products.items():
        assert torch.equal(module[name], product)
        assert type(module[name]) is torch.Tensor
    bias = "blocks.0.self_attn.q.bias"
    assert torch.equal(module[bias], published()[bias])
    assert any(dtype.startswith(("float8", "int8")) for dtype in inspect(file)["dtypes"])


def test_a_mark_without_the_prefix_of_the_weights(tmp_path: Path) -> None:
    parts, product = comfy(published()[f"{Q}.weight"], Q)
    mark = parts.pop("scaled_fp8")
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in (published() | parts).items()}
    file = save(tensors | {"scaled_fp8": mark}, tmp_path / "model.safetensors")
    assert torch.equal(unscaled(read_checkpoint(file).tensors[f"{Q}.weight"]), product)


def test_converting_and_merging_work_on_the_products(tmp_path: Path) -> None:
    tensors = published()
    parts, product = by_row(tensors[f"{Q}.weight"], Q)
    file = save(tensors | parts, tmp_path / "a" / "model.safetensors")
    adapter = {f"{Q}.lora_A.weight": torch.ones(1, 128), f"{Q}.lora_B.weight": torch.ones(128, 1)}
    lora = save(adapter, tmp_path / "b" / "lora.safetensors")
    converted = read_checkpoint(convert(file, tmp_path / "c", lora=lora)).tensors
    assert torch.allclose(converted[f"{Q}.weight"], product + 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random("wan-tiny", "original", tmp_path_factory.mktemp("tiny") / "x")


@pytest.mark.parametrize("layout", [comfy, by_row, integers_by_row])
def test_text_encoder(tiny: Path, tmp_path: Path, layout) -> None:
    tensors = torch.load(tiny / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    layer = "blocks.0.attn.q"
    parts, product = layout(tensors[f"{layer}.weight"], layer)
    file = save(tensors | parts, tmp_path / "umt5_xxl_fp8.safetensors")
    found = find_text([file], [tiny])
    assert found is not None
    state = load_text(found, 12, torch.float32, "cpu").model.state_dict()
    assert torch.equal(state["encoder.block.0.layer.0.SelfAttention.q.weight"], product)


def test_vae(tiny: Path, tmp_path: Path) -> None:
    tensors = torch.load(tiny / "Wan2.1_VAE.pth", weights_only=True)
    layer = next(name for name in tensors if name.startswith("decoder.") and name.endswith(".weight")).removesuffix(
        ".weight"
    )
    values = torch.full_like(tensors[f"{layer}.weight"], 2.0).to(FP8)
    scaled_layer = {f"{layer}.weight": values, f"{layer}.scale_weight": torch.tensor(0.5)}
    plain_layer = {f"{layer}.weight": torch.ones_like(tensors[f"{layer}.weight"])}
    one = load_decoder(save(tensors | scaled_layer, tmp_path / "a.pth"), torch.float32, "cpu").state_dict()
    other = load_decoder(save(tensors | plain_layer, tmp_path / "b.pth"), torch.float32, "cpu").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in other)


VALUES = torch.ones(4, 6).to(FP8)
FORMATS = {form: torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8) for form in ("nvfp4", "")}


@pytest.mark.parametrize(
    ("weight", "extra", "named"),
    [
        (VALUES, {"x.weight_scale": torch.ones(6)}, "x.weight_scale"),  # of columns
        (VALUES, {"x.weight_scale": torch.ones(1, 6)}, "x.weight_scale"),
        (VALUES, {"x.weight_scale": torch.ones(2, 3)}, "x.weight_scale"),  # of blocks
        (VALUES, {"x.weight_scale": torch.ones(4, 1).to(torch.uint8)}, "uint8"),
        (VALUES, {"x.weight_scale": torch.tensor(float("nan"))}, "x.weight_scale"),
        (VALUES, {"x.weight_scale_inv": torch.ones(1)}, "x.weight"),
        (VALUES, {"x.weight_scale": torch.ones(1), "x.scale_weight": torch.ones(1)}, "x.weight"),
        (VALUES, {"y.weight_scale": torch.ones(1)}, "y.weight_scale"),
        (VALUES, {"x.weight_scale": torch.ones(1), "x.comfy_quant": FORMATS["nvfp4"]}, "nvfp4"),
        (VALUES, {"x.weight_scale": torch.ones(1), "x.comfy_quant": FORMATS[""]}, "comfy_quant"),
        (VALUES, {"x.weight_scale": torch.ones(1), "x.comfy_quant": torch.ones(9, dtype=torch.uint8)}, "comfy_quant"),
        (VALUES, {"x.weight_scale": torch.ones(1), "x.comfy_quant": torch.ones(9)}, "comfy_quant"),
        (VALUES, {"x.weight_scale": torch.ones(1), "x.weight_scale_2": torch.ones(1)}, "weight_scale_2"),
        (torch.ones(4, 6), {"x.weight_scale": torch.ones(1)}, "float32"),
        (torch.ones(4, 6, dtype=torch.int8), {"x.weight_scale": torch.ones(1)}, "int8"),  # of no published layout
        (torch.ones(4, 6, dtype=torch.uint8), {"x.weight_scale": torch.ones(4)}, "uint8"),
        (torch.ones(4, 6, dtype=torch.int8), {"x.SCB": torch.ones(4)}, "x.weight"),
    ],
)
def test_other_layouts_are_refused_by_name(tmp_path: Path, weight: torch.Tensor, extra: Tensors, named: str) -> None:
    def renamed(name: str) -> str:
        return name.replace("x.", f"{UP}.") if name.startswith("x.") else name

    tensors = published() | {renamed("x.weight"): weight} | {renamed(name): value for name, value in extra.items()}
    with pytest.raises(UsageError, match=renamed(named)):
        read_checkpoint(save(tensors, tmp_path / "model.pt"))


def test_a_scaled_tensor_computes_its_product_in_any_operation() -> None:
    tensor = with_scales("x", {"a.weight": VALUES, "a.weight_scale": torch.arange(4.0)[:, None]})["a.weight"]
    product = torch.arange(4.0)[:, None].expand(4, 6)
    assert isinstance(tensor, ScaledTensor) and tensor.shape == (4, 6) and tensor.dtype == torch.float32
    assert torch.equal(unscaled(tensor), product) and torch.equal(tensor + 0, product)
    assert torch.equal(torch.cat(tensor.chunk(2)), product) and torch.equal(tensor.to(torch.float64), product.double())
