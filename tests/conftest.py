"""Settings of all tests."""

import gc
import os

os.environ["INFERIX_ENGINE_CACHE"] = "off"  # no test runs an engine that the user has made

gc.disable()  # until all tests are imported: imports leave little to collect, and about a million objects to walk


def pytest_collection_finish() -> None:
    """Leave what imports made out of garbage collections."""
    gc.freeze()
    gc.enable()
