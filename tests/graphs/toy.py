"""A small video transformer that is not Wan: other names, grouped heads, torch's own RMS norm, no cross-attention."""

import torch
import torch.nn.functional as F
from torch import nn

from inferix.graphs.paged_attention import PagedAttention
from inferix.graphs.tables import PassTables
from inferix.kernels.frame_noise import frame_noise

HEADS, KV_HEADS, DIM, PATCH, CHANNELS, LAYERS, TEXT = 4, 2, 64, 2, 3, 2, 10
WIDTH, KV_WIDTH = HEADS * DIM, KV_HEADS * DIM
SIGMA, FOLLOWING = 0.8, 0.5


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k, self.to_v = (nn.Linear(WIDTH, KV_WIDTH, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = nn.RMSNorm(WIDTH, eps=1e-5), nn.RMSNorm(KV_WIDTH, eps=1e-5)
        self.to_out, self.wide, self.narrow = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.table = nn.Parameter(torch.zeros(3, WIDTH))

    def forward(self, x, time, layer, attention):
        shift, scale, gate = (time[:, :, None] + self.table).unbind(-2)
        frames = F.layer_norm(x, (WIDTH,), eps=1e-5).reshape(len(x), time.shape[1], -1, WIDTH)
        h = ((scale[:, :, None] + 1) * frames + shift[:, :, None]).reshape(x.shape)
        q, k = self.q_norm(self.to_q(h)), self.k_norm(self.to_k(h))
        q, k, v = (part.reshape(*part.shape[:2], -1, DIM) for part in (q, k, self.to_v(h)))
        attended = self.to_out(attention.attend(layer, q, k, v).reshape(x.shape))
        x = x + (gate[:, :, None] * attended.reshape(frames.shape)).reshape(x.shape)
        return x + self.narrow(F.gelu(self.wide(self.norm(x)), approximate="tanh"))


class Toy(nn.Module):
    """Tokens of latent frames, given a time and a text; one solver step of its own."""

    def __init__(self):
        super().__init__()
        self.inward, self.outward = nn.Linear(PATCH**2 * CHANNELS, WIDTH), nn.Linear(WIDTH, PATCH**2 * CHANNELS)
        self.time = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, WIDTH))
        self.text = nn.Linear(TEXT, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, values):
        x = values["latents"]
        rows, frames, channels, height, width = x.shape
        grid = (height // PATCH, width // PATCH)
        parts = [PassTables(*(values[name] for name in ("pages", "page_table", "page_count", "rope_time")))]
        kv = [values[f"kv.{layer}"] for layer in range(LAYERS)]
        attention = PagedAttention(parts, kv, values["rope_rows"], values["rope_columns"])
        tokens = x.reshape(rows, frames, channels, grid[0], PATCH, grid[1], PATCH).permute(0, 1, 3, 5, 4, 6, 2)
        h = self.inward(tokens.reshape(rows, -1, PATCH**2 * channels))
        time = self.time(values["timesteps"][..., None].to(h.dtype))
        h = h + self.text(values["text"]).mean(1, keepdim=True)
        for index, layer in enumerate(self.layers):
            h = layer(h, time, index, attention)
        out = self.outward(h).reshape(rows, frames, *grid, PATCH, PATCH, channels)
        velocity = out.permute(0, 1, 6, 2, 4, 3, 5).reshape(x.shape)
        noise = frame_noise(values["frames"], values["noise_key"], (channels, height, width), draw=1).to(x.dtype)
        return {"latents": (x - SIGMA * velocity) * (1 - FOLLOWING) + noise * FOLLOWING}
