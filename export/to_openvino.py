"""Programs as OpenVINO IR: `<name>.xml`, with the weights that it reads in `<name>.bin`, converted from ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .programs import Program
from .to_onnx import OPSET, ConvertingWriter


class OpenVinoWriter(ConvertingWriter):
    """Writes programs as IR; see `Writer`."""

    options: ClassVar[dict[str, Any]] = {"opset": OPSET, "compress_to_fp16": False}

    def write(self, program: Program) -> None:
        convert(self.write_onnx(program), self.folder / f"{program.name}.xml")


def convert(onnx: Path, out: Path) -> None:
    """Convert an ONNX file to IR, weights in float32."""
    import openvino

    model = openvino.Core().read_model(onnx)
    replace_splits(model)
    openvino.save_model(model, out, compress_to_fp16=False)


def replace_splits(model: Any) -> None:
    """Replace Split nodes by Gather nodes.

    OpenVINO 2026.4.1 fails to compile the tiny decoder, or computes other pictures, for a concatenation behind a split.
    """
    from openvino import opset13

    for split in model.get_ordered_ops():
        if split.get_type_name() != "Split":
            continue
        axis, count = int(split.input_value(1).get_node().get_data()), split.get_output_size()
        size = split.input_value(0).get_partial_shape()[axis].get_length() // count
        for part in range(count):
            indices = np.arange(part * size, (part + 1) * size)
            gather = opset13.gather(split.input_value(0), indices, np.array(axis))
            for target in list(split.output(part).get_target_inputs()):
                target.replace_source_output(gather.output(0))
