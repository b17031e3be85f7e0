"""Layers of the transformer for a CPU: equal to the plain ones, over the same weights."""

import pytest
import torch

from inferix.models.registry import MODELS, family_of
from inferix.models.wan.transformer import TimeEmbedding
from inferix.models.wan.transformer_cpu import CpuTimeEmbedding, with_cpu_layers

SPEC = MODELS["tinyworld"]


class Plain:
    """Self-attention without a cache."""

    def attend(self, layer, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def model_of(dtype):
    torch.manual_seed(0)
    model = family_of(SPEC).build(SPEC).to(dtype).requires_grad_(False)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return model


def outputs(model, sessions, frames, dtype):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(sessions, frames, SPEC.in_channels, 4, 4, generator=generator).to(dtype)
    timesteps = torch.tensor([900.0, 250.0])[: sessions * frames].reshape(sessions, frames)
    actions = torch.eye(SPEC.action_dim, dtype=dtype)[: sessions * frames].reshape(sessions, frames, -1)
    text = model.embed_text(torch.randn(1, SPEC.text_len, SPEC.text_dim, generator=generator).to(dtype))
    return model(latents, timesteps, text, Plain(), actions)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.0)])
def test_a_pass_equals_that_of_the_plain_layers(dtype, allowed):
    plain = model_of(dtype)
    fast = with_cpu_layers(plain)
    # One frame of two sessions and two frames of one have the same timesteps: only the shape differs.
    for sessions, frames in ((1, 1), (1, 2), (1, 2)):
        want = outputs(plain, sessions, frames, dtype)
        assert (outputs(fast, sessions, frames, dtype) - want).abs().max() <= allowed * want.abs().max()


def test_kept_time_embeddings_follow_values_and_shapes():
    plain = model_of(torch.float64)
    fast = with_cpu_layers(plain)
    embed, cached = plain.time_embedding, fast.time_embedding
    assert type(embed) is TimeEmbedding and type(cached) is CpuTimeEmbedding
    added = torch.ones(1, 1, SPEC.dim, dtype=torch.float64)
    for timesteps in (torch.tensor([[900.0, 250.0]]), torch.tensor([[900.0], [250.0]]), torch.tensor([[900.0, 251.0]])):
        for more in (None, added, 2 * added):
            for got, want in zip(cached(timesteps, more), embed(timesteps, more), strict=True):
                assert torch.equal(got, want)
            assert cached(timesteps, more) is cached(timesteps.clone(), more)


def test_weights_are_shared_and_the_plain_model_stays_as_it_is():
    plain = model_of(torch.float32)
    classes = [type(part) for part in plain.modules()]
    fast = with_cpu_layers(plain)
    assert [type(part) for part in plain.modules()] == classes
    assert all(a is b for a, b in zip(plain.parameters(), fast.parameters(), strict=True))
    meta = plain.to("meta")
    assert with_cpu_layers(meta) is meta
