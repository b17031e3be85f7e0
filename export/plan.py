"""`plan.json` of an exported engine: all that a reader in any language needs besides the programs.

Nothing here needs torch. `plan.schema.json` describes the file, `docs/export.md` what a reader does with it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UsageError, quoted
from ..schemes.context import ContextPolicy
from ..schemes.guidance import Guidance, GuidanceBranch
from ..schemes.presets import About, Preset
from ..schemes.sampler_spec import SOLVERS, SamplerSpec, SolverRules
from ..user_files import check_reachable, read_json

FORMAT = "inferix-engine"
FIRST, JOINT, GROUPED, RESTING = 1, 2, 3, 4  # versions of the file
VERSIONS = (FIRST, JOINT, GROUPED, RESTING)  # that are read
FILE, PARAMETERS = "plan.json", "parameters.npz"
SCHEMA = Path(__file__).parent / "plan.schema.json"


@dataclass(frozen=True)
class PlannedSampler(SamplerSpec):
    """A sampler whose solver the reader may not know. own_rules: what the plan says of it, for its number of steps.

    UsageError for another solver or number of steps.
    """

    own_rules: SolverRules = field(kw_only=True)
    made_for: tuple[str, int] = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        (solver, steps), asked = self.made_for, (self.solver, self.steps)
        if asked != (solver, steps):
            raise UsageError(
                f"solver is {quoted(self.solver)} with {self.steps} steps, but the plan knows the rules of "
                f"{quoted(solver)} with {steps} steps alone; leave them as they are, or export another engine"
            )

    @property
    def rules(self) -> SolverRules:
        return self.own_rules


@dataclass(frozen=True)
class Plan:
    """The plan of the engine in `folder`; `values` is the content of its file."""

    folder: Path
    values: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    @cached_property
    def preset(self) -> Preset:
        return preset_of(self.values["preset"], self.values["sampler"].get("rules"))

    @property
    def fingerprint(self) -> str:
        """Hash of the hashes of all files."""
        hashes = "".join(facts["sha256"] for _, facts in sorted(self.values["files"].items()))
        return hashlib.sha256(hashes.encode()).hexdigest()[:16]

    @property
    def kv_dtype(self) -> str:
        """Dtype of the past: float32, or int8 with scales beside it."""
        return str(self.values.get("kv_dtype", "float32"))

    @property
    def grouped(self) -> bool:
        """True where programs take what each frame of a pass sees, and its text."""
        return any(value["name"] == "text_of" for value in self.values["programs"]["step"]["inputs"])

    @property
    def encoder(self) -> dict[str, Any] | None:
        """The plan's part on the encoder; None if the engine has none."""
        return self.values.get("encoder")

    def program(self, name: str) -> Path | None:
        """The file of a program; None if the engine has none."""
        entry = self.values["programs"].get(name)
        return None if entry is None else self.folder / entry["file"]


def read_plan(folder: str | Path) -> Plan:
    """Read the plan of an engine and check its version and the hash of every file.

    Raises UsageError for a path that is no engine, CheckpointError for an engine of another version and for a file that
    is missing or is not the one that was exported.
    """
    folder = check_reachable(folder, "engine")
    where = quoted(folder)
    if not (folder / FILE).is_file():
        raise UsageError(f"engine {where} has no {FILE}; expected a folder that inferix export wrote")
    values = read_json(folder / FILE, "plan")
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{FILE} in {where} is not the plan of an engine; export it again")
    if values.get("version") not in VERSIONS:
        raise CheckpointError(
            f"engine {where} has version {quoted(values.get('version'))}; expected one of {list(VERSIONS)}: export it "
            "again with this version of inferix, or read it with the one that wrote it"
        )
    required = json.loads(SCHEMA.read_text("utf-8"))["required"]
    if missing := [key for key in required if key not in values]:
        raise CheckpointError(f"{FILE} in {where} has no {missing[0]}; export the engine again")
    plan = Plan(folder, values)
    check_files(plan)
    return plan


def version_of(preset: Preset, kv_dtype: str, grouped: bool) -> int:
    """Version of the plan of an engine: the lowest whose readers can all play it."""
    if preset.context.rest_sink or preset.sampler.noise_scale != 1:
        return RESTING
    if grouped:
        return GROUPED
    return FIRST if kv_dtype == "float32" and preset.window_blocks == 1 else JOINT


def takes_groups(preset: Preset) -> bool:
    """True where groups of frames in a pass see other frames, or follow other texts, than the rest of it."""
    policy = preset.context
    several = preset.window_blocks > 1 and (policy.prompt_switch == "join" or preset.sampler.guidance is not None)
    return several or policy.commit_in_next or not policy.has_one_context


def check_files(plan: Plan) -> None:
    """CheckpointError for a file of the plan that is missing, cut or changed."""
    for name, facts in plan["files"].items():
        path = plan.folder / name
        where = quoted(path)
        if not path.is_file():
            raise CheckpointError(f"{where} is missing; copy the whole engine, or export it again")
        if (size := path.stat().st_size) != facts["bytes"]:
            raise CheckpointError(f"{where} has {size} bytes, expected {facts['bytes']}; copy it again or export again")
        if (digest := file_hash(path)) != facts["sha256"]:
            raise CheckpointError(
                f"{where} has SHA-256 {digest}, expected {facts['sha256']}: it is not the file that was exported; "
                "copy it again or export again"
            )


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and hash of each file in a folder, by name."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for path in sorted(folder.iterdir()) if path.name != FILE
    }  # fmt: skip


def preset_values(preset: Preset) -> dict[str, Any]:
    """A preset as plain values."""
    return asdict(preset)


def solver_rules(sampler: SamplerSpec) -> dict[str, Any]:
    """Rules of a solver as plain values, with the condition of each step, if any."""
    conditions = [sampler.condition(step) for step in range(sampler.steps)]
    facts = {key: getattr(sampler.rules, key) for key in ("step_list", "to_clean", "partial")}
    return facts | ({} if None in conditions else {"conditions": conditions})


def planned_sampler(values: dict[str, Any], rules: dict[str, Any] | None) -> SamplerSpec:
    """A sampler from its values and the rules of its solver; None for those that every reader knows."""
    if rules is None or values["solver"] in SOLVERS:
        spec: SamplerSpec = restored(SamplerSpec, values)
        return spec
    known = {key: value for key, value in rules.items() if key != "conditions"}
    if conditions := rules.get("conditions"):
        known["condition"] = lambda steps, step: float(conditions[step])
    steps = len(values["denoising_step_list"]) if known["step_list"] else values["num_steps"]
    own = {"own_rules": SolverRules(**known), "made_for": (values["solver"], steps)}
    planned: SamplerSpec = restored(PlannedSampler, values | own)
    return planned


def preset_of(values: dict[str, Any], rules: dict[str, Any] | None = None) -> Preset:
    """The preset with these values, as `preset_values` gives them. CheckpointError for fields of another version.

    rules: of its solver, as `solver_rules` gives them.
    """
    try:
        sampler = values["sampler"] | {"guidance": guidance_of(values["sampler"]["guidance"])}
        parts = {
            "about": restored(About, values["about"]),
            "sampler": planned_sampler(sampler, rules),
            "context": restored(ContextPolicy, values["context"]),
        }
        preset: Preset = restored(Preset, values | parts)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"preset in {FILE} is not of this version: {error}; export it again") from error
    return preset


def guidance_of(values: dict[str, Any] | None) -> Guidance | None:
    """The guidance with these values; None for none."""
    if values is None:
        return None
    return Guidance(
        tuple(restored(GuidanceBranch, branch) for branch in values["branches"]),
        tuple((start, tuple(scales)) for start, scales in values["scales"]),
    )


def restored(cls: Any, values: dict[str, Any]) -> Any:
    """A dataclass from plain values, in which its tuples are lists. TypeError or KeyError if a field is missing."""
    known = {each.name for each in fields(cls)}
    if unknown := sorted(values.keys() - known):
        raise TypeError(f"unknown field {unknown[0]}")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
