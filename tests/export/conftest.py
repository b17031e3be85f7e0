import os
from pathlib import Path

import pytest
from cpp_build import Built, find_build
from small_engine import convert_small, export_small

# ctest runs these over what it has built; named on the command line they build it, which takes minutes
collect_ignore = [] if "INFERIX_BUILD" in os.environ else ["test_runner.py", "test_cpp_ops.py"]


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


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return find_build(tmp_path_factory.mktemp("build"))
