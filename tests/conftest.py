"""Settings of all tests."""

import gc


def pytest_collection_finish() -> None:
    """Leave what imports made out of garbage collections, each of which would walk about a million objects."""
    gc.freeze()
