from collections.abc import Iterator

import pytest

from inferix.bench import machine


@pytest.fixture(scope="session", autouse=True)
def small_ceilings() -> Iterator[None]:
    """Measure a machine's ceilings with small operands; INT8 matmuls of the whole sizes take seconds on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(machine.COPY_BYTES, "cpu", 1 << 20)
        patch.setitem(machine.MATMUL_WIDTH, "cpu", 128)
        yield
