"""Readers of files that a user gives: for each a small valid folder, and the call that reads it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import numpy as np
import torch
import typer
import yaml
from oracles import ROWS, SIZE, SMALL_VAE, make_engine
from PIL import Image
from safetensors.torch import load_file
from small_checkpoint import SPEC, WEIGHTS, Q, published, save, save_json

from inferix.bench.result import read_folder, read_result
from inferix.cli.generate import parse_cue
from inferix.cli.main import app
from inferix.errors import InferixError
from inferix.models import tinyworld
from inferix.models.random import random_state
from inferix.models.registry import make_preset
from inferix.models.text import umt5_checkpoint
from inferix.models.text.tiny import write_tiny_text_encoder
from inferix.models.text.umt5 import load_prompt_embeds
from inferix.models.tinyworld.words import WordEncoder
from inferix.models.wan.checkpoint import merging, read_checkpoint
from inferix.models.wan.configs import diffusers_config, diffusers_vae_config
from inferix.models.wan.family import WAN
from inferix.models.wan.names import to_format
from inferix.models.wan.random import random_transformer_state, random_vae_state
from inferix.models.wan.taehv import TinyDecoder
from inferix.models.wan.vae_checkpoint import load_decoder, load_vae
from inferix.models.wan.vae_spec import TinySpec
from inferix.runtime.config import SETTINGS, EngineConfig
from inferix.runtime.media_input import read_image, read_video
from inferix.runtime.programs.graph_store import GraphStore, stored_for
from inferix.runtime.sessions.batch_profile import BatchProfile, read_profiles, save_profile
from inferix.runtime.sessions.session import Session
from inferix.schemes.actions import read_actions
from inferix.schemes.storyboard import read_storyboard, schedule

ROOT = Path(__file__).parents[2]
SMALL = dataclasses.replace(SPEC, dim=16, ffn_dim=8, text_dim=4, freq_dim=8)
FILE = "x.safetensors"
ACTIONS = ("stay", "up", "down", "left", "right")
ABOUT = {"model": "wan-tiny", "size": [1, 2], "dtype": "float32"}


@dataclass(frozen=True)
class Reader:
    """make: write a valid file or folder below a new folder. call: read it, from the same path each time.

    targets: files that are damaged, one of them in each input; all if empty. refusals: right errors.
    """

    name: str
    make: Callable[[Path], object]
    call: Callable[[Path], object]
    targets: tuple[str, ...] = ()
    refusals: tuple[type[BaseException], ...] = (InferixError,)


# transformers and adapters


def small_weights() -> dict[str, torch.Tensor]:
    tensors = random_transformer_state(SMALL, 0, torch.float32)
    return {to_format("original", name): tensor for name, tensor in tensors.items()}


def make_checkpoint(folder: Path) -> None:
    save(small_weights(), folder / WEIGHTS)
    save_json(diffusers_config(SMALL), folder / "config.json")
    save_json({"_class_name": "WanPipeline", "boundary_ratio": None}, folder / "model_index.json")


def make_shards(folder: Path) -> None:
    tensors = small_weights()
    names = sorted(tensors)
    places = {}
    for number in range(2):
        file = f"diffusion_pytorch_model-{number + 1:05}-of-00002.safetensors"
        save({name: tensors[name] for name in names[number::2]}, folder / file)
        places |= dict.fromkeys(names[number::2], file)
    save_json({"metadata": {"total_size": 1}, "weight_map": places}, folder / f"{WEIGHTS}.index.json")
    save_json(diffusers_config(SMALL), folder / "config.json")


def make_training_file(folder: Path) -> None:
    weights = {f"model.{name}": tensor for name, tensor in small_weights().items()}
    save({"generator": weights, "generator_ema": weights, "step": 7, "args": {"lr": 0.1}}, folder / "x.pt")
    save_json(diffusers_config(SMALL), folder / "config.json")


def build(path: Path) -> None:
    WAN.load(read_checkpoint(path), "reference", torch.float32, "cpu")


def adapter() -> dict[str, torch.Tensor]:
    start = f"base_model.model.{Q}"
    return {f"{start}.lora_A.weight": torch.ones(2, 128), f"{start}.lora_B.weight": torch.ones(128, 2)}


def make_adapter(folder: Path) -> None:
    start = f"base_model.model.{Q}"
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 4})}
    save(adapter() | {f"{start}.alpha": torch.tensor(4.0)}, folder / "adapter_model.safetensors", metadata)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "rank_pattern": {"x.q": 2}}
    save_json(config | {"use_rslora": False, "alpha_pattern": {}}, folder / "adapter_config.json")


def make_pickled_adapter(folder: Path) -> None:
    save({"generator_lora": adapter(), "step": 1}, folder / "x.pt")


@cache
def base(folder: Path) -> Any:
    return read_checkpoint(save(published(), folder.parent / "base" / FILE))


def merge(path: Path) -> None:
    folder = path if path.is_dir() else path.parent
    merged = merging(base(folder), [(path, 1.0)])
    merged("blocks.0.self_attn.q.weight", base(folder).tensors["blocks.0.self_attn.q.weight"])


# decoders and text


def make_vae(folder: Path) -> None:
    save(random_vae_state(SMALL_VAE, 0, torch.float32), folder / FILE)
    save_json(diffusers_vae_config(SMALL_VAE), folder / "config.json")


def make_taehv(folder: Path) -> None:
    with torch.device("meta"):
        module = TinyDecoder(TinySpec(z_dim=4, widths=(8, 8, 4, 4), time=(1, 2, 2), patch=1))
    save(random_state(module, 0, torch.float32), folder / "x.pth")


def make_encoder(folder: Path) -> None:
    write_tiny_text_encoder(folder, "diffusers", 8, 0, torch.float32)


def read_encoder(folder: Path) -> None:
    with patch.object(umt5_checkpoint, "read_tokenizer"):  # a reader of its own below, and a slow one
        umt5_checkpoint.load_text((folder / "text_encoder", folder), 12, torch.float32, "cpu")


def make_original_encoder(folder: Path) -> None:
    write_tiny_text_encoder(folder, "original", 8, 0, torch.float32)


def read_original_encoder(folder: Path) -> None:
    with patch.object(umt5_checkpoint, "read_tokenizer"):
        file = folder / umt5_checkpoint.ORIGINAL_FILE
        umt5_checkpoint.load_text((file, folder), 12, torch.float32, "cpu")


def make_words(folder: Path) -> None:
    shipped = Path(tinyworld.__file__).parent / "weights" / "words.safetensors"
    save({"rows.weight": load_file(shipped)["rows.weight"][:, :4]}, folder / FILE)


# sessions and graphs


@cache
def engine() -> Any:
    return make_engine("self-forcing", "float32", denoising_step_list=[1000])


def make_session(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with engine().open(prompt_embeds=ROWS.float(), size=SIZE, seed=1) as session:
        list(session.stream(1, decode=False))
        session.save(folder / FILE)


def restore(folder: Path) -> None:
    Session.restore(engine(), folder / FILE).close()


@cache
def graphs() -> Any:
    return make_engine(executor="fused", denoising_step_list=[1000]).executor.graph_of


def make_graphs(folder: Path) -> None:
    stored = make_engine(executor="fused", denoising_step_list=[1000], graphs=str(folder))
    with stored.open(prompt_embeds=ROWS, size=SIZE) as session:
        list(session.stream(1, decode=False))
    (path,) = folder.glob("block-*.json")
    path.rename(folder / "block-0.json")


def read_graphs(folder: Path) -> None:
    stored_for(folder)
    GraphStore.open(folder, graphs(), create=False).programs()


# pictures and videos


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (24, 32, 3)).astype(np.uint8)


def make_image(name: str, **options: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels()).save(folder / name, **options)

    return make


def make_video(name: str, codec: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with av.open(str(folder / name), "w") as container:
            stream: Any = container.add_stream(codec, rate=8)
            stream.width, stream.height, stream.pix_fmt = 32, 24, "rgb8" if codec == "gif" else "yuv420p"
            stream.thread_count = 1
            for seed in range(4):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels(seed), format="rgb24")))
            container.mux(stream.encode(None))

    return make


# texts


def make_text(name: str, content: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, "utf-8")

    return make


CONFIG = {
    "model": "wan-tiny", "preset": "self-forcing", "prompt": "a cat", "seconds": 2.0, "blocks": 2, "seed": 3,
    "out": "x.mp4", "fit": "crop", "prompt_at": ["1.0 a dog"], "size": "64x64", "lora_scale": 0.5, "json": False,
    "set": {"local_attn_size": 6, "denoising_step_list": [1000, 500]},
}  # fmt: skip


@cache
def generate() -> Any:
    command: Any = typer.main.get_command(app)
    return command.commands["generate"]


def read_config(folder: Path) -> None:
    """The options of `inferix generate --config` and the settings in it, without the run."""
    with generate().make_context("generate", ["--config", str(folder / "x.yaml")]) as context:
        settings = context.meta["inferix.settings"]
        for text in context.params["prompt_at"]:
            parse_cue(text)
    make_preset("self-forcing", **{key: value for key, value in settings.items() if key not in SETTINGS})
    EngineConfig.of("x", "self-forcing", **{key: value for key, value in settings.items() if key in SETTINGS})


def read_cues(folder: Path) -> None:
    cues = read_storyboard(folder / "x.yaml")
    schedule(cues, make_preset("self-forcing"), 20, 16, 4)


def make_profiles(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_profile(folder / "x.json", ABOUT, (64, 32), BatchProfile({1: 0.5, 2: 0.7}))
    save_profile(folder / "x.json", ABOUT | {"dtype": "bfloat16"}, (64, 32), BatchProfile({1: 0.5}))


def make_result(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads((ROOT / "bench/results/tinyworld-stream-cpu.json").read_text("utf-8"))
    (folder / "x.json").write_text(json.dumps(content), "utf-8")


def read_results(folder: Path) -> None:
    read_result(folder / "x.json")
    read_folder(folder)


def inside(name: str, read: Callable[..., object], *arguments: Any, **options: Any) -> Callable[[Path], object]:
    """A call that reads one file of the folder."""
    return lambda folder: read(folder / name, *arguments, **options)


# Of the copy of click that this version of typer uses.
CLICK_ERROR = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
CPU = (torch.float32, "cpu")
IMAGES: Mapping[str, dict[str, Any]] = {
    "png": {}, "jpg": {"exif": Image.Exif()}, "gif": {"save_all": True, "append_images": [Image.fromarray(pixels(1))]},
    "webp": {}, "bmp": {}, "tiff": {"compression": "tiff_lzw"}, "ppm": {}, "avif": {},
}  # fmt: skip
VIDEOS = {"mp4": "mpeg4", "webm": "libvpx", "avi": "mpeg4", "ts": "mpeg2video", "ogg": "libvpx", "gif": "gif"}

READERS: dict[str, Reader] = {
    reader.name: reader
    for reader in (
        Reader("checkpoint", make_checkpoint, build),
        Reader("checkpoint-config", make_checkpoint, build, ("config.json", "model_index.json")),
        Reader("checkpoint-shards", make_shards, build),
        Reader("checkpoint-pt", make_training_file, inside("x.pt", build)),
        Reader("adapter", make_adapter, merge),
        Reader("adapter-pt", make_pickled_adapter, inside("x.pt", merge)),
        Reader("vae", make_vae, inside(FILE, load_vae, None, "cpu")),
        Reader("vae-pth", lambda folder: save(random_vae_state(SMALL_VAE, 0, torch.float32), folder / "x.pth"),
               inside("x.pth", load_decoder, *CPU)),
        Reader("taehv-pth", make_taehv, inside("x.pth", load_decoder, *CPU)),
        Reader("text-encoder", make_encoder, read_encoder,
               ("text_encoder/config.json", "text_encoder/model.safetensors")),
        Reader("text-encoder-pth", make_original_encoder, read_original_encoder, (umt5_checkpoint.ORIGINAL_FILE,)),
        Reader("tokenizer", make_encoder, inside("tokenizer", umt5_checkpoint.read_tokenizer),
               ("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")),
        Reader("words", make_words, inside(FILE, WordEncoder.from_file, 12, *CPU)),
        Reader("prompt-embeds", lambda folder: save({"prompt_embeds": torch.ones(3, 4)}, folder / FILE),
               inside(FILE, load_prompt_embeds, 12, 4)),
        Reader("session", make_session, restore),
        Reader("graph-store", make_graphs, read_graphs),
        *(Reader(f"image-{name}", make_image(f"x.{name}", **options), inside(f"x.{name}", read_image, (16, 16)))
          for name, options in IMAGES.items()),
        *(Reader(f"video-{name}", make_video(f"x.{name}", codec), inside(f"x.{name}", read_video, (16, 16), 16.0))
          for name, codec in VIDEOS.items()),
        Reader("config-yaml", make_text("x.yaml", yaml.safe_dump(CONFIG)), read_config,
               refusals=(InferixError, CLICK_ERROR, typer.Exit)),
        Reader("storyboard", make_text("x.yaml", "- at: 1.5\n  prompt: a dog\n- at: 3\n  prompt: a cat\n"), read_cues),
        Reader("actions-json", make_text("x.json", '["up", "stay", "left", "left"]'),
               lambda folder: read_actions(str(folder / "x.json"), ACTIONS)),
        Reader("actions-text", make_text("x.txt", "8R 4U stay 2left d"),
               lambda folder: read_actions((folder / "x.txt").read_bytes().decode("utf-8", "replace"), ACTIONS)),
        Reader("batch-profiles", make_profiles, inside("x.json", read_profiles, ABOUT)),
        Reader("bench-result", make_result, read_results),
    )
}  # fmt: skip
