"""Export of an engine: a folder of programs, a plan, and the text encoder's part that the programs need.

A folder appears when it is complete; a failed export leaves none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from itertools import islice
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError, quoted
from ..kernels import philox
from ..models.family import TableEncoder
from ..models.registry import default_model, default_preset, make_preset
from ..models.transformer import Transformer
from ..runtime.engine import Engine
from ..runtime.load import load
from ..runtime.sampler import Sampler, scheduled_blocks
from ..schemes.defaults import DEFAULT_ACTIONS, DEFAULT_BLOCKS, DEFAULT_PROMPT
from ..schemes.page_needs import window
from ..schemes.presets import FIELDS, Preset
from ..schemes.sampler_spec import STANDARD_SOLVERS
from ..version import __version__
from .checkpoint import new_folder
from .decoder_programs import DecoderPrograms, EncoderPrograms, decoder_programs, encoder_programs
from .int8_layers import with_int8_layers
from .plan import FILE, FORMAT, PARAMETERS, describe_files, preset_values, solver_rules, takes_groups, version_of
from .programs import (
    FRAMES,
    PAST,
    TEXTS,
    Program,
    check_model,
    pass_programs,
    solver_matrix,
    with_memory,
)
from .targets import Target, check_target, find_target
from .trace import Writer

CHECKED_BLOCKS = 12  # blocks whose windows the plan lists, for readers to check themselves with
CHECKED_NOISE = {"seed": 7, "frame": 3, "draw": 1}


def export_engine(
    model: str | Path | None = None,
    preset: str | None = None,
    *,
    out: str | Path,
    target: str = "onnx",
    size: tuple[int, int] | None = None,
    dtype: str = "float32",
    unroll: bool = False,
    prefixes: bool = False,
    kv_dtype: str = "float32",
    prompts: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> Path:
    """Export a model under a preset as an engine for pictures of one size; returns its folder.

    model, preset and settings are those of `load`. out: a new folder. prompts: those that the engine can follow, if its
    text encoder is not exported; without any, the default prompt. unroll: one program more, with all steps of a block.
    prefixes: two more, with which streams can begin with an image or a video. dtype: of the stored weights.
    kv_dtype: of keys and values, float32, or int8 with a scale for each frame and head. With lowp="int8" linear layers
    multiply INT8 operands, those that lowp_layers and lowp_keep choose.
    Raises UsageError for what the target cannot do, before weights are read, and for bad values.
    """
    name = default_model(preset) if model is None else str(model)
    fields = {key: value for key, value in settings.items() if key in FIELDS}
    scheme = make_preset(preset or default_preset(name), **fields)
    chosen = find_target(target)
    check_target(chosen, scheme, dtype, unroll, prefixes, kv_dtype, settings.get("lowp"))
    progress(f"loading {name}")
    engine = load(name, preset, device="cpu", executor="eager", dtype="float32", size=size, **settings)
    rows = rows_of(engine, prompts)
    return write_engine(
        engine, out, engine.default_size if size is None else size, chosen, rows, unroll, prefixes, progress, dtype,
        kv_dtype,
    )


def rows_of(engine: Engine, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Rows of prompts, by text; without any, none for a word encoder, and those of the default prompt for others."""
    lines = prompts or ([] if writes_words(engine) else [DEFAULT_PROMPT])
    return {line: engine.inputs.prompt_rows(line, None, empty=True) for line in lines}


def write_engine(
    engine: Engine,
    out: str | Path,
    size: tuple[int, int],
    target: Target,
    prompts: Mapping[str, Tensor],
    unroll: bool = False,
    prefixes: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    dtype: str = "float32",
    kv_dtype: str = "float32",
) -> Path:
    """Write a loaded engine as a folder. prompts: rows [text_len, text_dim] by text; none to write the word encoder."""
    with new_folder(out) as folder, torch.no_grad():
        programs, decoder = describe_programs(engine, size, unroll, kv_dtype)
        encoder = describe_encoder(engine, size) if prefixes else None
        if encoder is not None:
            programs += encoder.programs
        writer: type[Writer] = resolve_name(target.writer)
        with writer(folder, dtype) as file:
            for program in [*programs, *decoder.programs]:
                progress(f"exporting {program.name}")
                file.write(program)
        text = write_text(engine, folder, prompts)
        options = writer.options | {"weights": dtype}
        plan = describe_engine(engine, size, target, programs, decoder, text, options, kv_dtype)
        if encoder is not None:
            plan["encoder"] = {
                "first_pictures": engine.spec.first_pictures, "pictures": engine.spec.vae_stride[0],
                "first_state": list(encoder.first_state), "state": [list(shape) for shape in encoder.shapes],
            }  # fmt: skip
        if kv_dtype != "float32":
            plan["kv_dtype"] = kv_dtype
        if (precision := engine.config.precision_map) is not None:
            plan["lowp"] = asdict(precision)
        if kept := host_parameters(engine):
            np.savez(folder / PARAMETERS, **kept)
            plan["parameters"] = PARAMETERS
        plan["files"] = describe_files(folder)
        (folder / FILE).write_text(json.dumps(plan, indent=1) + "\n", "utf-8")
    return Path(out)


def describe_programs(
    engine: Engine, size: tuple[int, int], unroll: bool, kv_dtype: str = "float32"
) -> tuple[list[Program], DecoderPrograms]:
    """The programs of the transformer and of the decoder for pictures of one size."""
    check_model(engine.parts.transformer)
    precision = engine.config.precision_map
    plain, memory = engine.parts.transformers[0], engine.parts.transformers[-1]

    def packed(model: Transformer) -> Transformer:
        return model if precision is None else with_int8_layers(model, precision)

    preset, spec = engine.preset, engine.spec
    most, block = window(preset), preset.num_frame_per_block
    frames = block if preset.block_size(0) == block and preset.window_blocks == 1 else None
    sampler = Sampler(preset.sampler)
    limits = {FRAMES: (1, preset.window_blocks * block, most), PAST: (0, most - block, most)}
    grouped, tile = takes_groups(preset), engine.parts.vae.spec.tile_frames
    if block % tile or preset.block_size(0) % tile:
        sizes = f"num_frame_per_block is {block} and independent_first_frame {preset.independent_first_frame}"
        raise UsageError(f"{sizes}, but the decoder takes {tile} latent frames at once; expected whole blocks of them")
    if grouped:
        limits[TEXTS] = 1, 1, preset.window_blocks + 1
    programs = pass_programs(plain, size, sampler, frames, unroll, limits, kv_dtype, grouped, packed)
    if kv_dtype == "int8" and any("text_of" in program.names for program in programs):
        raise UsageError(f"kv_dtype is int8, but passes of model {spec.name} take masked texts; expected float32")
    latent = spec.latent_size(size)
    if memory is not plain:
        programs = with_memory(programs, plain, memory, size, packed)
    decoder = decoder_programs(engine.parts.vae, spec.out_channels, *latent, preset.context.decoder_zero_start)
    return programs, decoder


def describe_encoder(engine: Engine, size: tuple[int, int]) -> EncoderPrograms:
    """The programs of the encoder. UsageError for a decoder that has none."""
    vae = engine.parts.vae
    if not vae.spec.encodes:
        raise UsageError("prefixes is True, but the tiny decoder of vae has no encoder; leave one of them out")
    if vae.spec.tile_frames > 1:
        raise UsageError(
            f"prefixes is True, but the encoder takes pictures of {vae.spec.tile_frames} latent frames at once, which "
            "no program does; leave it out"
        )
    return encoder_programs(vae, size, engine.spec.first_pictures, engine.spec.vae_stride[0])


def writes_words(engine: Engine) -> bool:
    """True if the text encoder is a table of words, which any reader can look up."""
    return engine.parts.text is not None and isinstance(engine.parts.text(), TableEncoder)


def host_parameters(engine: Engine) -> dict[str, Any]:
    """Parameters that are read outside of passes, by name."""
    model = engine.parts.transformer
    return {name: model.get_parameter(name).detach().float().numpy() for name in model.host_parameters}


def write_text(engine: Engine, folder: Path, prompts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write the rows of prompts, or the table of a word encoder; returns the plan's part on them."""
    model, spec = engine.parts.transformer, engine.spec
    facts: dict[str, Any] = {"length": spec.text_len, "dim": spec.text_dim}
    if model.null_text() is not None:
        empty = torch.zeros(spec.text_len, spec.text_dim)
        rows = torch.stack([model.text_inputs(empty, dropped) for dropped in (False, True)])
        np.save(folder / "null.npy", rows.float().numpy())
        facts["null"] = "null.npy"
    if prompts:
        np.save(folder / "prompts.npy", torch.stack(list(prompts.values())).float().numpy())
        return facts | {"encoder": "prompts", "prompts": list(prompts), "rows": "prompts.npy"}
    assert engine.parts.text is not None
    encoder = engine.parts.text()
    assert isinstance(encoder, TableEncoder)
    words, skipped, rows = encoder.table()
    np.save(folder / "words.npy", rows.float().numpy())
    return facts | {"encoder": "words", "words": list(words), "skipped": list(skipped), "rows": "words.npy"}


def describe_engine(
    engine: Engine, size: tuple[int, int], target: Target, programs: list[Program], decoder: DecoderPrograms,
    text: dict[str, Any], options: dict[str, Any], kv_dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """The plan, but for the hashes of the files."""
    spec, preset = engine.spec, engine.preset
    height, width = spec.latent_size(size)
    sampler, rope, step = Sampler(preset.sampler), engine.parts.transformer.rope, programs[1]
    assert step.name == "step"
    grouped = "text_of" in step.names
    return {
        "format": FORMAT, "version": version_of(preset, kv_dtype, grouped), "target": target.name,
        "model": {
            "name": spec.name, "source": engine.parts.source, "weights": engine.parts.form, "layers": spec.num_layers,
            "heads": spec.kv_heads, "channels": spec.head_dim, "actions": list(spec.actions), "fps": spec.fps,
        },
        "spec": asdict(spec), "preset": preset_values(preset),
        "size": {
            "picture": list(size), "latent": [spec.out_channels, height, width],
            "tokens": spec.tokens_per_frame(size), "pictures_per_latent": spec.vae_stride[0],
        },
        "dtype": engine.config.dtype,
        "sampler": describe_sampler(sampler) | {
            "first": describe_sampler(sampler.first), "context_timestep": preset.sampler.context_noise,
            "guidance_scale": preset.sampler.guidance_scale,
        } | ({} if preset.sampler.solver in STANDARD_SOLVERS else {"rules": solver_rules(preset.sampler)}),
        "rope": {
            "moving": preset.context.moving_positions, "pairs": list(rope.pairs),
            "frequencies": rope.time.tolist(),
        } | ({"half_split": True} if rope.half_split else {}),
        "noise": describe_noise(),
        "text": text,
        "decoder": {
            "encodes": engine.parts.vae.spec.encodes, "first": decoder.first, "first_state": list(decoder.first_state),
            "first_pictures": decoder.first_pictures, "pictures": decoder.pictures,
            "state": [list(shape) for shape in decoder.shapes],
        } | ({"frames": decoder.frames} if decoder.frames > 1 else {}),
        "programs": {program.name: describe_program(program, target) for program in [*programs, *decoder.programs]},
        "defaults": {
            "prompt": text["prompts"][0] if "prompts" in text else DEFAULT_PROMPT, "seed": 0, "blocks": DEFAULT_BLOCKS,
            "actions": DEFAULT_ACTIONS if spec.actions else None,
        },
        "check": {"windows": check_windows(preset)},
        "built": {
            "inferix": __version__, "options": options, "checkpoint": engine.parts.digest(),
            "packages": {name: metadata.version(name) for name in dict.fromkeys(("torch", *target.packages))},
        },
    }  # fmt: skip


def describe_sampler(sampler: Sampler) -> dict[str, Any]:
    """Timesteps, noise levels and solver weights of a block; see `solver_matrix`."""
    matrix = solver_matrix(sampler)
    return {
        "solver": sampler.spec.solver, "timesteps": list(sampler.timesteps), "sigmas": list(sampler.sigmas),
        "draws": len(matrix[0]) - 1, "matrix": matrix,
    }  # fmt: skip


def describe_noise() -> dict[str, Any]:
    """The generator of noise, with its first numbers for one frame."""
    shape = (2, 2, 2)
    frame, draw, seed = CHECKED_NOISE["frame"], CHECKED_NOISE["draw"], CHECKED_NOISE["seed"]
    normals = philox.philox_normals(seed, range(frame, frame + 1), draw, shape)
    return {
        "generator": "philox4x32-10", "rounds": philox.ROUNDS, "multipliers": list(philox.MULTIPLIERS),
        "weyl": list(philox.WEYL), "key": ["seed & 0xFFFFFFFF", "seed >> 32"],
        "counter": ["element // 4", "frame", "draw", "0"],
        "uniform": "float32(word) * 2**-32 + 2**-33, in float32",
        "normals": "words (0, 1) and (2, 3): r = sqrt(-2 ln u0), a = 2 pi u1, in float64; r cos a, r sin a as float32",
        "check": CHECKED_NOISE | {"normals": normals.flatten().tolist()},
    }  # fmt: skip


def describe_program(program: Program, target: Target) -> dict[str, Any]:
    """File, inputs and outputs of a program; a dimension that differs from pass to pass has a name."""
    inputs = []
    names = iter(program.names)
    for key, value in program.inputs.items():
        for tensor in value if isinstance(value, list) else [value]:
            axes = program.dynamic[key]
            shape = [axes.get(axis, length) for axis, length in enumerate(tensor.shape)]
            kind = {} if tensor.dtype == torch.float32 else {"dtype": str(tensor.dtype).removeprefix("torch.")}
            inputs.append({"name": next(names), "shape": shape} | kind)
    return {"file": f"{program.name}{target.suffix}", "inputs": inputs, "outputs": list(program.results)}


def check_windows(preset: Preset) -> list[dict[str, Any]]:
    """Frames and positions that the groups of the first blocks' last passes see, in a stream under one prompt."""
    blocks = islice(scheduled_blocks(preset), CHECKED_BLOCKS)
    groups = [group for block in blocks for group in block.passes[-1].run.groups]
    return [
        {"frames": list(group.frames), "context": list(group.context), "positions": list(group.positions)}
        for group in groups
    ]


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line. UsageError if it has none."""
    from ..user_files import read_text

    lines = [line.strip() for line in read_text(path, "prompt").splitlines()]
    if not any(lines):
        raise UsageError(f"prompt file {quoted(path)} is empty; expected one prompt a line")
    return [line for line in lines if line]
