"""The build of TensorRT engines against a recorder of its calls, a fake: TensorRT itself has never run here."""

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_engine import small_engine

from inferix.errors import CheckpointError, InferixError
from inferix.export import to_tensorrt
from inferix.export.backends import TensorRt
from inferix.export.engine_folder import describe_programs
from inferix.export.plan import Plan
from inferix.export.programs import FRAMES, PAST
from inferix.export.to_onnx import OnnxWriter
from inferix.export.to_tensorrt import TensorRtWriter, build, profile, unsupported, use_single_precision


class FakeTensorRt:
    """Records the calls of a build. errors: of the parser. engine: what the build makes."""

    __version__ = "0.fake"
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)

    def __init__(self, errors: tuple[str, ...] = (), engine: bytes | None = b"engine") -> None:
        self.calls: list[tuple[Any, ...]] = []
        record = lambda name: lambda *given, **named: self.calls.append((name, *given, *named.values()))  # noqa: E731
        optimisation = SimpleNamespace(set_shape=record("set_shape"))
        cache = SimpleNamespace(serialize=lambda: b"timings")
        config = SimpleNamespace(
            create_timing_cache=lambda content: self.calls.append(("cache", content)) or cache,
            set_timing_cache=record("set_timing_cache"), get_timing_cache=lambda: cache,
            add_optimization_profile=record("profile"),
        )  # fmt: skip
        builder = SimpleNamespace(
            create_network=record("create_network"), create_builder_config=lambda: config,
            create_optimization_profile=lambda: optimisation, build_serialized_network=lambda network, config: engine,
        )  # fmt: skip
        parser = SimpleNamespace(
            parse_from_file=lambda path: self.calls.append(("parse", path)) or not errors, num_errors=len(errors),
            get_error=errors.__getitem__,
        )  # fmt: skip
        self.Logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
        self.Builder = lambda logger: builder
        self.OnnxParser = lambda network, logger: parser


def test_a_build_is_strongly_typed_with_a_profile_and_a_cache(tmp_path: Path) -> None:
    trt, cache = FakeTensorRt(), tmp_path / "timing.cache"
    shapes = {"past_k_0": ((0, 4), (3, 4), (6, 4))}
    assert build(trt, tmp_path / "step.onnx", shapes, cache) == b"engine"
    assert build(trt, tmp_path / "commit.onnx", {}, cache) == b"engine"
    assert ("create_network", 2) in trt.calls and ("parse", str(tmp_path / "step.onnx")) in trt.calls
    assert ("set_shape", "past_k_0", (0, 4), (3, 4), (6, 4)) in trt.calls
    assert [call for call in trt.calls if call[0] == "cache"] == [("cache", b""), ("cache", b"timings")]
    assert sum(call[0] == "profile" for call in trt.calls) == 1


def test_a_failed_build_has_tensorrts_message(tmp_path: Path) -> None:
    with pytest.raises(InferixError, match=r"0\.fake.*step\.onnx.*no importer"):
        build(FakeTensorRt(("no importer",)), tmp_path / "step.onnx", {}, tmp_path / "cache")
    with pytest.raises(InferixError, match=r"step\.onnx"):
        build(FakeTensorRt(engine=None), tmp_path / "step.onnx", {}, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_profiles_span_the_window() -> None:
    """Of a block of one frame in a window of six: an empty past to a full one, and a recache of all of it."""
    engine = small_engine()
    programs, decoder = describe_programs(engine, (32, 32), False)
    by_name = {program.name: program for program in [*programs, *decoder.programs]}
    window = engine.preset.context.local_attn_size
    assert by_name["step"].limits == {FRAMES: (1, 1, window), PAST: (0, window - 1, window)}
    shapes = profile(by_name["commit"])
    assert [shape[0] for shape in shapes["past_k_0"]] == [0, window - 1, window]
    assert [shape[1] for shape in shapes["latents"]] == [1, 1, window]
    assert profile(by_name["decode_next"]) == {} and "text_k_0" not in shapes


def write_model(path: Path, nodes: list[onnx.NodeProto], kind: int = TensorProto.FLOAT) -> Path:
    names = [helper.make_tensor_value_info(name, kind, [1]) for name in ("x", "y")]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", names[:1], names[1:])), str(path))
    return path


def test_operators_and_types_that_tensorrt_lacks_are_found(tmp_path: Path) -> None:
    fine = write_model(tmp_path / "fine.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    assert list(unsupported(fine)) == []
    other = write_model(tmp_path / "other.onnx", [helper.make_node("Unique", ["x"], ["y"])], TensorProto.DOUBLE)
    assert list(unsupported(other)) == ["operator Unique", "type DOUBLE"]
    past = write_model(tmp_path / "past.onnx", [helper.make_node("Attention", ["x", "x", "x", "", "x"], ["y"])])
    assert list(unsupported(past)) == ["Attention with a past of its own"]


def test_float64_becomes_float32(tmp_path: Path) -> None:
    angles = numpy_helper.from_array(np.array([0.5]), "angles")
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.DOUBLE), helper.make_node("Mul", ["a", "angles"], ["b"]),
        helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    path = tmp_path / "angles.onnx"
    for external in (False, True):
        model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], [angles]))
        onnx.save(model, str(path), save_as_external_data=external, location="weights.bin", size_threshold=0)
        assert list(unsupported(path)) == ["type DOUBLE"]
        use_single_precision(path)
        onnx.checker.check_model(onnx.load(str(path)))
        assert list(unsupported(path)) == []


@pytest.mark.slow
def test_all_programs_can_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of the small engine use only listed operators and types; the recorder stands in for TensorRT."""
    trt = FakeTensorRt()
    monkeypatch.setattr(to_tensorrt, "load_tensorrt", lambda: trt)
    programs, decoder = describe_programs(small_engine(), (32, 32), False)
    (tmp_path / "engine").mkdir()
    with TensorRtWriter(tmp_path / "engine") as writer:
        for program in [*programs, *decoder.programs]:
            writer.write(program)
    assert len(list((tmp_path / "engine").glob("*.engine"))) == len(programs) + len(decoder.programs)


def test_a_program_with_another_operator_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: OnnxWriter, program: Any) -> None:
        write_model(self.folder / "prompt.onnx", [helper.make_node("Unique", ["x"], ["y"])])

    monkeypatch.setattr(OnnxWriter, "write", write)
    monkeypatch.setattr(to_tensorrt, "load_tensorrt", lambda: pytest.fail("nothing is built"))
    programs, _ = describe_programs(small_engine(), (32, 32), False)
    (tmp_path / "engine").mkdir()
    with TensorRtWriter(tmp_path / "engine") as writer, pytest.raises(InferixError, match=r"prompt.*Unique"):
        writer.write(programs[0])
    assert list((tmp_path / "engine").iterdir()) == []


def test_the_backend_binds_every_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a fake engine that doubles its input: shapes, addresses, and a tensor without elements."""
    bound: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def execute(stream: int) -> bool:
        assert bound["past"] != 0
        source = (ctypes.c_float * 3).from_address(bound["x"])
        result = (ctypes.c_float * 3).from_address(bound["y"])
        result[:] = [2 * value for value in source]
        return True

    context = SimpleNamespace(
        set_input_shape=shapes.__setitem__, get_tensor_shape=lambda name: shapes["x"],
        set_tensor_address=bound.__setitem__, execute_async_v3=execute,
    )  # fmt: skip
    engine = SimpleNamespace(create_execution_context=lambda: context)
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda content: engine if content == b"good" else None)
    logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    fake = SimpleNamespace(Runtime=lambda logger: runtime, Logger=logger, __version__="0.fake")
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(TensorRt, "device", "cpu")
    backend, path = TensorRt(Plan(tmp_path, {})), tmp_path / "step.engine"
    path.write_bytes(b"good")
    program = backend.load(path, ["x", "past"], ["y"])
    made = program({"x": np.arange(3, dtype=np.float32), "past": np.zeros((0, 2), np.float32)})
    np.testing.assert_array_equal(made["y"], [0, 2, 4])
    assert shapes == {"x": (3,), "past": (0, 2)}
    path.write_bytes(b"bad")
    with pytest.raises(CheckpointError, match=r"0\.fake.*step\.engine"):
        backend.load(path, ["x"], ["y"])
