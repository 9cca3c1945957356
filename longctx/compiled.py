"""The compiled folder: what compile writes and run reads, and all that passes between compiler/ and runtime/.

It holds gencode.py, the generated module; plan.json, which `PlanFile` describes; report.md, for people to read; what a
rehearsal wrote; and what Python makes of gencode.py.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longctx import seal
from longctx.errors import CompiledError, DecisionsError, GeneratedCodeError, one_line
from longctx.schema import Count, decode, read_json

PLAN, CODE, REPORT = "plan.json", "gencode.py", "report.md"
REHEARSAL, REHEARSAL_TEXT = "rehearsal.json", "rehearsal.md"
# All that a compiled folder may hold. The first is the mark of one: by it a folder is known to be this program's.
FILES = (PLAN, CODE, REPORT, REHEARSAL, REHEARSAL_TEXT, "__pycache__")


@dataclass(frozen=True)
class GeneratedModule:
    """What run has to know of the module in gencode.py."""

    class_name: str
    layers_path: str  # the module's list of layers; "" if it has none
    layer_results: Count  # the values that a layer returns, at the most
    plan_sharded: dict[str, Count]  # plan-sharded weights, and the dimension that each is split along
    parameters: dict[str, list[Count]]  # every weight's whole shape
    forward_flops: float  # of one row, attention counted whole
    forward_flops_causal: float  # of one row, of attention what its mask leaves
    fused_attention: list[list[list[Count]]]  # shapes of query, key, value of one rank's fused attentions, each once


@dataclass(frozen=True)
class Decisions:
    """What the planner chose. Another compile can take over all but what layers recompute, which depends on the length.

    Attributes:
        boundary: the placement of the hidden states between layers.
        ops: for each class in gencode.py the name of every op in order, and the dimension of its annotation along
            which it is partitioned; None if every rank computes it whole.
        recompute: what each layer recomputes.
        balanced: whether the tokens of a row are split in balanced order; earlier versions had none.
    """

    boundary: str
    ops: dict[str, list[tuple[str, str | None]]]
    recompute: tuple[str, ...]
    balanced: bool | None = None


@dataclass(frozen=True)
class Predicted:
    """What is predicted of one micro-batch on one rank, for people to read."""

    time: dict[str, float]  # seconds, by what takes them
    memory: dict[str, float | str]  # bytes at the peak, by kind; and 'moment', when that is
    parts: dict[str, float]  # seconds of computing, by the parts that a rehearsal measures

    @property
    def attention_share(self) -> float:
        """The part of the time that attention takes, 0 to 1."""
        attention = sum(seconds for part, seconds in self.parts.items() if part.startswith("attention"))
        return attention / sum(seconds for name, seconds in self.time.items() if name != "fsdp_hidden")

    @property
    def peak_bytes(self) -> float:
        return sum(size for size in self.memory.values() if not isinstance(size, str))


@dataclass(frozen=True)
class PlanFile:
    """plan.json."""

    inputs: dict[str, Any]  # the cache key: all that the plan and the code depend on, by name, as JSON
    decisions: Decisions
    module: GeneratedModule
    predicted: Predicted


def fingerprint(inputs: dict[str, Any]) -> str:
    """A hash of a plan's inputs, the same in every process."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def write_plan_file(folder: Path, plan: PlanFile) -> None:
    """Writes plan.json, which seals the files that are in the folder already, and itself."""
    seals = seal.seal(folder, [name for name in (CODE, REPORT) if (folder / name).is_file()])
    facts = {"fingerprint": fingerprint(plan.inputs), **asdict(plan), "files": {n: asdict(s) for n, s in seals.items()}}
    (folder / PLAN).write_bytes(seal.sealed_json(facts, indent=1))


def read_plan_file(folder: Path) -> PlanFile:
    """The plan.json of a compiled folder.

    Raises:
        CompiledError: there is none, or it is damaged.
    """
    try:
        return decode(PlanFile, _read_sealed(folder))
    except (OSError, ValueError) as error:
        problem = f"{folder / PLAN} is missing or damaged ({one_line(error)})"
        raise CompiledError(f"{problem}; remove the folder {folder}") from error


def _read_sealed(folder: Path) -> dict[str, Any]:
    """What plan.json holds. Raises a ValueError or OSError unless it is there as it was written."""
    facts, is_sealed = seal.read_sealed_json((folder / PLAN).read_bytes())
    if not is_sealed:
        raise ValueError("its digest is missing")
    return facts


def why_damaged(folder: Path) -> str | None:
    """Why the plan.json of a compiled folder can't be used; None if it can, or if there is none."""
    try:
        _read_sealed(folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"{PLAN}: {one_line(error)}"
    return None


def check_generated(folder: Path) -> None:
    """Raises a GeneratedCodeError unless the other files of a compiled folder are what compile wrote, to the byte."""
    try:
        seals = decode(dict[str, seal.Seal], _read_sealed(folder)["files"])
        seal.check_sizes(folder, seals)
        seal.verify(folder, seals)
    except (OSError, ValueError, KeyError) as error:
        raise GeneratedCodeError(
            f"{folder} is not as compile wrote it: {one_line(error)}; remove the folder to compile it anew"
        ) from error


def read_fingerprint(folder: Path) -> str | None:
    """The fingerprint of a compiled folder; None if its code is missing or its plan.json is not whole."""
    if not (folder / CODE).is_file():
        return None
    try:
        facts = _read_sealed(folder)
        found = fingerprint(decode(PlanFile, facts).inputs)
        return found if facts["fingerprint"] == found else None
    except (OSError, ValueError, LookupError):
        return None


def read_decisions(path: Path) -> dict[str, Any]:
    """The decisions in a plan.json, as JSON; a person may have edited them, and the planner checks them.

    Raises:
        DecisionsError: the file is not a plan.json.
    """
    try:
        return asdict(decode(_PlanOfDecisions, read_json(path)).decisions)
    except ValueError as error:
        raise DecisionsError(f"it is no plan.json that compile wrote ({error})") from error


@dataclass(frozen=True)
class _PlanOfDecisions:
    """What is read of another plan's plan.json."""

    decisions: Decisions
