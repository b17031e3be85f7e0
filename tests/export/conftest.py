from pathlib import Path

import pytest
from small_engine import export_small


@pytest.fixture(scope="session")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small engine as ONNX; tracing it takes most of the time of these tests."""
    return export_small("onnx", tmp_path_factory.mktemp("onnx") / "engine")
