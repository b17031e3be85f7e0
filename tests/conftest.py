"""Settings of all tests."""

import gc

gc.disable()  # until all tests are imported: imports leave little to collect, and about a million objects to walk


def pytest_collection_finish() -> None:
    """Leave what imports made out of garbage collections."""
    gc.freeze()
    gc.enable()
