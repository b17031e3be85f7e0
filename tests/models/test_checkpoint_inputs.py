"""Checkpoints as users have them: the right weights are read, or the file is refused by what it is, soon."""

import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from small_checkpoint import SPEC, WEIGHTS, published, same, save, save_json, weights

from inferix.errors import CheckpointError, InferixError, UsageError
from inferix.models.files import LARGEST_JSON, quoted, read_json, read_tensors
from inferix.models.wan.checkpoint import read_checkpoint
from inferix.models.wan.configs import diffusers_config, original_config
from inferix.models.wan.family import WAN

RIGHT, WRONG = weights(), published(seed=1)
SECOND = "blocks.1.ffn.0.weight"


def is_right(path, **options):
    checkpoint = read_checkpoint(path, **options)
    return same(checkpoint.tensors, RIGHT) and checkpoint.spec == SPEC


def shards(tensors, folder, count=3, total=None, index=True):
    """A sharded checkpoint; returns the file of each tensor."""
    places = {}
    names = sorted(tensors)
    for number in range(count):
        file = f"diffusion_pytorch_model-{number + 1:05}-of-{total or count:05}.safetensors"
        part = names[number::count]
        save({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    if index:
        save_json({"metadata": {}, "weight_map": places}, folder / f"{WEIGHTS}.index.json")
    return places


# shards and copies


@pytest.mark.parametrize("index", [True, False])
def test_shards(tmp_path, index):
    shards(published(), tmp_path, index=index)
    assert is_right(tmp_path)


@pytest.mark.parametrize(
    "stray",
    [WEIGHTS, "diffusion_pytorch_model_old.safetensors", "diffusion_pytorch_model.fp16.safetensors",
     "diffusion_pytorch_model-00004-of-00004.safetensors", "diffusion_pytorch_model.bin", "model.pt", "last.ckpt"],
)  # fmt: skip
def test_what_an_index_does_not_name_is_not_read(tmp_path, stray):
    shards(published(), tmp_path)
    save(WRONG, tmp_path / stray)
    assert is_right(tmp_path)


@pytest.mark.parametrize(
    "copy",
    ["diffusion_pytorch_model_old.safetensors", "diffusion_pytorch_model.fp16.safetensors", "model.pt",
     "diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model.bin"],
)  # fmt: skip
def test_the_exact_name_is_read_and_no_copy(tmp_path, copy):
    save(published(), tmp_path / WEIGHTS)
    save(WRONG, tmp_path / copy)
    assert is_right(tmp_path)


def test_copies_without_the_exact_name(tmp_path):
    save(published(), tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert is_right(tmp_path)
    save(WRONG, tmp_path / "diffusion_pytorch_model_old.safetensors")
    with pytest.raises(UsageError, match="_old"):
        read_checkpoint(tmp_path)


def test_shards_of_several_or_incomplete_checkpoints(tmp_path):
    places = shards(published(), tmp_path / "a", index=False)
    shards(WRONG, tmp_path / "a", count=2, index=False)
    with pytest.raises(UsageError, match=str(tmp_path / "a")):
        read_checkpoint(tmp_path / "a")
    shards(published(), tmp_path / "b", count=2, total=3, index=False)
    with pytest.raises(InferixError, match="00003-of-00003"):
        read_checkpoint(tmp_path / "b")
    shards(published(), tmp_path / "c")
    (tmp_path / "c" / places[SECOND]).unlink()
    with pytest.raises(InferixError, match=places[SECOND]):
        read_checkpoint(tmp_path / "c")


def test_an_index_and_its_shards_must_agree(tmp_path):
    places = shards(published(), tmp_path)
    index = tmp_path / f"{WEIGHTS}.index.json"
    save_json({"weight_map": {name: file for name, file in places.items() if name != SECOND}}, index)
    with pytest.raises(InferixError, match=SECOND):
        read_checkpoint(tmp_path)
    save_json({"weight_map": places | {"blocks.9.ffn.0.weight": places[SECOND]}}, index)
    with pytest.raises(InferixError, match=r"blocks\.9"):
        read_checkpoint(tmp_path)
    save_json({"weight_map": places}, index)
    other = next(file for file in places.values() if file != places[SECOND])
    save(
        {name: tensor for name, tensor in published().items() if places[name] == other or name == SECOND},
        tmp_path / other,
    )
    with pytest.raises(InferixError, match=SECOND):
        read_checkpoint(tmp_path)


BAD_INDEXES = [
    {}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": None}, {"weight_map": {"a": 1.5}},
    {"weight_map": {"a": ["x"]}}, {"weight_map": {"a": "../x.safetensors"}}, {"weight_map": {"a": "/dev/zero"}},
    {"weight_map": {"a": "none.safetensors"}}, {"weight_map": {"a": ""}}, {"weight_map": {"a": "x\0.safetensors"}},
    {"weight_map": {"a": "x" * 5000}}, {"weight_map": {"a": "x" * 253}}, {"weight_map": {"a": "\ud800"}},
]  # fmt: skip


@pytest.mark.parametrize("index", BAD_INDEXES, ids=range(len(BAD_INDEXES)))
def test_bad_indexes(tmp_path, index):
    save(published(), tmp_path / WEIGHTS)
    save_json(index, tmp_path / f"{WEIGHTS}.index.json")
    with pytest.raises(InferixError, match=tmp_path.name):
        read_checkpoint(tmp_path)


def test_two_transformers_in_a_folder(tmp_path):
    save(published(), tmp_path / WEIGHTS)
    save(WRONG, tmp_path / "transformer" / WEIGHTS)
    with pytest.raises(UsageError, match="transformer"):
        read_checkpoint(tmp_path)
    assert is_right(tmp_path / WEIGHTS)


@pytest.mark.parametrize("folder", ["unet", "diffusion_models"])
def test_a_node_editors_folders(tmp_path, folder):
    save(published(), tmp_path / folder / "wan.safetensors")
    assert is_right(tmp_path)


# configs


@pytest.mark.parametrize(
    "config",
    [{"model_type": "umt5", "d_model": 4096, "num_heads": 64, "num_layers": 24},
    {"_class_name": "AutoencoderKLWan", "dim": 96},
     {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 8},
     {"_class_name": ["x"], "dim": 7, "num_heads": 3},
     {"_class_name": "FluxTransformer2DModel", "num_attention_heads": 24}, {}],
)  # fmt: skip
def test_a_config_of_another_kind_does_not_count(tmp_path, config):
    save_json(config, tmp_path / "config.json")
    assert is_right(save(published(), tmp_path / "model.safetensors"))


@pytest.mark.parametrize("config", [original_config(SPEC), diffusers_config(SPEC)])
def test_a_config_that_agrees(tmp_path, config):
    save_json(config, tmp_path / "config.json")
    assert is_right(save(published(), tmp_path / "model.safetensors"))
    save_json({key: value for key, value in config.items() if key != "_class_name"}, tmp_path / "config.json")
    assert is_right(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("layout", "key", "value"),
    [(original_config, key, value) for key, value in (
        ("dim", 256), ("num_layers", 30), ("ffn_dim", 8960), ("num_heads", 3), ("num_heads", "1"), ("num_heads", 0),
        ("num_heads", True), ("num_heads", -1), ("num_heads", [1]), ("num_heads", 1.0), ("freq_dim", 128),
        ("in_dim", 36), ("out_dim", 48), ("eps", "x"), ("eps", -1), ("eps", True), ("text_len", None),
        ("text_len", 10**12), ("text_len", 0), ("dim", "128" * 1000),
    )] + [(diffusers_config, key, value) for key, value in (
        ("num_attention_heads", 2), ("attention_head_dim", 64), ("text_dim", 4096), ("num_layers", 3), ("ffn_dim", 33),
        ("patch_size", [1, 1, 1]), ("patch_size", "1"), ("image_dim", 1280), ("attention_head_dim", None),
    )],
)  # fmt: skip
def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path, layout, key, value):
    save_json(layout(SPEC) | {key: value}, tmp_path / "config.json")
    file = save(published(), tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=key) as caught:
        read_checkpoint(file)
    assert len(str(caught.value)) < 1000


def test_heads_of_a_known_model_are_not_taken_from_a_config(tmp_path):
    import inferix.models.wan.random as random
    from inferix.models.registry import MODELS
    from inferix.models.wan.names import to_format

    state = random.random_transformer_state(MODELS["wan-tiny"], 0, torch.bfloat16)
    file = save({to_format("original", name): tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
    assert read_checkpoint(file).spec == MODELS["wan-tiny"]
    save_json(original_config(MODELS["wan-tiny"]) | {"num_heads": 4}, tmp_path / "config.json")
    with pytest.raises(UsageError, match=r"num_heads.* 4"):
        read_checkpoint(file)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 100_000, "[1]", "", "{", '{"dim": 1, "dim": 2}', "\xff"])
def test_texts_that_are_no_config(tmp_path, text):
    file = save(published(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InferixError, match=r"config\.json"):
        read_checkpoint(file)


def test_large_json_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(LARGEST_JSON + 1)
    with pytest.raises(InferixError, match=str(LARGEST_JSON)):
        read_json(tmp_path / "config.json")


# two experts


EXPERTS = [("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")]


@pytest.mark.parametrize("folders", EXPERTS)
def test_one_of_two_experts_is_refused_by_its_folder(tmp_path, folders):
    for folder in folders:
        save(published(), tmp_path / folder / WEIGHTS)
    assert read_checkpoint(tmp_path).sets == ("high-noise", "low-noise")
    for path in (*map(tmp_path.joinpath, folders), *(tmp_path / folder / WEIGHTS for folder in folders)):
        with pytest.raises(UsageError, match=r"noise|transformer_2"):
            read_checkpoint(path)


@pytest.mark.parametrize(("folder", "absent"), [("transformer_2", "transformer"), EXPERTS[1], EXPERTS[1][::-1]])
def test_an_expert_without_the_other_is_refused(tmp_path, folder, absent):
    save(published(), tmp_path / folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"lacks '{absent}'"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index", [{"boundary_ratio": 0.875}, {"transformer_2": ["diffusers", "WanTransformer3DModel"]}]
)
def test_models_of_two_transformers_are_refused_by_the_pipelines_index(tmp_path, index):
    save(published(), tmp_path / "transformer" / WEIGHTS)
    save_json(index, tmp_path / "model_index.json")
    with pytest.raises(CheckpointError, match="transformer_2"):
        read_checkpoint(tmp_path)
    for path in (tmp_path / "transformer", tmp_path / "transformer" / WEIGHTS):
        with pytest.raises(UsageError, match="transformer_2"):
            read_checkpoint(path)
    save_json({"boundary_ratio": None, "transformer_2": [None, None]}, tmp_path / "model_index.json")
    assert is_right(tmp_path)


@pytest.mark.parametrize("name", ["wan2.2_t2v_high_noise_14B_fp16", "Wan2_2-T2V-LowNoise", "low-noise"])
def test_one_expert_of_two_is_refused_by_its_name(tmp_path, name):
    with pytest.raises(UsageError, match=name):
        read_checkpoint(save(published(), tmp_path / f"{name}.safetensors"))


def test_two_experts_in_one_file(tmp_path):
    both = {
        f"{part}.{name}": tensor for part in ("transformer", "transformer_2") for name, tensor in published().items()
    }
    with pytest.raises(UsageError, match="transformer_2"):
        read_checkpoint(save(both, tmp_path / "both.safetensors"))


# containers, prefixes, averages


@pytest.mark.parametrize("form", ["original", "diffusers"])
@pytest.mark.parametrize(
    "prefix",
    ["model.diffusion_model.", "diffusion_model.", "model.", "module.", "_orig_mod.", "module._orig_mod.",
    "transformer.",
     "model._fsdp_wrapped_module.", "generator.model.", "net.", "pipe.dit.", "_orig_mod.module.model."],
)  # fmt: skip
def test_prefixes(tmp_path, form, prefix):
    assert is_right(
        save({f"{prefix}{name}": value for name, value in published(form).items()}, tmp_path / "x.safetensors")
    )


def test_wrappers_inside_names(tmp_path):
    inner = {
        name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): value for name, value in published().items()
    }
    assert is_right(save(inner, tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    "keys",
    [("state_dict",), ("module",), ("model_state_dict",), ("model",), ("generator",), ("ema",), ("model_ema",),
     ("generator_ema",), ("state_dict", "model"), ("module", "state_dict", "generator"), ("ema", "state_dict")],
)  # fmt: skip
def test_containers(tmp_path, keys):
    content = published()
    for key in reversed(keys):
        content = {
            key: content,
            "step": 5,
            "args": {"lr": 1.0},
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}},
        }
    assert is_right(save(content, tmp_path / "last.ckpt"))


@pytest.mark.parametrize(
    ("raw", "average"),
    [("generator", "generator_ema"), ("model", "model_ema"), ("model", "ema"), ("state_dict", "ema_state_dict"),
     ("state_dict", "state_dict_ema"), ("params", "params_ema"), ("model", "ema_model"), ("module", "ema")],
)  # fmt: skip
def test_averages(tmp_path, raw, average):
    file = save({raw: WRONG, average: published(), "ema_decay": 0.99}, tmp_path / "checkpoint.pt")
    assert is_right(file)
    assert not is_right(file, use_ema=False)
    file = save({average: WRONG, raw: published()}, tmp_path / "other.pt")
    assert is_right(file, use_ema=False)


def test_averages_by_prefix(tmp_path):
    flat = {f"model.{name}": value for name, value in WRONG.items()}
    flat |= {f"model_ema.{name}": value for name, value in published().items()} | {"model_ema.decay": torch.tensor(0.9)}
    file = save({"state_dict": flat}, tmp_path / "lightning.ckpt")
    assert is_right(file) and not is_right(file, use_ema=False)


def test_averages_alone_are_not_the_trained_weights(tmp_path):
    file = save({"ema": published()}, tmp_path / "ema.pt")
    with pytest.raises(UsageError, match="use_ema"):
        read_checkpoint(file, use_ema=False)


def test_several_transformers_in_a_file(tmp_path):
    with pytest.raises(UsageError, match=r"net|model"):
        read_checkpoint(save({"model": published(), "net": WRONG}, tmp_path / "x.pt"))
    both = {f"model.{name}": value for name, value in WRONG.items()} | published()
    with pytest.raises(UsageError, match=r"y\.pt.*model"):
        read_checkpoint(save(both, tmp_path / "y.pt"))
    assert is_right(save({"generator": published(), "critic": WRONG, "fake_score": WRONG}, tmp_path / "z.pt"))


def test_other_parts_in_a_node_editors_file(tmp_path):
    whole = {f"model.diffusion_model.{name}": value for name, value in published().items()}
    whole |= {"vae.decoder.x": torch.ones(2), "first_stage_model.x": torch.ones(1), "text_encoders.t5.x": torch.ones(3)}
    assert is_right(save(whole, tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    "more",
    [{f"model.{SECOND}": torch.ones(1)}, {f"module.{SECOND}": torch.ones(1)},
    {"blocks.1.ffn.net.0.proj.weight": torch.ones(1)},
     {"blocks.1.self_attn.to_qkv.weight": torch.ones(384, 128)}, {"extra.weight": torch.ones(1)},
     {"model.extra.weight": torch.ones(1)}],
)  # fmt: skip
def test_a_tensor_that_has_two_names_or_is_of_no_model(tmp_path, more):
    file = save(published() | more, tmp_path / "x.pt")
    with pytest.raises(InferixError, match=r"x\.pt"):
        WAN.load(read_checkpoint(file), "reference", torch.float32, "cpu")


# dtypes


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bool", "float8_e4m3fn", "float8_e5m2", "complex64"])
def test_dtypes_that_are_no_weights(tmp_path, dtype):
    kind = getattr(torch, dtype)
    file = save(published() | {SECOND: published()[SECOND].to(kind)}, tmp_path / "x.pt")
    with pytest.raises(UsageError, match=f"{SECOND}.*{dtype}"):
        read_checkpoint(file)


@pytest.mark.parametrize(
    "scale",
    ["blocks.0.ffn.0.scale_weight", "blocks.0.ffn.0.weight_scale", "blocks.0.ffn.0.weight_scale_inv", "scaled_fp8",
     "blocks.0.ffn.0.comfy_quant", "blocks.0.ffn.0.weight.absmax", "blocks.0.ffn.0.SCB", "blocks.0.ffn.0.input_scale",
     "blocks.0.ffn.0.weight.quant_state.bitsandbytes__nf4"],
)  # fmt: skip
def test_scaled_weights_are_refused_in_any_dtype(tmp_path, scale):
    for prefix in ("", "model.diffusion_model."):
        parts = {f"{prefix}{name}": value for name, value in published().items()} | {f"{prefix}{scale}": torch.ones(1)}
        with pytest.raises(UsageError, match=scale):
            read_checkpoint(save(parts, tmp_path / "x.safetensors"))


def test_weights_that_are_not_finite(tmp_path):
    broken = published()[SECOND].clone()
    broken[3, 5] = float("nan")
    file = save(published() | {SECOND: broken}, tmp_path / "x.safetensors")
    with pytest.raises(InferixError, match=r"blocks\.1\.ffn\.up\.weight"):
        WAN.load(read_checkpoint(file), "reference", torch.float32, "cpu")
    large = save(published() | {SECOND: broken.nan_to_num(1e6)}, tmp_path / "y.safetensors")
    WAN.load(read_checkpoint(large), "reference", torch.float32, "cpu")
    with pytest.raises(InferixError, match="float16"):
        WAN.load(read_checkpoint(large), "reference", torch.float16, "cpu")


# what is no checkpoint, or costs more than it is


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 5676070424\n"
FILES = {
    "pointer.safetensors": (POINTER, "LFS"), "pointer.pt": (POINTER, "LFS"),
    "model.gguf": (b"GGUF\x03\0\0\0" * 9, "GGUF"),
    "gguf.safetensors": (b"GGUF\x03\0\0\0" * 9, "GGUF"), "page.safetensors": (b"<!DOCTYPE html><html>", "web page"),
    "page.pt": (b"\n<html><body>", "web page"), "empty.pt": (b"", "empty"), "empty.safetensors": (b"", "empty"),
    f"{WEIGHTS}.index.json": (b'{"weight_map": {}}', "index"), "config.json": (b"{}", "config"),
    "index.safetensors": (b'{"weight_map": {}}', "index"), "text.pt": (b"hello", "text.pt"),
    "cut.safetensors": (struct.pack("<Q", 10**9) + b"{", "cut.safetensors"),
    "pickle.pt": (pickle.dumps({"a": 1}), "pickle.pt"),
    "zip.pt": (b"PK\3\4" + b"\0" * 40, "cut short"), "header.safetensors": (struct.pack("<Q", 2**63) + b"{}", "header"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_refused_files_are_named_by_their_content(tmp_path, name):
    content, word = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InferixError, match=word):
        read_checkpoint(tmp_path / name)


def test_a_file_is_read_by_content_whatever_its_name(tmp_path):
    save(published(), tmp_path / "x.safetensors").rename(tmp_path / "x.ckpt")
    assert is_right(tmp_path / "x.ckpt")
    save(published(), tmp_path / "y.pt").rename(tmp_path / "y.safetensors")
    with pytest.raises(UsageError, match=r"torch\.save"):
        read_checkpoint(tmp_path / "y.safetensors")
    (tmp_path / "y.safetensors").rename(tmp_path / "y.bin")
    assert is_right(tmp_path / "y.bin")


def test_one_shard_given_as_model(tmp_path):
    places = shards(published(), tmp_path)
    with pytest.raises(UsageError, match="of 3"):
        read_checkpoint(tmp_path / places[SECOND])
    only = tmp_path / "one" / "diffusion_pytorch_model-00001-of-00001.safetensors"
    assert is_right(save(published(), only)) and is_right(only.parent)


def test_an_adapter_given_as_model(tmp_path):
    parts = {
        "blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 4),
        "blocks.0.self_attn.q.lora_B.weight": torch.ones(4, 2),
    }
    with pytest.raises(UsageError, match="LoRA"):
        read_checkpoint(save(parts, tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("none")]
)
@pytest.mark.parametrize("name", [WEIGHTS, "model.pt", f"{WEIGHTS}.index.json", "config.json", "model_index.json"])
def test_pipes_and_devices_are_not_read(tmp_path, make, name):
    if name.endswith(".json"):
        save(published(), tmp_path / WEIGHTS)
    make(tmp_path / name)
    if make is not os.mkfifo and not (tmp_path / name).exists() and name.endswith(".json"):
        return  # a link to nothing is no file
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(InferixError):
            read_checkpoint(path)


@pytest.mark.parametrize("number", ["2", "100000", "1000000000", "9" * 5000, "01", "-1"])
def test_layers_are_counted_not_taken_from_a_name(tmp_path, number):
    file = save(published() | {f"blocks.{number}.norm3.weight": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(InferixError, match="blocks"):
        WAN.load(read_checkpoint(file), "reference", torch.float32, "cpu")


def test_sizes_that_are_none(tmp_path):
    for name, shape in (("patch_embedding.weight", (0, 16, 1, 2, 2)), ("patch_embedding.weight", (128,)),
                        ("head.head.weight", (64,)), ("blocks.0.ffn.0.weight", ()), ("text_embedding.0.weight", (128,)),
                        ("patch_embedding.weight", (128, 16, 1, 0, 2)), ("time_embedding.0.weight",
                        (128, 0))):  # fmt: skip
        with pytest.raises(InferixError):
            WAN.load(
                read_checkpoint(save(published() | {name: torch.zeros(shape)}, tmp_path / "x.pt")), "reference",
                torch.float32, "cpu",
            )  # fmt: skip


def test_expanded_tensors_are_refused(tmp_path):
    wide = torch.zeros(1).expand(10**9)
    for content in (
        {"a": wide},
        {"generator": {"a": wide}},
        {"x": {"y": {"z": wide}}},
        {"a": torch.zeros(2, 1).expand(2, 9)},
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(InferixError, match=r"x\.pt.*'[az]'"):
            read_tensors(tmp_path / "x.pt")
    many = torch.zeros(1000)
    torch.save({str(number): many for number in range(50)}, tmp_path / "many.pt")
    with pytest.raises(InferixError, match="claim"):
        read_tensors(tmp_path / "many.pt")
    torch.save({"a": many, "b": many, "c": many[3:].view(997)}, tmp_path / "tied.pt")
    assert read_tensors(tmp_path / "tied.pt").keys() == {"a", "b", "c"}


def test_tensors_of_too_many_dimensions(tmp_path):
    tensors = {"a": torch.ones(1).reshape([1] * 65)}
    save(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        with pytest.raises(CheckpointError, match=rf"{name}.*'a'.*65"):
            read_tensors(tmp_path / name)


def test_tensors_that_are_not_plain(tmp_path):
    for tensor in (torch.ones(2, 2).to_sparse(), torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
                   torch.empty(10**9, device="meta")):  # fmt: skip
        torch.save({"a": tensor}, tmp_path / "x.pt")
        with pytest.raises(InferixError, match=r"x\.pt"):
            read_tensors(tmp_path / "x.pt")


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_that_claims_memory_is_refused(tmp_path, archive):
    """Unpickling plain values may call `bytearray`, here with 1 TiB."""
    torch.save({"a": torch.ones(2), "b": torch.Size([7])}, tmp_path / "x.pt", _use_new_zipfile_serialization=archive)
    claim = b"cbuiltins\nbytearray\n\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R"
    if archive:
        with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
            for part in old.infolist():
                pickled = b"\x80\x02}X\x01\x00\x00\x00a" + claim + b"s."
                new.writestr(part.filename, pickled if part.filename.endswith(".pkl") else old.read(part))
    else:
        size = b"ctorch\nSize\n"
        content = (tmp_path / "x.pt").read_bytes()
        assert content.count(size) == 1
        (tmp_path / "y.pt").write_bytes(content.replace(size, claim + b"0" + size))
    with pytest.raises(CheckpointError, match="bytearray"):
        read_tensors(tmp_path / "y.pt")


def test_an_archive_without_checksums_is_read(tmp_path):
    content = bytearray(save(published(), tmp_path / "x.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        part = next(part for part in archive.infolist() if part.filename.endswith("data.pkl"))
    for place in range(len(content)):
        if content[place : place + 4] == part.CRC.to_bytes(4, "little"):
            content[place : place + 4] = b"\0\0\0\0"
    (tmp_path / "y.pt").write_bytes(content)
    assert read_tensors(tmp_path / "y.pt").keys() == published().keys()


def test_an_archive_in_several_parts_is_refused(tmp_path):
    content = bytearray(save(published(), tmp_path / "x.pt").read_bytes())
    end = content.rindex(b"PK\5\6")
    record = struct.pack("<4sLQL", b"PK\6\7", 0, 0, 9)  # the locator of a large archive's end, in 9 parts
    content[end:end] = record
    (tmp_path / "y.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"y\.pt"):
        read_tensors(tmp_path / "y.pt")


def test_dicts_that_refer_to_each_other_end(tmp_path):
    part = {"a": torch.ones(2)}
    for _ in range(40):
        part = {str(number): part for number in range(20)}
    torch.save(part, tmp_path / "x.pt")
    assert len(read_tensors(tmp_path / "x.pt")) == 20
    part = {"a": torch.ones(2)}
    for _ in range(8):
        part = dict.fromkeys(("model", "state_dict", "net", "ema"), part)
    torch.save(part, tmp_path / "y.pt")
    with pytest.raises(InferixError, match="64"):
        read_checkpoint(tmp_path / "y.pt")


def test_compressed_archives_are_refused(tmp_path):
    torch.save(published(), tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as old,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    with pytest.raises(InferixError, match="compressed"):
        read_checkpoint(tmp_path / "y.pt")


def test_long_values_are_cut():
    assert len(quoted("x" * 10**6)) < 300 and quoted("ab") == "'ab'"
    assert json.loads(quoted(12)) == 12
