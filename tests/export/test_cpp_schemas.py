"""Schemas of the ops in C++, read from their source: a quick test, since building them is left to `make test-all`."""

import re
from pathlib import Path

import torch

from inferix.kernels.catalog import PLAIN, SPECS

SOURCE = Path(__file__).resolve().parents[2] / "export" / "cpp" / "ops.cpp"


def test_schemas_in_cpp_are_those_of_the_catalog() -> None:
    joined = re.sub(r'"\s*\n\s*"', "", SOURCE.read_text("utf-8"))  # adjacent literals are one
    ours = {str(getattr(torch.ops.inferix, name).default._schema) for name in [*SPECS, *PLAIN]}
    assert {f"inferix::{schema}" for schema in re.findall(r'"(\w+\(.*\) -> \(\))"', joined)} == ours
    formed = set(re.findall(r'library\.impl\("(\w+)"', joined))
    assert formed == {*SPECS, "linear_gelu", "linear_wide"}  # the collectives need ranks
