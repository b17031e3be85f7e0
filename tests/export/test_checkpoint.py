"""Every format round-trips to the same outputs, misfits are listed by name, and reading stays within memory."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from inferix import load
from inferix.errors import InferixError, UsageError
from inferix.export.checkpoint import convert, write_random
from inferix.models.files import read_tensors, write_tensors
from inferix.models.registry import FORMATS, MODELS, inspect, read_checkpoint
from inferix.models.state_dicts import bare_name
from inferix.models.wan.random import random_tiny_decoder_state
from inferix.models.wan.taehv import TinyDecoder
from inferix.models.wan.write_checkpoint import random_lora

SIZE = (32, 32)
ONE_SET = [name for name, form in FORMATS.items() if not form.experts and not form.twins]  # of weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {form: write_random("wan-tiny", form, root / form, seed=1) for form in ONE_SET}


def first_block(model, **kwargs):
    with load(model, device="cpu", **kwargs).open(prompt="a cat", size=SIZE) as session:
        (block,) = session.stream(1)
    return block


@pytest.fixture(scope="module")
def block_of(folders):
    """The first block of a format's folder."""
    return cache(lambda form: first_block(folders[form]))


@pytest.mark.parametrize("form", [form for form in ONE_SET if form != "original"])
def test_every_format_gives_the_same_video(block_of, form):
    original, other = block_of("original"), block_of(form)
    assert original.latents.std() > 0.1
    if FORMATS[form].lora:  # taken off and merged again, in float32
        assert (original.latents - other.latents).abs().max() <= 1e-4
    else:
        assert torch.equal(original.latents, other.latents)
        assert (original.frames == other.frames).all()


@pytest.mark.parametrize("form", ["original", "diffusers", "longlive2"])
def test_the_5b_model_with_its_own_vae(form, tmp_path):
    """48 channels, 16x in space, in every format it is published in; pictures from both of its decoders."""
    folder = write_random("wan-tiny-5b", form, tmp_path / form, seed=1)
    again = convert(folder, tmp_path / "out", "original" if form == "diffusers" else "diffusers")
    blocks = []
    for path in (folder, again):
        engine = load(path, preset="longlive2", device="cpu", num_frame_per_block=2)
        assert engine.spec.name == "wan-tiny-5b"
        with engine.open(prompt="a cat", size=(64, 64)) as session:
            blocks.append(next(session.stream(1)))
    assert torch.equal(blocks[0].latents, blocks[1].latents)
    assert (blocks[0].frames == blocks[1].frames).all() and blocks[0].frames.shape == (5, 64, 64, 3)


def test_a_decoder_is_chosen_and_must_fit(folders, tmp_path):
    spec = MODELS["wan-tiny"]
    tiny = random_tiny_decoder_state(spec, 0, torch.float32) | {"encoder.0.weight": torch.zeros(1)}
    torch.save(tiny, tmp_path / "taew2_1.pth")
    searched = load(folders["original"], vae="taehv", base=tmp_path)
    by_path = load(folders["diffusers"], vae=tmp_path / "taew2_1.pth")
    blocks = []
    for engine in (searched, by_path):
        assert isinstance(engine.parts.vae, TinyDecoder)
        with engine.open(prompt="a cat", size=SIZE) as session:
            blocks.append(next(session.stream(1)))
    assert (blocks[0].frames == blocks[1].frames).all() and len(blocks[0].frames) == 9
    with pytest.raises(UsageError, match="vae"):
        searched.open(prompt="a", size=SIZE, video=blocks[0].frames)
    with pytest.raises(UsageError, match=r"causvid.*vae"):
        load("wan-tiny", preset="causvid", vae="taehv")
    with pytest.raises(UsageError, match="tae"):
        load(folders["original"], vae="taehv")
    other = write_random("wan-tiny-5b", "original", tmp_path / "5b")
    with pytest.raises(UsageError, match=r"48.*16"):
        load(folders["original"], vae=other)
    with pytest.raises(UsageError, match="none"):
        load(folders["original"], vae=tmp_path / "none")


@pytest.mark.parametrize("target", ["original", "diffusers"])
@pytest.mark.parametrize("form", ONE_SET)
def test_every_format_converts_to_the_same_video(folders, block_of, form, target, tmp_path):
    names = []
    convert(folders[form], tmp_path / "out", target, max_shard=1_000_000, progress=names.append)
    assert inspect(tmp_path / "out")["format"] == target
    assert len([name for name in names if "-of-" in name]) > 3
    assert torch.equal(first_block(tmp_path / "out").latents, block_of(form).latents)


def test_convert_changes_the_dtype_and_refuses_bad_choices(folders, tmp_path):
    convert(folders["causvid"], tmp_path / "half", dtype="bfloat16")
    assert inspect(tmp_path / "half")["dtypes"] == ["bfloat16"]
    WanTransformer3DModel.load_config(tmp_path / "half" / "transformer")
    for kwargs, words in (
        ({"form": "krea"}, "'krea'.*original, diffusers"),
        ({"dtype": "float33"}, "'float33'.*'float32'"),
        ({"max_shard": 0}, "max_shard.* 0"),
    ):
        with pytest.raises(UsageError, match=words):
            convert(folders["causvid"], tmp_path / "other", **kwargs)
    assert not (tmp_path / "other").exists()


def test_a_lora_is_merged_at_its_scale(folders, tmp_path):
    spec = MODELS["wan-tiny"]
    adapter = random_lora(spec, 9)
    save_file(adapter, tmp_path / "adapter.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2}))  # rank 4: half of B A
    engine = load(folders["original"], lora=tmp_path, lora_scale=3.0)
    base = load(folders["original"])
    for module in ("self_attn.q", "cross_attn.o", "ffn.0"):
        ours = module.replace("ffn.0", "ffn.up")
        a, b = (adapter[f"base_model.model.blocks.1.{module}.lora_{side}.weight"] for side in "AB")
        got, was = (e.parts.transformer.state_dict()[f"blocks.1.{ours}.weight"] for e in (engine, base))
        assert (got - (was + 3.0 * 0.5 * b @ a)).abs().max() <= 1e-6
        assert (got - was).abs().max() > 1e-4
    other = {name.replace("base_model.model.", "diffusion_model."): tensor for name, tensor in adapter.items()}
    other = {n.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for n, t in other.items()}
    other |= {n.replace("lora_down.weight", "alpha"): torch.tensor(2.0) for n in list(other) if "lora_down" in n}
    (tmp_path / "b").mkdir()
    save_file(other, tmp_path / "b" / "x.safetensors")
    again = load(folders["original"], lora=tmp_path / "b", lora_scale=3.0).parts.transformer.state_dict()
    want = engine.parts.transformer.state_dict()
    assert all(torch.equal(again[name], want[name]) for name in want)


def test_a_lora_for_another_base_is_refused(folders, tmp_path):
    wide = dataclasses.replace(MODELS["wan-tiny"], dim=384, num_layers=3)
    save_file(random_lora(wide, 0), tmp_path / "wide.safetensors")
    with pytest.raises(UsageError, match=r"\[384, 384\].*\[256, 256\]"):
        load(folders["original"], lora=tmp_path / "wide.safetensors")
    save_file({"x.weight": torch.zeros(1)}, tmp_path / "no.safetensors")
    with pytest.raises(UsageError, match=r"no\.safetensors.*x\.weight"):
        load(folders["original"], lora=tmp_path / "no.safetensors")
    with pytest.raises(UsageError, match="none"):
        load(folders["original"], lora=tmp_path / "none")
    with pytest.raises(UsageError, match=r"lora_scale.*0\.5"):
        load(folders["original"], lora_scale=0.5)


def test_quantised_weights_are_refused_by_name(folders, tmp_path):
    tensors = load_file(folders["original"] / "diffusion_pytorch_model.safetensors")
    tensors["blocks.0.ffn.0.weight"] = tensors["blocks.0.ffn.0.weight"].to(torch.int8)
    torch.save(tensors, tmp_path / "model_4o6.pt")
    with pytest.raises(UsageError, match=r"blocks\.0\.ffn\.0\.weight.*int8"):
        read_checkpoint(tmp_path / "model_4o6.pt")


def test_use_ema_chooses_averaged_or_trained_weights(folders):
    averaged, trained = (first_block(folders["self-forcing"], use_ema=ema) for ema in (True, False))
    assert not torch.equal(averaged.latents, trained.latents)


@pytest.mark.parametrize("form", ONE_SET)
def test_inspect(folders, form):
    facts = inspect(folders[form])
    detected = "original" if form == "lingbot" else form  # which is recognised by its camera
    assert (facts["format"], facts["model"], facts["num_heads"]) == (detected, "wan-tiny", 2)
    assert facts["dtypes"] == ["float32"]


def test_diffusers_itself_reads_what_is_written(folders):
    for cls, part in ((WanTransformer3DModel, "transformer"), (AutoencoderKLWan, "vae")):
        folder = folders["diffusers"] / part
        model = cls.from_config(cls.load_config(folder))
        model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"), strict=True)


def test_a_bare_file_takes_its_parts_from_base(folders, block_of, tmp_path):
    file = tmp_path / "model.pt"
    file.write_bytes((folders["self-forcing"] / FORMATS["self-forcing"].file).read_bytes())
    with pytest.raises(UsageError, match=r"VAE.*base"):
        load(file)
    for base in ("original", "diffusers"):
        assert torch.equal(first_block(file, base=folders[base]).latents, block_of("original").latents)


def test_shards_are_joined_and_a_missing_one_is_named(folders, block_of, tmp_path):
    tensors = load_file(folders["original"] / "diffusion_pytorch_model.safetensors")
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(first_block(tmp_path, base=folders["original"]).latents, block_of("original").latents)
    (tmp_path / next(iter(shards))).unlink()
    with pytest.raises(InferixError, match="diffusion_pytorch_model-00001-of-00002"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "model.blocks.0.ffn.0.weight",
        "model._fsdp_wrapped_module.blocks.0.ffn.0.weight",
        "module._orig_mod.model.blocks.0._checkpoint_wrapped_module.ffn.0.weight",
    ],
)
def test_wrappers_are_stripped(name):
    assert bare_name(name)[1] == "blocks.0.ffn.0.weight"


def test_misfits_are_listed_by_name_and_shape(folders, tmp_path):
    tensors = load_file(folders["original"] / "diffusion_pytorch_model.safetensors")
    tensors["blocks.1.self_attn.q.weight"] = torch.zeros(3, 4)
    tensors["blocks.0.extra.weight"] = torch.zeros(5)
    del tensors["head.head.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InferixError) as caught:
        load(tmp_path / "model.safetensors", base=folders["original"])
    listed = str(caught.value).split("; ")
    for parts in (
        ("head.linear.bias", "[64]"),
        ("blocks.0.extra.weight", "[5]"),
        ("blocks.1.self_attn.q.weight", "[3, 4]", "[256, 256]"),
    ):
        assert any(all(part in entry for part in parts) for entry in listed), parts


def test_files_that_are_none(folders, tmp_path):
    whole = (folders["self-forcing"] / FORMATS["self-forcing"].file).read_bytes()
    cases = {"cut.pt": whole[: len(whole) // 2], "text.pt": b"hello", "empty.safetensors": b"", "empty.pt": b""}
    cases |= {"pickle.pt": pickle.dumps({"a": 1}), "bytes.pt": b"\x80\x99abc"}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InferixError, match=name):
            read_checkpoint(tmp_path / name)
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_tensors(tmp_path / "old.pt")["a"].tolist() == [1, 1]
    save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"lm_head\.weight"):
        read_checkpoint(tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"'wan-tny'.*'wan-tiny'"):
        read_checkpoint("wan-tny")
    with pytest.raises(UsageError, match=r"'difusers'.*'diffusers'"):
        read_checkpoint(folders["original"], "difusers")


def test_pickles_do_not_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"generator": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InferixError, match=r"evil\.pt"):
        read_checkpoint(tmp_path / "evil.pt")


def test_another_models_vae_is_refused(folders, tmp_path):
    bad = tmp_path / "vae.pth"
    torch.save({"conv9.weight": torch.zeros(1)}, bad)
    with pytest.raises(InferixError, match=r"vae\.pth"):
        load(folders["original"], vae=bad)


def test_random_refuses_bad_names_and_full_folders(folders, tmp_path):
    for names, words in (
        (("wan-tiny", "diffuser", "float32"), "'diffuser'.*'diffusers'"),
        (("wan-tny", "diffusers", "float32"), "'wan-tny'.*'wan-tiny'"),
        (("wan-tiny", "diffusers", "float33"), "'float33'.*'float32'"),
    ):
        with pytest.raises(UsageError, match=words):
            write_random(names[0], names[1], tmp_path / "x", 0, names[2])
    with pytest.raises(UsageError, match=str(folders["original"])):
        write_random("wan-tiny", "original", folders["original"])
    assert not (tmp_path / "x").exists()


PEAK = """
import resource, sys
import torch
from pathlib import Path
from inferix.models.wan.checkpoint import read_checkpoint
from inferix.models.wan.family import WAN
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checkpoint = read_checkpoint(sys.argv[1])
model = WAN.load(checkpoint, "reference", torch.float32, "cpu")
total = sum(float(parameter.sum()) for parameter in model.parameters())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before * 1024)
"""


@pytest.mark.parametrize("form", [pytest.param("original", marks=pytest.mark.slow), "self-forcing"])
def test_peak_memory_stays_under_the_checkpoint_and_a_fifth(tmp_path, form, monkeypatch):
    """A 150 MB transformer, every weight touched; the other weights of a training file stay unread."""
    sizes = {"dim": 1024, "ffn_dim": 4096, "num_heads": 8, "kv_heads": 8, "num_layers": 2}
    wide = dataclasses.replace(MODELS["wan-tiny"], name="wide", **sizes)
    monkeypatch.setitem(MODELS, "wide", wide)
    folder = write_random("wide", form, tmp_path / "wide")
    file = next(iter([*folder.glob("*.pt"), *folder.glob("*.safetensors")]))
    weights = file.stat().st_size / (2 if form == "self-forcing" else 1)
    done = subprocess.run([sys.executable, "-c", PEAK, str(file)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.2 * weights


def test_files_are_readable_by_whom_new_files_are(tmp_path):
    plain, ours = tmp_path / "plain", tmp_path / "ours.safetensors"
    plain.touch()
    write_tensors({"x": torch.zeros(2)}, ours, {"format": "pt"})
    assert ours.stat().st_mode == plain.stat().st_mode
    assert load_file(ours)["x"].tolist() == [0, 0]


@pytest.mark.parametrize("target", ["original", "diffusers"])
def test_single_files_of_other_tools_are_taken_along(folders, tmp_path, target):
    models, source = tmp_path / "models", folders["original"]
    for name in ("unet", "vae", "text_encoders"):
        (models / name).mkdir(parents=True)
    shutil.copyfile(source / "diffusion_pytorch_model.safetensors", models / "unet" / "wan.safetensors")
    vae = torch.load(source / "Wan2.1_VAE.pth", weights_only=True)
    save_file({name: tensor.clone() for name, tensor in vae.items()}, models / "vae" / "wan_2.1_vae.safetensors")
    text = torch.load(source / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
    save_file(text, models / "text_encoders" / "umt5-xxl-enc-bf16.safetensors")
    shutil.copytree(source / "google", models / "google")
    expected = first_block(source)
    for model in (models, convert(models, tmp_path / "out", target)):
        block = first_block(model)
        assert torch.equal(block.latents, expected.latents) and (block.frames == expected.frames).all()


def test_a_text_encoder_is_given_by_its_path(folders, tmp_path):
    file = tmp_path / "encoder.pth"
    shutil.copyfile(folders["original"] / "models_t5_umt5-xxl-enc-bf16.pth", file)
    model = tmp_path / "model.safetensors"
    shutil.copyfile(folders["original"] / "diffusion_pytorch_model.safetensors", model)
    block = first_block(model, base=folders["original"], text_encoder=file)
    assert torch.equal(block.latents, first_block(folders["original"]).latents)
    for place in (tmp_path / "none", folders["original"] / "google"):
        with pytest.raises(UsageError, match=f"text_encoder.*{place}"):
            load(model, base=folders["original"], text_encoder=place)
    with pytest.raises(UsageError, match=rf"base.*{file}"):
        load(model, base=file)


# where checkpoints are written


FULL_DISK = """
import itertools, resource, signal, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
from inferix.errors import InferixError
from inferix.export.checkpoint import convert, write_random
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
source, out = sys.argv[1], Path(sys.argv[2])
for limit, form in itertools.product((10, 300_000), ("original", "diffusers", "krea", "self-forcing", "longlive")):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    calls = [lambda: write_random("wan-tiny", form, out)]
    if form in ("original", "diffusers"):
        calls.append(lambda: convert(source, out, form))
    for call in calls:
        try:
            call()
        except InferixError as error:
            assert type(error) is InferixError and str(out) in str(error), repr(error)
        else:
            raise AssertionError((limit, form))
        assert not list(out.parent.iterdir()), form
"""


def test_a_full_disk_is_one_error_and_leaves_nothing(folders, tmp_path):
    words = [str(folders["causvid"]), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", FULL_DISK, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_output_at_in_or_above_an_input(folders, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folders["original"], source)
    link = tmp_path / "link"
    link.symlink_to(source)
    before = sorted(source.rglob("*"))
    lora = tmp_path / "lora"
    lora.mkdir()
    save_file(random_lora(MODELS["wan-tiny"], 1), lora / "adapter.safetensors")
    for target in (source, source / "out", source / "transformer", link, link / "out", tmp_path, lora / "out"):
        with pytest.raises(UsageError, match=str(target)):
            convert(source, target, lora=lora)
    assert sorted(source.rglob("*")) == before and [file.name for file in lora.iterdir()] == ["adapter.safetensors"]


def test_destinations_that_cannot_be(folders, tmp_path):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to(tmp_path / "target")
    for target in ("file", "pipe", "nowhere", "file/out", "\0", "x" * 300):
        with pytest.raises(UsageError, match=str(tmp_path)):
            write_random("wan-tiny", "original", tmp_path / target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nowhere", "pipe"]
    assert not (tmp_path / "target").exists()


def test_two_writers_of_one_folder_do_not_mix(folders, tmp_path, monkeypatch):
    """The second begins while the first writes: one of them ends with the folder, whole, the other with an error."""
    from inferix.models.wan import family as module

    plain, begun = module.write_vae, []

    def write_vae(folder, *rest):
        begun.append(folder)
        if len(begun) == 1:
            convert(folders["causvid"], tmp_path / "out", "original")
        plain(folder, *rest)

    monkeypatch.setattr(module, "write_vae", write_vae)
    with pytest.raises(InferixError, match="out"):
        convert(folders["causvid"], tmp_path / "out", "diffusers")
    assert inspect(tmp_path / "out")["format"] == "original"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_part_that_a_stopped_run_left_is_named(tmp_path):
    (tmp_path / "out.0a1b2c3d.part").mkdir()
    with pytest.warns(UserWarning, match=r"out\.0a1b2c3d\.part"):
        write_random("wan-tiny", "original", tmp_path / "out")
    assert (tmp_path / "out.0a1b2c3d.part").is_dir() and (tmp_path / "out").is_dir()


def test_merging_beyond_the_dtype_is_refused(folders, tmp_path):
    adapter = {name: tensor * 1e4 for name, tensor in random_lora(MODELS["wan-tiny"], 1).items()}
    save_file(adapter, tmp_path / "adapter.safetensors")
    with pytest.raises(InferixError, match="float16"):
        convert(folders["original"], tmp_path / "out", dtype="float16", lora=tmp_path / "adapter.safetensors")
    with pytest.raises(UsageError, match="lora_scale"):
        convert(folders["original"], tmp_path / "out", lora=tmp_path / "adapter.safetensors", lora_scale=float("nan"))
    assert not (tmp_path / "out").exists()
