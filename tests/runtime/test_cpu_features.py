"""Advice on the dtype from the CPU's instruction flags, given and as the system lists them."""

import pytest

from inferix.runtime.capacity.cpu_features import bfloat16_unit, cpu_flags, dtype_advice

AVX2 = {"fpu", "avx", "avx2", "fma", "f16c"}
ZEN4 = AVX2 | {"avx512f", "avx512_bf16"}
SAPPHIRE = ZEN4 | {"amx_tile", "amx_bf16"}


@pytest.mark.parametrize(
    ("flags", "unit"), [((), None), (AVX2, None), (AVX2 | {"avx512f"}, None), (ZEN4, "BF16"), (SAPPHIRE, "AMX")]
)
def test_bfloat16_is_advised_only_where_the_cpu_has_instructions_for_it(flags, unit):
    found = bfloat16_unit(flags)
    assert found is None if unit is None else unit in found
    for_float32, for_bfloat16 = dtype_advice("float32", flags), dtype_advice("bfloat16", flags)
    if unit is None:
        assert for_float32 is None
        assert "float32" in for_bfloat16
    else:
        assert "bfloat16" in for_float32
        assert for_bfloat16 is None
    assert dtype_advice("float64", flags) is None


def test_flags_are_those_of_the_first_cpu(tmp_path):
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16\nbugs\t: none\nprocessor: 1\nflags : fpu\n")
    assert cpu_flags(listing) == {"fpu", "avx2", "avx512_bf16"}
    listing.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert cpu_flags(listing) == set()
    assert cpu_flags(tmp_path / "nowhere") == set()
