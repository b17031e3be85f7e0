"""Run a checkpoint whose tensors have names of their own, under a decoding scheme of its own, from two YAML files.

    python examples/own_checkpoint.py

A file of random weights stands for yours. The command for the same:
inferix generate --model mine/model.pt --preset mine.yaml --names mine-names.yaml --size 32x32 --blocks 1 -o mine.mp4
"""

from pathlib import Path

import torch

import inferix
from inferix.checkpoint import write_random

Path("mine.yaml").write_text(
    "base: self-forcing\nnum_frame_per_block: 2\ndenoising_step_list: [1000, 500]\nlocal_attn_size: 6\nsink_size: 2\n"
)
Path("mine-names.yaml").write_text(
    "base: original\ncontainers: [student]\nstrip: [net.]\nnames:\n  blocks.*: layers.*\n  head.linear: to_pixels\n"
)
folder = write_random("wan-tiny", "causvid", "mine")  # with a VAE and a text encoder
weights = torch.load(folder / "model.pt", weights_only=True)["generator"]
renamed = {}
for name, tensor in weights.items():
    mine = name.removeprefix("model.").replace("head.head", "to_pixels")
    renamed["net." + ("layers." + mine.removeprefix("blocks.") if mine.startswith("blocks.") else mine)] = tensor
torch.save({"student": renamed}, folder / "model.pt")

engine = inferix.load(folder / "model.pt", preset="mine.yaml", names="mine-names.yaml", device="cpu")
with engine.open(prompt="a paper boat on a canal", size=(32, 32)) as session:
    for block in session.stream(blocks=1):
        print(f"block {block.index}: latents {list(block.latents.shape)}, {len(block.frames)} frames")
