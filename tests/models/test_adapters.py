"""An adapter is merged at the strength its file states, in every published form, or refused with a reason."""

import json
import math
import warnings

import pytest
import torch
from small_checkpoint import OURS, SPEC, UP, Q, published, save, save_json, weights

from inferix.errors import InferixError, UsageError
from inferix.models.wan.checkpoint import merging, read_checkpoint
from inferix.models.wan.family import WAN
from inferix.models.wan.names import TABLES, to_format
from inferix.runtime.execution.lora_adapter import Adapter


def pair(rank, wide, high, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, wide, generator=generator), torch.randn(high, rank, generator=generator)


DOWN, UPWARD = pair(4, 128, 128, 1)  # of Q
DOWN8, UPWARD8 = pair(8, 128, 32, 2)  # of UP
PRODUCT, PRODUCT8 = UPWARD @ DOWN, UPWARD8 @ DOWN8
NAMES = {Q: (DOWN, UPWARD), UP: (DOWN8, UPWARD8)}


def named(start="", down=".lora_A.weight", up=".lora_B.weight", modules=(Q, UP), rename=lambda module: module):
    """The two pairs under names of some trainer."""
    parts = {}
    for module in modules:
        parts[f"{start}{rename(module)}{down}"], parts[f"{start}{rename(module)}{up}"] = NAMES[module]
    return parts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return read_checkpoint(save(published(), tmp_path_factory.mktemp("base") / "model.safetensors"))


def changes(checkpoint, lora, factor=1.0, partial=False):
    """Return the difference that merging makes to each parameter it changes, by our names."""
    change = merging(checkpoint, [(lora, factor)], partial)
    differences = {name: change(name, tensor) - tensor for name, tensor in checkpoint.tensors.items()}
    return {name: value for name, value in differences.items() if value.any()}


def check(checkpoint, lora, expected, **options):
    """`expected` is by the original's module names, of weights, or by our parameter names."""
    expected = {f"{OURS[name]}.weight" if name in OURS else name: value for name, value in expected.items()}
    merged = changes(checkpoint, lora, **options)
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        assert (merged[name] - value.view(merged[name].shape)).abs().max() <= 1e-4, name


def to_diffusers(module):
    return to_format("diffusers", f"{OURS[module]}.weight").removesuffix(".weight")


def underscored(module):
    return module.replace(".", "_")


FORMS = {
    "peft": named("base_model.model."),
    "peft-of-a-wrapper": named("base_model.model.model."),
    "peft-adapter-name": named("base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight"),
    "diffusers": named("transformer.", rename=to_diffusers),
    "diffusers-without-prefix": named(rename=to_diffusers),
    "old-diffusers": named("transformer.", ".lora.down.weight", ".lora.up.weight", rename=to_diffusers),
    "node-editor": named("diffusion_model.", ".lora_down.weight", ".lora_up.weight"),
    "node-editor-whole": named("model.diffusion_model."),
    "kohya": named("lora_unet_", ".lora_down.weight", ".lora_up.weight", rename=underscored),
    "kohya-two-underscores": named("lora_unet__", ".lora_down.weight", ".lora_up.weight", rename=underscored),
    "kohya-diffusers": named(
        "lora_transformer_", ".lora_down.weight", ".lora_up.weight", rename=lambda name: underscored(to_diffusers(name))
    ),
    "kohya-compiled": named(
        "lora_unet_", ".lora_down.weight", ".lora_up.weight",
        rename=lambda name: underscored(name).replace("blocks_0_", "blocks_0__orig_mod_"),
    ),
    "fsdp": named("base_model.model.", rename=lambda name: name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module.")),
    "ddp-and-compile": named("module._orig_mod."),
    "checkpointed": named(rename=lambda name: name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module.")),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_names_and_mixed_ranks(checkpoint, tmp_path, form):
    check(checkpoint, save(FORMS[form], tmp_path / "lora.safetensors"), {Q: PRODUCT, UP: PRODUCT8})


@pytest.mark.parametrize(
    "keys", [("generator_lora",), ("state_dict",), ("model",), ("module",), ("state_dict", "model")]
)
def test_containers(checkpoint, tmp_path, keys):
    content = {"step": 3, "optimizer": {"state": {}}, "critic_lora": named(modules=[Q])}
    inner = content
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
    inner[keys[-1]] = FORMS["peft"]
    check(checkpoint, save(content, tmp_path / "lora.pt"), {Q: PRODUCT, UP: PRODUCT8})


def test_every_layer_of_both_tables_is_found_by_dots_and_underscores(checkpoint, tmp_path):
    for number, (form, table) in enumerate(TABLES.items()):
        for style in (str, underscored):
            parts, expected = {}, {}
            for name, tensor in checkpoint.tensors.items():
                if tensor.ndim < 2 or not name.endswith(".weight"):
                    continue
                down, up = pair(2, tensor[0].numel(), tensor.shape[0], number)
                module = to_format(form, name).removesuffix(".weight")
                start = "lora_unet_" if style is underscored else ""
                parts[f"{start}{style(module)}.lora_down.weight"], parts[f"{start}{style(module)}.lora_up.weight"] = (
                    down,
                    up,
                )
                expected[name] = up @ down
            assert len(expected) > 20 and len(table) > 20
            check(checkpoint, save(parts, tmp_path / f"{form}-{style.__name__}.safetensors"), expected)


def test_alpha_of_each_layer_and_a_factor(checkpoint, tmp_path):
    alphas = {f"{Q}.alpha": torch.tensor(2.0), f"{UP}.alpha": torch.tensor([16])}
    lora = save(named(down=".lora_down.weight", up=".lora_up.weight") | alphas, tmp_path / "lora.safetensors")
    check(checkpoint, lora, {Q: 3 * 2 / 4 * PRODUCT, UP: 3 * 16 / 8 * PRODUCT8}, factor=3.0)
    some = save(named() | {f"{Q}.alpha": torch.tensor(2.0)}, tmp_path / "some.safetensors")
    check(checkpoint, some, {Q: 0.5 * PRODUCT, UP: PRODUCT8})


CONFIGS = {
    "alpha": ({"r": 4, "lora_alpha": 8, "rank_pattern": {UP: 8}}, 8 / 4, 8 / 8),
    "no-pattern-for-another-rank": ({"r": 4, "lora_alpha": 8}, 8 / 4, 8 / 8),
    "rank-stabilised": (
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"ffn.0": 8}}, 8 / 4**0.5, 8 / 8**0.5
    ),
    "alpha-pattern": (
        {"r": 4, "lora_alpha": 8, "rank_pattern": {UP: 8}, "alpha_pattern": {"blocks.0.ffn.0": 2}}, 8 / 4, 2 / 8
    ),
    "patterns-that-are-expressions": (
        {"r": 8, "lora_alpha": 8, "rank_pattern": {r"^blocks\.\d+\.self_attn\.(q|k)": 4},
         "alpha_pattern": {r".*self_attn\.q": 12}}, 12 / 4, 8 / 8,
    ),
    "targets": ({"r": 4, "lora_alpha": 2.5, "target_modules": ["q", "ffn.0"]}, 2.5 / 4, 2.5 / 8),
    "targets-by-expression": ({"r": 4, "lora_alpha": 2, "target_modules": r".*\.(q|0)"}, 2 / 4, 2 / 8),
    "all-linear": ({"r": 4, "lora_alpha": 2, "target_modules": "all-linear"}, 2 / 4, 2 / 8),
    "says-nothing-of-strength": ({"peft_type": "LORA", "base_model_name_or_path": "x"}, 1, 1),
    "alpha-alone": ({"lora_alpha": 2}, 2 / 4, 2 / 8),
    "negative": ({"r": 4, "lora_alpha": -4}, -1, -4 / 8),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("place", ["folder", "peft-file", "metadata"])
def test_strength_by_a_config(checkpoint, tmp_path, case, place):
    config, scale, scale8 = CONFIGS[case]
    expected = {Q: scale * PRODUCT, UP: scale8 * PRODUCT8}
    if place == "metadata":
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
        lora = save(named("transformer."), tmp_path / "lora.safetensors", metadata)
    else:
        lora = save(FORMS["peft"], tmp_path / "adapter_model.safetensors")
        save_json(config, tmp_path / "adapter_config.json")
        lora = tmp_path if place == "folder" else lora
    check(checkpoint, lora, expected)


def test_plain_metadata(checkpoint, tmp_path):
    lora = save(named(modules=[Q]), tmp_path / "lora.safetensors", {"rank": "4", "lora_alpha": "8"})
    check(checkpoint, lora, {Q: 2 * PRODUCT})


def test_metadata_of_a_trainer_whose_alpha_is_in_the_weights(checkpoint, tmp_path):
    """Files that musubi's tools convert keep ss_network_alpha, which their weights have taken in already."""
    metadata = {"ss_network_alpha": "2", "ss_network_dim": "4"}
    check(checkpoint, save(named("diffusion_model."), tmp_path / "a.safetensors", metadata), {Q: PRODUCT, UP: PRODUCT8})
    with pytest.raises(UsageError, match="ss_network_alpha"):
        changes(checkpoint, save(FORMS["kohya"], tmp_path / "b.safetensors", metadata))


def test_a_config_beside_a_file_of_another_name_counts_if_it_agrees(checkpoint, tmp_path):
    file = save(named(modules=[Q]), tmp_path / "style.safetensors")
    config = tmp_path / "adapter_config.json"
    save_json({"r": 4, "lora_alpha": 8, "target_modules": ["self_attn.q"]}, config)
    check(checkpoint, file, {Q: 2 * PRODUCT})
    for other in ({"r": 64, "lora_alpha": 64, "target_modules": ["q"]},
    {"r": 4, "lora_alpha": 8, "target_modules": ["k"]},
                  {"r": 4, "lora_alpha": 8}, {"lora_alpha": 8, "target_modules": ["q"]}):  # fmt: skip
        save_json(other, config)
        with pytest.raises(UsageError, match="adapter_config"):
            changes(checkpoint, file)
        own = save(named(modules=[Q]) | {f"{Q}.alpha": torch.tensor(2.0)}, tmp_path / "own.safetensors")
        check(checkpoint, own, {Q: 0.5 * PRODUCT})


@pytest.mark.parametrize("conflict", ["tensor", "metadata"])
def test_strength_that_is_stated_twice_must_agree(checkpoint, tmp_path, conflict):
    parts = named(modules=[Q]) | ({f"{Q}.alpha": torch.tensor(2.0)} if conflict == "tensor" else {})
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}
    save(parts, tmp_path / "adapter_model.safetensors", metadata if conflict == "metadata" else None)
    save_json({"r": 4, "lora_alpha": 2}, tmp_path / "adapter_config.json")
    check(checkpoint, tmp_path, {Q: 0.5 * PRODUCT})
    save_json({"r": 4, "lora_alpha": 8}, tmp_path / "adapter_config.json")
    with pytest.raises(UsageError, match="adapter_config"):
        changes(checkpoint, tmp_path)


BAD_CONFIGS = [
    {"r": 16, "lora_alpha": 8}, {"r": 4, "lora_alpha": 8, "rank_pattern": {UP: 16}}, {"r": 4}, {"r": "4",
    "lora_alpha": 8},
    {"r": 0, "lora_alpha": 8}, {"r": True, "lora_alpha": 8}, {"r": 4, "lora_alpha": math.nan},
    {"r": 4, "lora_alpha": "8"},
    {"r": 4, "lora_alpha": math.inf}, {"r": 4, "lora_alpha": 10**400}, {"r": 4, "lora_alpha": 8, "use_rslora": "yes"},
    {"r": 4, "lora_alpha": 8, "rank_pattern": [1]}, {"r": 4, "lora_alpha": 8, "rank_pattern": {"q": 0.5}},
    {"r": 4, "lora_alpha": 8, "alpha_pattern": {"q": None}}, {"r": 4, "lora_alpha": 8, "alpha_pattern": {"(": 1}},
    {"r": 4, "lora_alpha": 8, "target_modules": ["k"]}, {"r": 4, "lora_alpha": 8, "target_modules": [3]},
    {"r": 4, "lora_alpha": 8, "target_modules": "(a+)+$"}, {"r": 4, "lora_alpha": 8, "target_modules": "(.*)*.*.*.*x"},
    {"r": 4, "lora_alpha": 8, "use_dora": True}, {"r": 4, "lora_alpha": 8, "fan_in_fan_out": True},
    {"peft_type": "LOHA", "r": 4, "lora_alpha": 8}, {"peft_type": 3, "r": 4, "lora_alpha": 8},
    {"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa_niter_16"},
]  # fmt: skip


@pytest.mark.parametrize("config", BAD_CONFIGS, ids=range(len(BAD_CONFIGS)))
@pytest.mark.parametrize("place", ["folder", "metadata"])
def test_bad_configs_are_refused(checkpoint, tmp_path, config, place):
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    save(named("transformer."), tmp_path / "adapter_model.safetensors", metadata if place == "metadata" else None)
    if place == "folder":
        save_json(config, tmp_path / "adapter_config.json")
    with pytest.raises(UsageError, match="adapter_config" if place == "folder" else "lora_adapter_metadata"):
        changes(checkpoint, tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[1]", '{"r": 4, "r": 8, "lora_alpha": 8}'])
def test_texts_that_are_no_config(checkpoint, tmp_path, text):
    file = save(named(), tmp_path / "a" / "lora.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(InferixError, match="lora_adapter_metadata"):
        changes(checkpoint, file)
    file = save(named(), tmp_path / "b" / "lora.safetensors")
    file.with_name("adapter_config.json").write_text(text)
    with pytest.raises(InferixError, match="adapter_config"):
        changes(checkpoint, file.parent)


def test_differences_of_weights_biases_norms_and_modulation(checkpoint, tmp_path):
    def noise(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))

    parts = named("diffusion_model.", ".lora_down.weight", ".lora_up.weight", [Q]) | {
        f"diffusion_model.{Q}.diff_b": noise(128), "diffusion_model.blocks.0.self_attn.norm_q.diff": noise(128),
        "diffusion_model.blocks.1.norm3.diff": noise(128), "diffusion_model.blocks.1.norm3.diff_b": noise(128),
        "diffusion_model.blocks.0.diff_m": noise(1, 6, 128), "diffusion_model.head.modulation.diff": noise(1, 2, 128),
        "diffusion_model.head.head.diff": noise(64, 128),
        "diffusion_model.patch_embedding.diff": noise(128, 16, 1, 2, 2),
    }  # fmt: skip
    expected = {
        Q: PRODUCT, f"{Q}.bias": noise(128), "blocks.0.self_attn.norm_q.weight": noise(128),
        "blocks.1.norm_cross.weight": noise(128), "blocks.1.norm_cross.bias": noise(128),
        "blocks.0.modulation": noise(1, 6, 128), "head.modulation": noise(1, 2, 128),
        "head.linear.weight": noise(64, 128), "patch_embedding.weight": noise(128, 16, 1, 2, 2),
    }  # fmt: skip
    check(checkpoint, save(parts, tmp_path / "lora.safetensors"), expected)
    other = {
        "transformer.blocks.1.scale_shift_table.diff": noise(1, 6, 128),
        "transformer.scale_shift_table.diff": noise(1, 2, 128),
    }
    expected = {"blocks.1.modulation": noise(1, 6, 128), "head.modulation": noise(1, 2, 128)}
    check(checkpoint, save(other, tmp_path / "other.safetensors"), expected)


def test_the_bias_of_a_pair_is_scaled_with_it(checkpoint, tmp_path):
    bias = torch.ones(128)
    save(named(modules=[Q]) | {f"{Q}.lora_B.bias": bias}, tmp_path / "adapter_model.safetensors")
    save_json({"r": 4, "lora_alpha": 2, "lora_bias": True}, tmp_path / "adapter_config.json")
    check(checkpoint, tmp_path, {Q: 0.5 * PRODUCT, f"{Q}.bias": 0.5 * bias})


def test_the_patch_convolution(checkpoint, tmp_path):
    down, up = torch.randn(4, 16, 1, 2, 2), torch.randn(128, 4, 1, 1, 1)
    for name, (first, second) in {"whole": (down, up), "flat": (down.flatten(1), up.flatten(1))}.items():
        parts = {"patch_embedding.lora_A.weight": first, "patch_embedding.lora_B.weight": second}
        expected = {"patch_embedding.weight": up.flatten(1) @ down.flatten(1)}
        check(checkpoint, save(parts, tmp_path / f"{name}.safetensors"), expected)


def test_half_precision_adapters_are_summed_in_float32(checkpoint, tmp_path):
    parts = {name: tensor.bfloat16() for name, tensor in named().items()}
    expected = {
        Q: UPWARD.bfloat16().float() @ DOWN.bfloat16().float(),
        UP: UPWARD8.bfloat16().float() @ DOWN8.bfloat16().float(),
    }
    check(checkpoint, save(parts, tmp_path / "lora.safetensors"), expected)


REFUSED = {  # parts of a file, and a word of the reason
    "nothing": ({}, "no tensors"),
    "alphas-alone": ({f"{Q}.alpha": torch.tensor(1.0)}, Q),
    "one-half": ({f"{Q}.lora_A.weight": DOWN}, Q),
    "ranks-differ": ({f"{Q}.lora_A.weight": DOWN, f"{Q}.lora_B.weight": UPWARD[:, :3]}, Q),
    "rank-zero": ({f"{Q}.lora_A.weight": DOWN[:0], f"{Q}.lora_B.weight": UPWARD[:, :0]}, Q),
    "flat": ({f"{Q}.lora_A.weight": DOWN.flatten(), f"{Q}.lora_B.weight": UPWARD}, Q),
    "not-finite": (named() | {f"{Q}.lora_A.weight": DOWN / 0}, Q),
    "alpha-not-finite": (named() | {f"{Q}.alpha": torch.tensor(math.nan)}, "alpha"),
    "alpha-in-fp8": (named() | {f"{Q}.alpha": torch.tensor(1.0).to(torch.float8_e4m3fn)}, "alpha"),
    "two-alphas": (named() | {f"{Q}.alpha": torch.ones(2)}, "alpha"),
    "integers": ({name: tensor.to(torch.int8) for name, tensor in named().items()}, "int8"),
    "fp8": ({name: tensor.to(torch.float8_e4m3fn) for name, tensor in named().items()}, "float8_e4m3fn"),
    "twice-by-prefix": (named() | named("diffusion_model."), "two names"),
    "twice-by-spelling": (named() | named(down=".lora_down.weight", up=".lora_up.weight"), "twice"),
    "twice-by-format": (named() | named(rename=to_diffusers), "twice"),
    "twice-by-underscores": (named() | FORMS["kohya"], "twice"),
    "pair-and-difference": (named() | {f"{Q}.diff": torch.ones(128, 128)}, "twice"),
    "bias-twice": (named() | {f"{Q}.diff_b": torch.ones(128), f"{Q}.lora_B.bias": torch.ones(128)}, "twice"),
    "two-adapters": (
        named("", ".lora_A.one.weight", ".lora_B.one.weight", [Q])
        | named("", ".lora_A.two.weight", ".lora_B.two.weight", [UP]), "several",
    ),
    "dora": (named() | {f"{Q}.dora_scale": torch.ones(128)}, "DoRA"),
    "dora-of-peft": (named() | {f"{Q}.lora_magnitude_vector": torch.ones(128)}, "DoRA"),
    "loha": ({f"lora_unet_{underscored(Q)}.hada_w1_a": DOWN}, "LoHa"),
    "lokr": ({f"{Q}.lokr_w1": DOWN}, "LoKr"),
    "two-experts": (named("transformer.") | named("transformer_2."), "transformer_2"),
    "other-names": ({"x.weight": DOWN}, "x.weight"),
    "another-model": (named(rename=lambda name: name.replace("blocks.0", "double_blocks.0")), "double_blocks"),
    "text-encoder": (named() | {"lora_te_x.lora_down.weight": DOWN, "lora_te_x.lora_up.weight": UPWARD}, "lora_te_x"),
    "a-layer-that-is-not-there": (named() | named(rename=lambda name: name.replace("blocks.0", "blocks.7")),
    "blocks.7"),
    "transposed": ({f"{UP}.lora_A.weight": UPWARD8.T, f"{UP}.lora_B.weight": DOWN8.T}, r"\[128, 32\]"),
    "difference-of-another-shape": ({f"{Q}.diff": torch.ones(128)}, r"\[128\]"),
    "bias-that-is-not-there": ({"blocks.0.self_attn.norm_q.diff_b": torch.ones(128)}, "norm_q.bias"),
    "unknown-beside": (named() | {"blocks.0.self_attn.q.weight": torch.ones(128, 128)}, "q.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(checkpoint, tmp_path, case):
    parts, word = REFUSED[case]
    with pytest.raises(InferixError, match=word):
        changes(checkpoint, save(parts, tmp_path / "lora.pt"))


def test_a_partial_fit_is_merged_if_asked_for_and_says_what_is_left_out(checkpoint, tmp_path):
    parts = (
        named() | named(rename=lambda name: name.replace("blocks.0", "blocks.7")) | {"blocks.0.x.lora_A.weight": DOWN}
    )
    lora = save(parts, tmp_path / "lora.safetensors")
    with pytest.warns(UserWarning, match=r"blocks\.0\.x.*blocks\.7"):
        check(checkpoint, lora, {Q: PRODUCT, UP: PRODUCT8}, partial=True)
    none = save({"blocks.7.ffn.0.lora_A.weight": DOWN8, "blocks.7.ffn.0.lora_B.weight": UPWARD8}, tmp_path / "none.pt")
    with pytest.raises(UsageError, match=r"blocks\.7"):
        changes(checkpoint, none, partial=True)


def test_an_adapter_that_changes_nothing_says_so(checkpoint, tmp_path):
    zeros = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in named().items()}
    with pytest.warns(UserWarning, match=r"lora\.safetensors"):
        check(checkpoint, save(zeros, tmp_path / "lora.safetensors"), {})


def test_folders(checkpoint, tmp_path):
    save(named(modules=[Q]), tmp_path / "a.safetensors")
    check(checkpoint, tmp_path, {Q: PRODUCT})
    save(named(modules=[UP]), tmp_path / "b.safetensors")
    with pytest.raises(UsageError, match=f"{tmp_path}.* 2 "):
        changes(checkpoint, tmp_path)
    save(named(modules=[UP]), tmp_path / "adapter_model.safetensors")
    check(checkpoint, tmp_path, {UP: PRODUCT8})
    with pytest.raises(UsageError, match="none"):
        changes(checkpoint, tmp_path / "none")


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_factors(checkpoint, tmp_path, factor):
    with pytest.raises(UsageError, match="lora_scale"):
        changes(checkpoint, save(named(), tmp_path / "lora.safetensors"), factor)


@pytest.mark.parametrize("key", ["generator_lora", "lora"])
def test_an_adapter_beside_the_weights_of_a_training_file_is_named_and_not_merged(tmp_path, key):
    file = save({"generator": published(), key: FORMS["peft"], "step": 5}, tmp_path / "last.pt")
    with pytest.warns(UserWarning, match=key):
        checkpoint = read_checkpoint(file)
    change = merging(checkpoint, [])
    name = f"{Q}.weight"
    assert torch.equal(change(name, checkpoint.tensors[name]), weights()[name])
    change = merging(checkpoint, [(file, 1.0)])
    assert (change(name, weights()[name]) - weights()[name] - PRODUCT).abs().max() <= 1e-4


def test_only_the_published_pair_is_merged_unasked_and_once(tmp_path):
    adapter = {"generator_lora": FORMS["peft"]}
    lora = save(adapter, tmp_path / "lora.pt")
    mine = read_checkpoint(save({"model": published()}, tmp_path / "mine.pt"))
    assert mine.lora is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merging(mine, [])
    pair_of_files = read_checkpoint(save({"generator": published()}, tmp_path / "longlive_base.pt"))
    assert pair_of_files.form == "longlive" and pair_of_files.lora == lora
    with pytest.warns(UserWarning, match=r"lora\.pt"):
        change = merging(pair_of_files, [])
    name = f"{Q}.weight"
    assert (change(name, weights()[name]) - weights()[name] - PRODUCT).abs().max() <= 1e-4
    change = merging(pair_of_files, [(lora, 2.0)])  # the user's strength, not both
    assert (change(name, weights()[name]) - weights()[name] - 2 * PRODUCT).abs().max() <= 1e-4
    save(FORMS["peft"], tmp_path / "lora.pt")
    assert read_checkpoint(tmp_path / "longlive_base.pt").lora is None
    assert SPEC.num_layers == 2


def test_an_adapter_on_a_running_model_comes_off_exactly(checkpoint, tmp_path):
    module = WAN.load(checkpoint, "reference", torch.float32, "cpu")
    before = {name: tensor.clone() for name, tensor in module.named_parameters()}
    adapter = Adapter(module)
    lora = save(named(), tmp_path / "lora.safetensors")
    adapter.apply(lora, 0.5)
    adapter.apply(lora, 2.0)  # in place of the other
    assert (adapter.weights[f"{Q}.weight"] - before[f"{Q}.weight"] - 2 * PRODUCT).abs().max() <= 1e-4
    on = {name: tensor.clone() for name, tensor in adapter.weights.items()}
    other = save(named() | {"x.lora_A.weight": DOWN}, tmp_path / "other.safetensors")
    for file, scale in (
        (other, 1.0),
        (lora, math.nan),
        (lora, "1"),
        (lora, True),
        (lora, 1e38),
        (tmp_path / "none", 1.0),
    ):
        with pytest.raises(InferixError):
            adapter.apply(file, scale)
        assert all(torch.equal(adapter.weights[name], on[name]) for name in on)
    with pytest.warns(UserWarning, match=r"x\.lora_A"):
        adapter.apply(other, 1.0, partial=True)
    assert (adapter.weights[f"{Q}.weight"] - before[f"{Q}.weight"] - PRODUCT).abs().max() <= 1e-4
    adapter.remove()
    assert all(torch.equal(adapter.weights[name], before[name]) for name in before)
