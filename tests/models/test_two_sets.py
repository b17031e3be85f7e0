"""Checkpoints with two sets of weights: twins of SGF+, and the experts of Wan 2.2."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_checkpoint import SPEC, WEIGHTS, published, same, save, weights

import inferix
from inferix.errors import CheckpointError, UsageError
from inferix.export.checkpoint import convert, write_random
from inferix.models.registry import MODELS, inspect, make_preset, read_checkpoint
from inferix.models.wan.names import twin_name, twin_of
from inferix.models.wan.write_checkpoint import adapter_change, random_lora
from inferix.runtime.execution.loading import weight_sets

NAMES = {
    "blocks.3.self_attn.q.bias": "blocks.3.self_attn.q.memory_bias",
    "blocks.0.norm3.weight": "blocks.0.norm3.memory_weight",
    "blocks.0.modulation": "blocks.0.memory_modulation",
    "blocks.11.ffn.2.weight": "blocks.11.ffn.2.memory_weight",
    "patch_embedding.weight": "memory_patch_embedding.weight",
    "text_embedding.2.bias": "memory_text_embedding.2.bias",
    "time_projection.1.weight": "memory_time_projection.1.weight",
    "head.modulation": "memory_head.modulation",
    "head.head.weight": "memory_head.head.weight",
}


def with_twins(seed: int = 3) -> dict[str, torch.Tensor]:
    return published() | {twin_name(name): tensor for name, tensor in published(seed=seed).items()}


def test_names_of_twins_are_the_published_ones() -> None:
    assert {name: twin_name(name) for name in NAMES} == NAMES
    assert {name: twin_of(twin) for name, twin in NAMES.items()} == {name: name for name in NAMES}
    assert twin_of("blocks.0.self_attn.q.weight") is None


@pytest.mark.parametrize("prefix", ["", "model.", "model._fsdp_wrapped_module."])
def test_twins_are_the_memory_set(tmp_path: Path, prefix: str) -> None:
    """Under any prefix and key; a tensor without a twin is its own."""
    tensors = with_twins()
    del tensors[twin_name("blocks.0.ffn.0.weight")]
    named = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    checkpoint = read_checkpoint(save({"generator_ema": named}, tmp_path / "model.pt"))
    assert checkpoint.sets == ("plain", "memory") and checkpoint.form == "sgf-plus" and checkpoint.spec == SPEC
    (memory,), plain, other = checkpoint.more, weights(), weights(3)
    assert same(checkpoint.tensors, plain)
    assert same(memory, other | {"blocks.0.ffn.up.weight": plain["blocks.0.ffn.up.weight"]})


def test_a_plain_file_is_both_sets_of_a_preset_with_memory(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save({"generator_ema": published()}, tmp_path / "model.pt"))
    assert checkpoint.form == "sgf" and checkpoint.sets == ("plain",)
    first, second = weight_sets(checkpoint, make_preset("sgf-plus"))
    assert first is second


@pytest.mark.parametrize("form", ["sgf-plus", "a14b", "a14b-diffusers"])
def test_random_ones_come_back_and_convert(tmp_path: Path, form: str) -> None:
    write_random("wan-tiny", form, tmp_path / "one")
    checkpoint = read_checkpoint(tmp_path / "one")
    assert checkpoint.form == form and len(checkpoint.more) == 1
    assert not torch.equal(checkpoint.tensors["head.linear.weight"], checkpoint.more[0]["head.linear.weight"])
    assert inspect(tmp_path / "one")["weight_sets"] == list(checkpoint.sets)
    other = "original" if form == "a14b-diffusers" else "diffusers"
    if form == "sgf-plus":
        with pytest.raises(UsageError, match="diffusers"):
            convert(tmp_path / "one", tmp_path / "two", other)
        other = "original"
    convert(tmp_path / "one", tmp_path / "two", other)
    again = read_checkpoint(tmp_path / "two")
    assert again.sets == checkpoint.sets and again.boundary_ratio == checkpoint.boundary_ratio
    assert same(again.tensors, checkpoint.tensors) and same(again.more[0], checkpoint.more[0])


@pytest.mark.parametrize("form", ["sgf-plus", "a14b"])
def test_an_adapter_is_merged_into_both_sets(tmp_path: Path, form: str) -> None:
    write_random("wan-tiny", form, tmp_path / "one")
    save_file(adapter := random_lora(MODELS["wan-tiny"], 3), tmp_path / "lora.safetensors")
    convert(tmp_path / "one", tmp_path / "two", "original", lora=tmp_path / "lora.safetensors")
    before, after, name = read_checkpoint(tmp_path / "one"), read_checkpoint(tmp_path / "two"), "blocks.1.ffn.up.weight"
    change = adapter_change(name, before.tensors[name], adapter)
    for one, other in ((before.tensors, after.tensors), (before.more[0], after.more[0])):
        assert (other[name] - one[name] - change).abs().max() <= 1e-6 < change.abs().max()


def experts(folder: Path, boundary: float | None = 0.875) -> Path:
    for name, seed in (("transformer", 0), ("transformer_2", 3)):
        save(published(seed=seed), folder / name / WEIGHTS)
    if boundary is not None:
        (folder / "model_index.json").write_text(json.dumps({"boundary_ratio": boundary}), "utf-8")
    return folder


def test_the_expert_for_high_noise_is_the_first(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(experts(tmp_path))
    assert checkpoint.sets == ("high-noise", "low-noise") and checkpoint.boundary_ratio == 0.875
    assert same(checkpoint.tensors, weights()) and same(checkpoint.more[0], weights(3))
    assert len(checkpoint.files) == 2


def test_sets_that_a_preset_does_not_run_are_refused_before_weights(tmp_path: Path) -> None:
    plain = save({"generator_ema": published()}, tmp_path / "plain" / "model.pt")
    memory = save({"generator_ema": with_twins()}, tmp_path / "memory" / "model.pt")
    pair = experts(tmp_path / "pair")
    for path, preset, named in (
        (plain, "self-forcing-a14b", r"1 set.*self-forcing"),
        (memory, "sgf", r"plain, memory.*sgf-plus"),
        (pair, "self-forcing", r"low-noise in transformer_2.*self-forcing-a14b"),
    ):
        with pytest.raises(UsageError, match=named):
            inferix.load(path, preset=preset, device="cpu")
    with pytest.raises(UsageError, match=r"boundary_ratio is 0\.9.*0\.875"):
        inferix.load(pair, preset="self-forcing-a14b", device="cpu", boundary_ratio=0.9)


@pytest.mark.parametrize("boundary", [1.5, "high", True, 1])
def test_an_index_with_another_boundary_is_refused(tmp_path: Path, boundary: object) -> None:
    with pytest.raises(UsageError, match="boundary_ratio"):
        read_checkpoint(experts(tmp_path, boundary))


def test_experts_of_two_sizes_are_refused(tmp_path: Path) -> None:
    write_random("wan-tiny", "diffusers", tmp_path / "other")
    experts(tmp_path / "pair")
    (tmp_path / "pair" / "transformer_2" / WEIGHTS).unlink()
    (tmp_path / "other" / "transformer" / WEIGHTS).rename(tmp_path / "pair" / "transformer_2" / WEIGHTS)
    with pytest.raises((UsageError, CheckpointError), match="transformer_2"):
        read_checkpoint(tmp_path / "pair")
