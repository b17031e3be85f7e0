"""`Family`: all that the runtime asks of one kind of model. `registry` lists families.

A family has sizes, presets and checkpoint formats as data, and builds, reads and writes the parts of its models. What a
family does not define is refused by name.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import UsageError, quoted
from ..graphs.shards import Axis, Stage
from ..schemes.presets import PLAIN, Preset
from ..schemes.sampler_spec import SOLVERS
from .column_decoder import ColumnDecoder
from .costs import TransformerCosts
from .decoder import Decoder, DecoderSpec
from .files import fill
from .random import random_state
from .spec import ModelSpec
from .transformer import Transformer
from .weight_shards import LayerShards, MatrixShards, WeightShards

Part = TypeVar("Part", bound=nn.Module)
Merge = Callable[[str, Tensor], Tensor]  # name and weight to the weight with adapters merged


@dataclass(frozen=True)
class Checkpoint:
    """A transformer's memory-mapped tensors under our names, with format, sizes and files.

    sets: names of the sets of weights, as in `Preset.weight_sets`; `tensors` is the first, and `more` are the others.
    boundary_ratio: noise level from which on the first of two experts runs, where a file states it.
    """

    path: Path
    form: str
    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]
    spec: ModelSpec
    lora: Path | None  # adapter published with the file
    sets: tuple[str, ...] = PLAIN
    more: tuple[Mapping[str, Tensor], ...] = ()
    boundary_ratio: float | None = None

    @property
    def folder(self) -> Path:
        """The folder in which VAE and text encoder may be."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the transformer's files, in order."""
        digest = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                while chunk := file.read(1 << 24):
                    digest.update(chunk)
        return digest.hexdigest()


@dataclass(frozen=True)
class Format:
    """Layout of a published checkpoint.

    names: the family's name for a set of tensor names, or a table of its own, from the family's names to the file's,
    with `*` for the layer number. file: name of the file. weights: keys under which a training file stores the
    weights, best first; none for a flat file. lora: file name of an adapter that belongs to it. strip: prefixes of the
    file's names that the table does not have. folder: that a writer puts the transformer in; empty for the model's own.
    twins: True for a file with a second set of weights, under twin names.
    experts: folders of the transformers for high and for low noise, of a model that has two.
    """

    names: str | Mapping[str, str]
    file: str
    weights: tuple[str, ...] = ()
    lora: str | None = None
    strip: tuple[str, ...] = ()
    twins: bool = False
    experts: tuple[str, str] | None = None
    folder: str = ""


class PromptEncoder(Protocol):
    """Text encoder: a prompt to the rows that the transformer attends to."""

    def encode(self, prompt: str) -> Tensor:
        """Encode a prompt to rows [text_len, text_dim], zero after its end."""


@runtime_checkable
class TableEncoder(PromptEncoder, Protocol):
    """A text encoder that looks up each word of a prompt."""

    def table(self) -> tuple[Sequence[str], Sequence[str], Tensor]:
        """Return the words, the words that are skipped, and the row of each word [words, text_dim]."""


class AdapterUpdate(Protocol):
    """Update of one weight by an adapter."""

    def to(self, device: torch.device) -> AdapterUpdate:
        """Return the update with its tensors on a device."""

    def change(self, factor: float) -> Tensor:
        """Return `factor` times the update of a weight, in float32."""


def merged(name: str, tensor: Tensor, updates: Mapping[str, AdapterUpdate], factor: float = 1.0) -> Tensor:
    """Return a parameter with its update added, in the parameter's dtype; a parameter without one unchanged."""
    update = updates.get(name)
    if update is None:
        return tensor
    return (tensor.float() + update.change(factor).view(tensor.shape)).to(tensor.dtype)


def suits(preset: Preset, spec: ModelSpec) -> bool:
    """True if a preset gives an image as condition channels and the model has them, or neither."""
    return (preset.context.image == "channels") == (spec.condition_channels > 0)


class Family(ABC):
    """One kind of model.

    name: what `ModelSpec.family` says. models: sizes by name. presets: decoding schemes, the default one first.
    formats: checkpoint formats by name. shipped: folder of the weights of models that are in the package, by name.
    demo: the named model that runs where a preset of the family is named alone. examples: prompts that its models
    follow. to_clean: direction of the velocity of its networks, as in `SolverRules`. decodes_columns: ranks can divide
    the pictures that its decoders make. layers: name of the list of layers in a transformer.
    """

    name: str
    models: Mapping[str, ModelSpec]
    presets: Sequence[Preset]
    formats: Mapping[str, Format] = {}
    shipped: Mapping[str, Path] = {}
    demo: str
    examples: Sequence[str] = ()
    to_clean: bool = False
    decodes_columns: bool = False
    layers: str = "blocks"

    def demo_of(self, preset: Preset) -> str:
        """Return the named model that runs where a preset of the family is named alone."""
        return self.demo

    def preset_for(self, model: str) -> Preset:
        """Return the preset of a named model where none is asked for: the first that suits it.

        Of several for models with condition channels it is the one made for the model, whose schedule depends on it.
        """
        spec = self.models.get(model)
        suiting = [preset for preset in self.presets if spec is None or suits(preset, spec)]
        own = [preset for preset in suiting if preset.about.base == model and preset.context.image == "channels"]
        return [*own, *suiting, self.presets[0]][0]

    def check_preset(self, preset: Preset, model: str, spec: ModelSpec) -> None:
        """UsageError for a preset whose solver takes another velocity than the networks of this family make, and for
        one that gives an image in another way than the model takes it.
        """
        if spec.image_dim is not None:
            fitting = ", ".join(name for name, own in self.models.items() if own.image_dim is None)
            raise UsageError(
                f"{model} takes the features of an image encoder, of which streams are not supported; expected another "
                f"model, such as {fitting}"
            )
        if not suits(preset, spec):
            fitting = ", ".join(own.name for own in self.presets if suits(own, spec))
            raise UsageError(
                f"{model} takes {spec.condition_channels} condition channels of a frame, and preset "
                f"{quoted(preset.name)} has image {quoted(preset.context.image)}; use one of {fitting}"
            )
        if SOLVERS[preset.sampler.solver].to_clean != self.to_clean:
            own = ", ".join(own.name for own in self.presets)
            raise UsageError(
                f"preset {quoted(preset.name)} is for a model of another family than {model}, which is {self.name}; "
                f"use one of {own}"
            )

    def has_preset(self, name: str) -> bool:
        return any(preset.name == name for preset in self.presets)

    # Transformer

    @abstractmethod
    def build(self, spec: ModelSpec, precision: str = "reference") -> Transformer:
        """Build a transformer on torch's default device, which may be the meta device.

        precision: a name of `transformer.PRECISIONS`.
        """

    @abstractmethod
    def costs(self, spec: ModelSpec) -> TransformerCosts:
        """Return the costs of a transformer."""

    def weight_shards(self, spec: ModelSpec, axis: Axis, stage: Stage) -> WeightShards | None:
        """A rank's part of the weights: its layers, or its parts of the matrices that a pass applies to every token.

        axis: ranks that divide matrices. None where each rank has all weights.
        """
        if stage.size > 1:
            return LayerShards(self.layers, spec.num_layers, stage)
        names = (name for name, _, _ in self.costs(spec).token_layers())
        return MatrixShards(names, axis) if axis.size > 1 else None

    def random_state(self, spec: ModelSpec, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Draw random weights of a transformer, by name."""
        with torch.device("meta"):
            module = self.build(spec)
        return random_state(module, seed, dtype)

    def load(
        self,
        checkpoint: Checkpoint,
        precision: str,
        dtype: torch.dtype,
        device: Any,
        loras: Iterable[tuple[str | Path, float]] = (),
        lora_partial: bool = False,
        shards: WeightShards | None = None,
    ) -> Transformer:
        """Build the transformer of a checkpoint with its adapters merged into the weights.

        shards: parts of the weights that this rank keeps; None for all of them.
        """
        with torch.device("meta"):
            module = self.build(checkpoint.spec, precision)
        change = self.merging(checkpoint, loras, lora_partial)
        return fill(module, checkpoint.tensors, dtype, device, checkpoint.path, change, shards)

    # Checkpoints

    def recognises(self, path: Path) -> bool:
        """True for a checkpoint file or folder of this family; False where another family may look."""
        return False

    def read(self, path: Path, form: str | None, use_ema: bool, known: Collection[ModelSpec]) -> Checkpoint:
        """Map a checkpoint file or folder.

        form: a name of `formats`; None detects it. known: named sizes of all families that read with this function.
        Raises UsageError if it is no transformer of the family, CheckpointError for a broken file.
        """
        raise self.lacks("checkpoint reader", quoted(path))

    def read_named(self, path: Path, layout: Format, use_ema: bool, known: Collection[ModelSpec]) -> Checkpoint:
        """Map a checkpoint file or folder in a layout that has a table of names of its own; as `read`."""
        raise self.lacks("reader for other tensor names", quoted(str(path)))

    def changed_names(self, base: str, changes: Mapping[str, str]) -> Mapping[str, str]:
        """Return the table of names of the format `base` with some changed. UsageError for names it does not have."""
        raise self.lacks("reader for other tensor names", base)

    def parts_beside(self, checkpoint: Checkpoint) -> dict[str, Path | None]:
        """Find the other parts of a model beside its transformer, by the argument of `load` that names each."""
        return {}

    def write_random(self, folder: Path, spec: ModelSpec, form: str, seed: int, dtype: torch.dtype) -> None:
        """Write random weights of all parts of a model to a folder, in a format."""
        raise self.lacks("checkpoint writer", form)

    def write(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        form: str,
        dtype: torch.dtype | None,
        max_shard: int,
        change: Merge,
        progress: Callable[[str], None],
    ) -> None:
        """Write a checkpoint, and the VAE and text encoder beside it, to a folder as safetensors.

        form: `original` or `diffusers`. dtype: None for that of the file. max_shard: bytes per file. progress: called
        with the name of each written file.
        """
        raise self.lacks("checkpoint writer", form)

    # Adapters

    def merging(
        self, checkpoint: Checkpoint, loras: Iterable[tuple[str | Path, float]], partial: bool = False
    ) -> Merge:
        """Return a function (name, weight) -> weight that merges `loras`, (path, factor) each."""
        for path, _ in loras:
            raise self.lacks("adapters", quoted(path))
        return lambda name, tensor: tensor

    def read_adapter(self, path: str | Path, weights: Mapping[str, Tensor], partial: bool) -> dict[str, AdapterUpdate]:
        """Read an adapter for these weights, by name. UsageError for one that does not fit (partial: of no layer)."""
        raise self.lacks("adapters", quoted(path))

    # Decoders

    @abstractmethod
    def decoder_spec(self, spec: ModelSpec) -> DecoderSpec:
        """Return the sizes of a model's decoder."""

    def tiny_decoder_spec(self, spec: ModelSpec) -> DecoderSpec | None:
        """Return the sizes of a smaller decoder for the latents of a model; None where there is none."""
        return None

    def chosen_decoder_spec(self, spec: ModelSpec, tiny: bool) -> DecoderSpec:
        """Return the sizes of a model's decoder, or of its tiny one. UsageError for a model without a tiny one."""
        sizes = self.tiny_decoder_spec(spec) if tiny else self.decoder_spec(spec)
        if sizes is None:
            raise self.lacks("tiny decoder", f"vae of {spec.name}")
        return sizes

    @abstractmethod
    def build_decoder(self, spec: DecoderSpec) -> Decoder:
        """Build a decoder on torch's default device, which may be the meta device."""

    def random_decoder(self, spec: ModelSpec, tiny: bool, dtype: torch.dtype, device: Any) -> Decoder:
        """Make a decoder with random weights, ready to run on a device."""
        sizes = self.chosen_decoder_spec(spec, tiny)
        with torch.device("meta"):
            module = self.build_decoder(sizes)
        return fill(module, random_state(module, 1, dtype), dtype, device, spec.name)

    def find_decoder(self, name: str | None, folders: Sequence[Path]) -> Path:
        """Find the file of a decoder. name: None for the one in `folders`, `taehv` for a tiny one, or a path."""
        raise self.lacks("decoder files", name or "vae")

    def load_decoder(self, path: Path, dtype: torch.dtype, device: Any) -> Decoder:
        """Load a decoder, ready to run on a device."""
        raise self.lacks("decoder files", quoted(path))

    def column_decoder(self, decoder: Decoder, axis: Axis) -> ColumnDecoder:
        """Make a rank's part of a decoder whose pictures ranks divide. UsageError for a family without one."""
        raise self.lacks("decoder over several ranks", "shard_decoder")

    # Comparison

    def is_in_diffusers(self, spec: ModelSpec) -> bool:
        """Return True if diffusers has a network for the weights of a model."""
        return False

    def diffusers_network(self, model: Transformer) -> nn.Module:
        """Make the network of diffusers that benchmarks compare with, over the weights of a model."""
        raise self.lacks("network of diffusers", model.spec.name)

    # Layers by device

    def with_fast_layers(self, module: Part) -> Part:
        """Return a transformer or decoder with the faster layers of its device; without any, unchanged.

        Weights are shared. A decoder may be changed in place.
        """
        return module

    # Text

    def text_parameters(self, spec: ModelSpec) -> int:
        """Count the parameters of the text encoder that goes with a model; 0 without one."""
        return 0

    def check_prompts(self, text: Callable[[], PromptEncoder] | None, prompts: Sequence[str]) -> None:
        """UsageError for a prompt that a text encoder of the family refuses; reads no weights.

        text: of `load_text` or `random_text`. By default every prompt is taken.
        """
        return None

    def load_text(
        self, path: str | None, folders: Sequence[Path], spec: ModelSpec, dtype: torch.dtype, device: Any
    ) -> Callable[[], PromptEncoder] | None:
        """Find the text encoder at `path`, or without one in `folders`; returns a function that loads it once.

        None if `folders` have no encoder; UsageError if `path` has none.
        """
        return None

    def random_text(self, spec: ModelSpec, dtype: torch.dtype, device: Any) -> Callable[[], PromptEncoder] | None:
        """Return a function that makes a random text encoder; None for a family that has none."""
        return None

    def lacks(self, what: str, value: str) -> UsageError:
        """Make the error for a part that the family does not have."""
        return UsageError(f"{self.name} has no {what} ({value}); use a model of another family, or leave it out")
