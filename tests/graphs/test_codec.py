"""A lowered program is the same after a trip through JSON, and runs the same."""

from __future__ import annotations

import json

import pytest
import torch
from programs import bound, planned, result
from torch import Tensor

from inferix.errors import InferixError
from inferix.graphs.codec import decode_planned, encode_planned
from inferix.graphs.launch import LaunchPlan


def function(x: Tensor, y: Tensor) -> Tensor:
    """Literals of every kind that a call can hold."""
    joined = torch.cat((x.to(torch.float32), y), -1).to(torch.float64).clamp(min=-0.5)
    return torch.nn.functional.gelu(joined.mT.contiguous(), approximate="tanh").sum((0, 1), keepdim=True) * float("inf")


def test_what_is_read_equals_what_was_written() -> None:
    x, y = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3)
    made = planned(function, x, y)
    read = decode_planned(json.loads(json.dumps(encode_planned(made))))
    assert read == made
    launches = bound(made.program, x, y)
    launches.run()
    again = LaunchPlan(read.program, read.plan, torch.zeros(read.plan.size, dtype=torch.uint8), launches.given)
    again.run()
    assert torch.equal(result(again), result(launches))


def test_an_op_that_is_not_here_is_named() -> None:
    data = encode_planned(planned(lambda x: x + 1, torch.zeros(2)))
    data["calls"][0][0] = "inferix::from_tomorrow"
    with pytest.raises(InferixError, match="inferix::from_tomorrow"):
        decode_planned(data)
