"""Targets of an export, and what each can do: one table that the exporter obeys and `inferix export --list` prints.

Nothing here needs torch or a target's packages.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from ..errors import InferixError, UsageError, nearest, quoted
from ..schemes.page_needs import page_needs
from ..schemes.presets import Preset
from .plan import takes_groups

FEATURES = {  # what a preset or a command may ask of an engine
    "one block in flight": "window_blocks 1: each block is denoised alone",
    "several blocks in flight": "window_blocks above 1, as in rolling-forcing",
    "several prompts in a pass": "prompt_switch join with window_blocks above 1, as in magi",
    "recomputed context": "segment_frames above 0 or commit false, as in causvid and krea",
    "commit in the next pass": "commit_in_next true",
    "averaged sink": "sink_decay below 1",
    "context by noise level": "noise2clean_kvrange, clean_chunk_kvrange or clean_text null",
    "memory weights": "clean_weights memory: a second set of weights makes the past, as in sgf-plus",
    "two experts": "boundary_ratio above 0: two sets of weights, each with a past of its own",
    "endless window": "local_attn_size -1",
    "sink at several distances": "a sink, positions other than absolute, and commit_in_next or ranges of keys",
    "first block of one frame": "independent_first_frame",
    "guidance": "guidance_scale other than 1: two pasts under two prompts",
    "guidance by past": "guidance of several scales, as in magi",
    "recache": "prompt_switch recache",
    "blend": "prompt_switch blend",
    "channels of frames": "image channels: an image and a camera beside the latents, as in lingbot-v2",
    "scene cuts": "shot_offset above 0",
    "unrolled steps": "--unroll: all steps of a block in one program",
    "unrolled joint steps": "--unroll with window_blocks above 1, or passes whose frames see other frames",
    "prefixes": "--prefixes: streams that begin with an image or a video",
    "pasted pictures": "--prefixes with image paste or clamp: given frames in a block of others",
    "float32": "--dtype float32: weights are stored in it; passes are always in float32",
    "float16": "--dtype float16",
    "bfloat16": "--dtype bfloat16",
    "keys and values in int8": "--kv-dtype int8: a scale for each frame and head; not in inferix-runner",
    "int8 in passes of groups": "--kv-dtype int8 with passes whose frames see other frames, or follow other texts",
    "keys and values in fp8": "--kv-dtype fp8",
    "layers in int8": "--lowp int8: linear layers on INT8 operands",
    "layers in fp8": "--lowp fp8: linear layers on FP8 operands",
}
KV_DTYPES = ("float32", "int8", "fp8")
DTYPES = ("float32", "float16", "bfloat16")
LOWP = ("int8", "fp8")


@dataclass(frozen=True)
class Target:
    """A format of programs.

    packages: imported to export. runtime: the package imported to run, by `backend`. writer, backend: places of a
    `Writer` and of a `Backend`, as "package.module:class". can: features of `FEATURES`. ran: what its engines have been
    run on, empty for none.
    """

    name: str
    suffix: str
    packages: tuple[str, ...]
    extra: str
    writer: str
    backend: str
    runtime: str
    can: frozenset[str]
    ran: str

    @property
    def history(self) -> str:
        """In words, what its engines have been run on."""
        return f"run on {self.ran}" if self.ran else "never run: no GPU was available to this version"

    @property
    def missing(self) -> list[str]:
        """Packages of the export that are not installed."""
        return [package for package in self.packages if find_spec(package) is None]


PLAIN = frozenset(FEATURES) - {
    "several prompts in a pass", "recomputed context", "commit in the next pass", "averaged sink",
    "context by noise level", "two experts", "endless window", "sink at several distances",
    "guidance by past", "channels of frames", "unrolled joint steps", "pasted pictures", "float16", "bfloat16",
    "keys and values in int8", "int8 in passes of groups", "keys and values in fp8", "layers in int8", "layers in fp8",
}  # fmt: skip
GROUPED = PLAIN | {
    "several prompts in a pass", "commit in the next pass", "context by noise level", "guidance by past",
}  # fmt: skip
HALF = GROUPED | {"float16"}
HERE = __package__
EVERY = (
    Target("onnx", ".onnx", ("onnx", "onnxscript"), "onnx", f"{HERE}.to_onnx:OnnxWriter",
           f"{HERE}.backends:OnnxRuntime", "onnxruntime", HALF | {"keys and values in int8", "layers in int8"},
           "CPU, by ONNX Runtime"),
    Target("openvino", ".xml", ("onnx", "onnxscript", "openvino"), "openvino", f"{HERE}.to_openvino:OpenVinoWriter",
           f"{HERE}.backends:OpenVino", "openvino", HALF, "CPU, by OpenVINO"),
    Target("aoti", ".pt2", ("torch",), "", f"{HERE}.to_aoti:AotiWriter", f"{HERE}.backends:AotInductor", "torch",
           GROUPED, "CPU, by torch"),
    Target("tensorrt", ".engine", ("onnx", "onnxscript", "tensorrt"), "tensorrt", f"{HERE}.to_tensorrt:TensorRtWriter",
           f"{HERE}.backends:TensorRt", "tensorrt", PLAIN, ""),
)  # fmt: skip
TARGETS: dict[str, Target] = {target.name: target for target in EVERY}


def find_target(name: str) -> Target:
    """Return the target of a name. UsageError for an unknown one, InferixError if a package it needs is missing."""
    if name not in TARGETS:
        raise UsageError(f"target is {quoted(name)}{nearest(name, TARGETS)}; expected one of {', '.join(TARGETS)}")
    target = TARGETS[name]
    if target.missing:
        raise InferixError(
            f"target {name} needs {' and '.join(target.missing)}; pip install 'inferix-runtime[{target.extra}]'"
        )
    return target


def needed_features(
    preset: Preset, dtype: str, unroll: bool, prefixes: bool = False, kv_dtype: str = "float32",
    lowp: str | None = None,
) -> list[str]:  # fmt: skip
    """Features that an engine of a preset needs, in the table's order."""
    context = preset.context
    asked = {
        "one block in flight": preset.window_blocks == 1,
        "several blocks in flight": preset.window_blocks > 1,
        "several prompts in a pass": preset.window_blocks > 1 and context.prompt_switch == "join",
        "recomputed context": context.segment_frames > 0 or not context.commit,
        "commit in the next pass": context.commit_in_next,
        "averaged sink": context.sink_decay < 1,
        "context by noise level": context.has_key_ranges or context.clean_text != "prompt",
        "memory weights": context.clean_weights != "plain",
        "two experts": preset.sampler.boundary_ratio > 0,
        "endless window": page_needs(preset).context is None,
        "sink at several distances": context.rotates_sink and (context.commit_in_next or context.has_key_ranges),
        "first block of one frame": preset.independent_first_frame and preset.num_frame_per_block > 1,
        "guidance": preset.sampler.guidance_scale != 1,
        "guidance by past": preset.sampler.guidance is not None,
        "recache": context.prompt_switch == "recache",
        "blend": context.prompt_switch == "blend",
        "channels of frames": context.image == "channels",
        "scene cuts": context.shot_offset > 0,
        "unrolled steps": unroll,
        "unrolled joint steps": unroll and (preset.window_blocks > 1 or takes_groups(preset)),
        "prefixes": prefixes,
        "pasted pictures": prefixes and context.image in ("paste", "clamp"),
        dtype: True,
        f"keys and values in {kv_dtype}": True,
        "int8 in passes of groups": kv_dtype == "int8" and takes_groups(preset),
        f"layers in {lowp}": True,
    }
    return [feature for feature in FEATURES if asked.get(feature)]


def check_target(
    target: Target, preset: Preset, dtype: str, unroll: bool, prefixes: bool = False, kv_dtype: str = "float32",
    lowp: str | None = None,
) -> None:  # fmt: skip
    """UsageError for a preset or a setting that needs what the target cannot."""
    for key, value, known in (("dtype", dtype, DTYPES), ("kv_dtype", kv_dtype, KV_DTYPES), ("lowp", lowp, LOWP)):
        if value not in known and value is not None:
            raise UsageError(f"{key} is {quoted(value)}{nearest(value, known)}; expected one of {', '.join(known)}")
    needed = needed_features(preset, dtype, unroll, prefixes, kv_dtype, lowp)
    if lacking := [feature for feature in needed if feature not in target.can]:
        listed = "; ".join(f"{feature} ({FEATURES[feature]})" for feature in lacking)
        raise UsageError(
            f"target {target.name} cannot export preset {preset.name} in {dtype}: it has no {listed}; "
            "inferix export --list shows what each target can"
        )


def presets_of(target: Target, presets: dict[str, Preset]) -> list[str]:
    """Names of the presets that a target can export in float32."""
    return [name for name, preset in presets.items() if target.can >= set(needed_features(preset, "float32", False))]
