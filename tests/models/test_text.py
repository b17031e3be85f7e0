"""Prompt cleaning, the tiny UMT5 encoder in both checkpoint layouts, and files of prompt embeddings."""

import json
import re
import warnings

import pytest
import torch
from safetensors.torch import save_file
from transformers import UMT5EncoderModel

from inferix.errors import InferixError, UsageError
from inferix.models.text.tiny import ORIGINAL_FILE, ORIGINAL_TOKENIZER, write_tiny_text_encoder
from inferix.models.text.umt5 import clean_prompt, load_prompt_embeds
from inferix.models.text.umt5_checkpoint import ORIGINAL_NAMES, TIED, load_text, to_original

FLOAT = (512, torch.float32, "cpu")


def from_diffusers(folder, dtype=torch.float32):
    return load_text((folder / "text_encoder", folder / "tokenizer"), 512, dtype, "cpu")


def from_original(folder, dtype=torch.float32):
    return load_text((folder / ORIGINAL_FILE, folder / ORIGINAL_TOKENIZER), 512, dtype, "cpu")


@pytest.fixture(scope="module")
def diffusers_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    write_tiny_text_encoder(folder, "diffusers", 64, 0, torch.float32)
    return folder


@pytest.fixture
def original_dir(tmp_path):
    write_tiny_text_encoder(tmp_path, "original", 64, 0, torch.float32)
    return tmp_path


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a cat", "a cat"),
        ("  a\tcat \n\n on   a mat ", "a cat on a mat"),
        ("cat &amp;amp; dog", "cat & dog"),
        ("&lt;b&gt;", "<b>"),
        ("&nbsp;a&amp;nbsp;b", "a b"),
        ("the cafÃ©", "the café"),
        ("“curly”", '"curly"'),
        ("一只猫\u3000在跑", "一只猫 在跑"),
        ("x" * 20000, "x" * 20000),
    ],
)
def test_cleaning(raw, clean):
    assert clean_prompt(raw) == clean


@pytest.mark.parametrize("raw", ["", "  \n\t", "&nbsp;", "&amp;nbsp;"])
def test_empty_prompt_is_refused(raw):
    with pytest.raises(UsageError, match="prompt"):
        clean_prompt(raw)


def test_long_prompt_is_refused():
    with pytest.raises(UsageError, match=r"20001.*20000"):
        clean_prompt("x" * 20001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_after_the_prompt_are_zero(diffusers_dir, dtype):
    got = from_diffusers(diffusers_dir, dtype).encode(" a  cat ")
    assert got.shape == (512, 64) and got.dtype == dtype and not got.requires_grad
    length = len("a cat") + 1  # one token per byte and the end token
    assert (got[:length].abs().amax(1) > 0).all()
    assert torch.equal(got[length:], torch.zeros(512 - length, 64, dtype=dtype))


def test_padding_does_not_reach_the_prompt(diffusers_dir):
    encoder = from_diffusers(diffusers_dir, torch.float64)
    tokens = encoder.tokenizer("a red cat", return_tensors="pt")
    assert tokens["input_ids"][0, -1] == encoder.tokenizer.eos_token_id == 1
    with torch.no_grad():
        want = encoder.model(tokens["input_ids"]).last_hidden_state[0]
    got = encoder.encode("a red cat")[: len(want)]
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_long_prompt_is_cut_and_keeps_the_end_token(diffusers_dir):
    encoder = from_diffusers(diffusers_dir)
    with pytest.warns(UserWarning, match=r"800 tokens.*512") as caught:
        got = encoder.encode("cat " * 200)
    assert got.shape == (512, 64) and (got.abs().amax(1) > 0).all()
    with pytest.warns(UserWarning, match=r"515 tokens.*512"):
        assert torch.equal(got, encoder.encode(("cat " * 200)[:511] + "dog"))
    assert len(str(caught[0].message)) < 400


@pytest.mark.parametrize("length", [0, 511])
def test_an_empty_prompt_and_one_that_just_fits_are_encoded_without_a_warning(diffusers_dir, length):
    encoder = from_diffusers(diffusers_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rows = encoder.encode("x" * length)
    assert int((rows.abs().amax(1) > 0).sum()) == length + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_layouts_agree(diffusers_dir, original_dir, dtype):
    prompt = "Ein Hund läuft; 一只猫"
    got, want = from_original(original_dir, dtype).encode(prompt), from_diffusers(diffusers_dir, dtype).encode(prompt)
    assert got.dtype == dtype and torch.equal(got, want)


def test_seed_and_width_are_used_and_the_global_generator_is_not(diffusers_dir, tmp_path):
    before = torch.get_rng_state()
    write_tiny_text_encoder(tmp_path, "original", 32, 1, torch.float32)
    write_tiny_text_encoder(tmp_path, "diffusers", 64, 1, torch.float32)
    assert torch.equal(before, torch.get_rng_state())
    assert from_original(tmp_path).encode("cat").shape == (512, 32)
    assert not torch.equal(from_diffusers(tmp_path).encode("cat"), from_diffusers(diffusers_dir).encode("cat"))


def test_original_embedding_stays_tied(original_dir):
    model = from_original(original_dir).model
    assert model.shared.weight is model.encoder.embed_tokens.weight
    assert not any(p.is_meta for p in model.parameters())


def test_names_cover_transformers(diffusers_dir):
    names = set(UMT5EncoderModel.from_pretrained(diffusers_dir / "text_encoder").state_dict()) - {TIED}
    assert len({to_original(name) for name in names}) == len(names)
    assert len(ORIGINAL_NAMES) == len(set(ORIGINAL_NAMES.values()))
    want = "blocks.12.ffn.gate.0.weight"
    assert to_original("encoder.block.12.layer.1.DenseReluDense.wi_0.weight") == want


def test_misfits_of_the_original_file_are_named(original_dir):
    tensors = torch.load(original_dir / ORIGINAL_FILE, weights_only=True)
    del tensors["blocks.0.norm2.weight"]
    tensors["blocks.1.attn.k.weight"] = torch.zeros(3, 5)
    tensors["extra.weight"] = torch.zeros(1)
    torch.save(tensors, original_dir / ORIGINAL_FILE)
    with pytest.raises(InferixError) as caught:
        from_original(original_dir)
    listed = str(caught.value)
    assert "encoder.block.0.layer.1.layer_norm.weight" in listed and "extra.weight" in listed
    assert "encoder.block.1.layer.0.SelfAttention.k.weight" in listed and "[3, 5]" in listed and "[64, 64]" in listed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "UMT5 encoder"),
        ({"token_embedding.weight": torch.zeros(4)}, "UMT5 encoder"),
        ([torch.zeros(1)], "list"),
        ({"a": 1}, ORIGINAL_FILE),
        (range(3), ORIGINAL_FILE),
    ],
    ids=["empty", "flat-embedding", "list", "number", "object"],
)
def test_other_pickles_are_refused(original_dir, content, message):
    torch.save(content, original_dir / ORIGINAL_FILE)
    with pytest.raises(InferixError, match=message):
        from_original(original_dir)


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_truncated_original_file_is_refused(original_dir, keep):
    path = original_dir / ORIGINAL_FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InferixError, match=ORIGINAL_FILE):
        from_original(original_dir)


def test_misfits_of_the_diffusers_folder_are_named(tmp_path):
    write_tiny_text_encoder(tmp_path, "diffusers", 64, 0, torch.float32)
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 3, "d_ff": 48}))
    with pytest.raises(InferixError) as caught:
        from_diffusers(tmp_path)
    assert re.search("num_layers.* 3.* 2.*d_ff.* 48.* 64|d_ff.* 48.* 64.*num_layers.* 3.* 2", str(caught.value))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_corrupt_diffusers_files_are_refused(tmp_path, name):
    write_tiny_text_encoder(tmp_path, "diffusers", 64, 0, torch.float32)
    (tmp_path / "text_encoder" / name).write_bytes(b"not this")
    with pytest.raises(InferixError, match=name):
        from_diffusers(tmp_path)


def test_corrupt_tokenizer_is_refused(tmp_path):
    write_tiny_text_encoder(tmp_path, "diffusers", 64, 0, torch.float32)
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_bytes(b"not this")
    with pytest.raises(InferixError, match="tokenizer_config"):
        from_diffusers(tmp_path)


def test_missing_paths_are_refused(diffusers_dir, original_dir):
    tokenizer, nowhere = diffusers_dir / "tokenizer", diffusers_dir / "nowhere"
    with pytest.raises(UsageError, match="nowhere"):
        load_text((nowhere, tokenizer), *FLOAT)
    for model in (diffusers_dir / "text_encoder", original_dir / ORIGINAL_FILE):
        with pytest.raises(UsageError, match=r"tokenizer.*nowhere"):
            load_text((model, nowhere), *FLOAT)


def embeds_file(folder, **tensors):
    save_file(tensors, folder / "embeds.safetensors")
    return folder / "embeds.safetensors"


@pytest.mark.parametrize("shape", [(5, 8), (1, 5, 8), (1, 8), (6, 8)])
def test_embeds_are_padded_with_zero_rows(tmp_path, shape):
    embeds = torch.randn(shape).bfloat16()
    got = load_prompt_embeds(embeds_file(tmp_path, prompt_embeds=embeds), text_len=6, text_dim=8)
    rows = embeds.reshape(-1, 8)
    assert got.shape == (6, 8) and got.dtype == torch.bfloat16
    assert torch.equal(got[: len(rows)], rows) and not got[len(rows) :].any()


@pytest.mark.parametrize(
    ("embeds", "message"),
    [
        (torch.zeros(5, 7), r"\[5, 7\].*\[1\.\.6, 8\]"),
        (torch.zeros(7, 8), r"\[7, 8\].*\[1\.\.6, 8\]"),
        (torch.zeros(0, 8), r"\[0, 8\].*\[1\.\.6, 8\]"),
        (torch.zeros(2, 5, 8), r"\[2, 5, 8\].*\[1\.\.6, 8\]"),
        (torch.zeros(8), r"\[8\].*\[1\.\.6, 8\]"),
        (torch.zeros(5, 8, dtype=torch.int64), "floating-point"),
        (torch.full((5, 8), torch.nan), "finite"),
    ],
)
def test_unfit_embeds_are_refused(tmp_path, embeds, message):
    with pytest.raises(UsageError, match=message):
        load_prompt_embeds(embeds_file(tmp_path, prompt_embeds=embeds), text_len=6, text_dim=8)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int8", "bool", "complex64"])
def test_embeddings_in_a_dtype_of_no_embeddings(tmp_path, dtype):
    embeds = torch.ones(3, 8).to(getattr(torch, dtype))
    with pytest.raises(UsageError, match=dtype):
        load_prompt_embeds(embeds, 6, 8)
    with pytest.raises(UsageError, match=dtype):
        load_prompt_embeds(embeds_file(tmp_path, prompt_embeds=embeds), 6, 8)


def test_long_names_are_cut_in_the_message(tmp_path):
    path = embeds_file(tmp_path, **{"x" * 5000: torch.ones(1)})
    with pytest.raises(UsageError) as caught:
        load_prompt_embeds(path, 6, 8)
    assert "xxx" in str(caught.value) and len(str(caught.value)) < 1000


def test_unreadable_embeds_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="absent"):
        load_prompt_embeds(tmp_path / "absent.safetensors", 6, 8)
    with pytest.raises(UsageError, match=str(tmp_path)):
        load_prompt_embeds(tmp_path, 6, 8)
    path = embeds_file(tmp_path, prompt_embed=torch.zeros(5, 8), other=torch.zeros(1))
    with pytest.raises(UsageError, match=r"'prompt_embed'.*expected.*'prompt_embeds'"):
        load_prompt_embeds(path, 6, 8)
    for keep in (0, 20, 100):
        path.write_bytes(path.read_bytes()[:keep] or b"")
        with pytest.raises(UsageError, match=path.name):
            load_prompt_embeds(path, 6, 8)
        path = embeds_file(tmp_path, prompt_embeds=torch.zeros(5, 8))
