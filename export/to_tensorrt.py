"""Programs as TensorRT engines, `<name>.engine`, built from our ONNX. Never run: no GPU was available to this version.

The network is strongly typed, so TensorRT computes in the types of the ONNX file: float32, with int64 for sizes only.
Dimensions that differ from pass to pass have a profile. TensorRT is called through `TensorRt`, the part of its Python
interface that is used, for which tests have a recorder.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

from ..errors import InferixError
from .programs import Program
from .to_onnx import OPSET, ConvertingWriter

CACHE = "timing.cache"
OPERATORS = {  # those of our programs that docs/operators.md of onnx-tensorrt lists for TensorRT 10.15
    "Add", "Attention", "Cast", "Clip", "Concat", "ConstantOfShape", "Conv", "Cos", "DepthToSpace", "Div", "Expand",
    "Gather", "GatherND", "Gelu", "LayerNormalization", "MatMul", "Mul", "RMSNormalization", "Reciprocal", "ReduceL2",
    "Relu", "Reshape", "Resize", "Shape", "Sigmoid", "Sin", "Slice", "Split", "Squeeze", "Sub", "Tanh", "Transpose",
    "Unsqueeze",
}  # fmt: skip
TYPES = ("FLOAT", "INT64", "INT32", "BOOL")


class TensorRt(Protocol):
    """The part of the package `tensorrt` (10.15 or later) that a build uses."""

    __version__: str
    Logger: Any
    Builder: Any
    OnnxParser: Any
    NetworkDefinitionCreationFlag: Any


def load_tensorrt() -> TensorRt:
    return cast(TensorRt, import_module("tensorrt"))


class TensorRtWriter(ConvertingWriter):
    """Builds programs as engines for the GPU of this machine; see `Writer`."""

    options: ClassVar[dict[str, Any]] = {"opset": OPSET, "strongly_typed": True}

    def write(self, program: Program) -> None:
        path = self.write_onnx(program)
        use_single_precision(path)
        if problems := list(unsupported(path)):
            raise InferixError(f"program {program.name} cannot be built by TensorRT: {'; '.join(problems)}")
        engine = build(load_tensorrt(), path, profile(program), self.folder / CACHE)
        (self.folder / f"{program.name}.engine").write_bytes(engine)


Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def profile(program: Program) -> Profile:
    """Least, usual and largest shape of each input with a dimension that differs, by its name."""
    shapes: Profile = {}
    names = iter(program.names)
    for key, value in program.inputs.items():
        axes = program.dynamic[key]
        for tensor in value if isinstance(value, list) else [value]:
            name = next(names)
            if axes:
                least, usual, most = (
                    tuple(
                        program.limits[axes[axis]][which] if axis in axes else size
                        for axis, size in enumerate(tensor.shape)
                    )
                    for which in range(3)
                )
                shapes[name] = least, usual, most
    return shapes


def build(trt: TensorRt, onnx: Path, shapes: Profile, cache: Path) -> bytes:
    """Build an engine from an ONNX file; reads and writes the timing cache. InferixError with TensorRT's message."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise InferixError(f"TensorRT {trt.__version__} cannot read {onnx.name}: {errors}")
    config = builder.create_builder_config()
    timings = config.create_timing_cache(cache.read_bytes() if cache.exists() else b"")
    config.set_timing_cache(timings, ignore_mismatch=False)
    if shapes:
        optimisation = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes.items():
            optimisation.set_shape(name, least, usual, most)
        config.add_optimization_profile(optimisation)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise InferixError(f"TensorRT {trt.__version__} cannot build {onnx.name}; its log above has the reason")
    cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(engine)


def use_single_precision(path: Path) -> None:
    """Make all float64 of a program float32, which TensorRT has no float64 for: the angles of the timesteps."""
    import onnx
    from onnx import TensorProto, numpy_helper

    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.DOUBLE:
                attribute.i = TensorProto.FLOAT
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.DOUBLE:
            content = numpy_helper.to_array(tensor, str(path.parent))  # from the file of weights, if it is long
            tensor.CopyFrom(numpy_helper.from_array(content.astype("float32"), tensor.name))
    for value in [*model.graph.value_info, *model.graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.DOUBLE:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.save(model, str(path))


def unsupported(path: Path) -> Iterable[str]:
    """Operators and types of an ONNX file that are not in `OPERATORS` and `TYPES`, and forms of them."""
    import onnx
    from onnx import TensorProto

    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"):
            yield f"operator {node.domain}:{node.op_type}" if node.domain else f"operator {node.op_type}"
        elif node.op_type == "Attention" and (any(node.input[4:]) or any(node.output[1:])):
            yield "Attention with a past of its own"
    values = [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.value_info)]
    kinds = {TensorProto.DataType.Name(kind) for kind in [*values, *(x.data_type for x in model.graph.initializer)]}
    yield from sorted(f"type {kind}" for kind in kinds - {*TYPES, "UNDEFINED"})
