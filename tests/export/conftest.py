from pathlib import Path

import pytest
from small_engine import convert_small, export_small


@pytest.fixture(scope="session")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small engine as ONNX; tracing it takes most of the time of these tests."""
    return export_small("onnx", tmp_path_factory.mktemp("onnx") / "engine")


@pytest.fixture(scope="session")
def openvino_folder(onnx_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small engine as OpenVINO IR."""
    return convert_small(onnx_folder, tmp_path_factory.mktemp("openvino") / "engine")


@pytest.fixture(scope="session")
def aoti_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small engine compiled by AOTInductor, which takes minutes; for slow tests."""
    return export_small("aoti", tmp_path_factory.mktemp("aoti") / "engine")
