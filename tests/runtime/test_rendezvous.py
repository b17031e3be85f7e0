"""Places of ranks from the environment, ports in use, messages, and what ranks must have in common."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from thread_ranks import socketpair

from inferix import InferixError, UsageError, load
from inferix.models.registry import MODELS, make_preset
from inferix.runtime.parallel import identity as identities
from inferix.runtime.parallel.identity import difference, identity
from inferix.runtime.parallel.messages import HEADER, Connection, Message
from inferix.runtime.parallel.rendezvous import LOCAL, Place, join_store

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}
CPU = torch.device("cpu")
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def test_a_place_is_read_from_what_torchrun_and_srun_set() -> None:
    assert Place.of(TORCHRUN) == Place(1, 4, 1, "here", 29500)
    assert Place.of(SRUN) == Place(3, 4, 1, "a", 1)
    assert Place.of({}) is None
    assert Place.of(TORCHRUN | {"WORLD_SIZE": "1"}) is None
    assert Place.of(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}) == Place(1, 4, 1, "here", 29500, hosted=True)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"RANK": "one"}, ("RANK", "'one'")),
        ({"RANK": "4"}, ("RANK", "4", "WORLD_SIZE")),
        ({"MASTER_PORT": "-1"}, ("MASTER_PORT", "'-1'")),
        ({"MASTER_ADDR": None}, ("MASTER_ADDR", "torchrun")),
    ],
)
def test_a_wrong_environment_is_refused(changed: dict[str, str | None], words: tuple[str, ...]) -> None:
    environment = {name: value for name, value in (TORCHRUN | changed).items() if value is not None}
    with pytest.raises(UsageError) as error:
        Place.of(environment)
    assert all(word in str(error.value) for word in words)


def test_a_port_in_use_is_refused_with_another_one() -> None:
    with socket.create_server((LOCAL, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"{port}.*{port + 1}"):
            join_store(Place(0, 2, 0, LOCAL, port))


def test_ranks_with_other_files_or_sizes_differ(tmp_path: Path) -> None:
    spec, preset = MODELS["wan-ranks"], make_preset("self-forcing")
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(1 << 20))
    here = identity(spec, preset, [file], CPU)
    assert difference(here, identity(spec, preset, [file], CPU)) is None
    file.write_bytes(bytes((1 << 20) - 1) + b"\1")
    differing = difference(here, identity(spec, preset, [file], CPU))
    assert differing is not None and differing[0] == "checkpoint"
    other = difference(here, identity(replace(spec, num_layers=3), preset, [], CPU))
    assert other == ("model.num_layers", 4, 3)


def test_ranks_with_other_kinds_of_gpu_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, preset, found = MODELS["wan-ranks"], make_preset("self-forcing"), []
    for card in ("H100 sm_90", "A100 sm_80"):
        monkeypatch.setattr(identities, "card_of", lambda device, card=card: card)
        found.append(identity(spec, preset, [], CPU))
    assert difference(*found) == ("device", "H100 sm_90", "A100 sm_80")


def test_messages_carry_values_plans_and_tensors() -> None:
    one, other = (Connection(end) for end in socketpair())
    tensors = (torch.arange(6.0).view(2, 3), torch.zeros(2, dtype=torch.bfloat16))
    one.send(Message("plan", {"number": 3}, b"bytes", tensors))
    found = other.receive()
    assert found is not None and (found.kind, found.values, found.plan) == ("plan", {"number": 3}, b"bytes")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(tensors, found.tensors, strict=True))
    one.stream.sendall(HEADER.pack(b"HTTP", 1, 1, 1))
    with pytest.raises(InferixError, match="HTTP"):
        other.receive()
    one.close()
    assert other.receive() is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gpus": 2, "device": "cpu:0"}, ("device", "cpu:0")),
        ({"gpus": 1, "parallel": "pass-q"}, ("parallel", "pass-q", "gpus=1")),
        ({"gpus": 2, "kv_dtype": "int8", "parallel": "pass-q"}, ("kv_dtype", "int8", "ulysses")),
        ({"gpus": 2, "rank_timeout": 0}, ("rank_timeout", "0")),
        ({"gpus": 65}, ("gpus", "65")),
    ],
)
def test_settings_that_ranks_do_not_have_are_refused_before_a_process_starts(
    settings: dict[str, object], words: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as error:
        load("wan-ranks", "self-forcing", **{"device": "cpu", "local_attn_size": 6, **settings})
    assert all(word in str(error.value) for word in words)
