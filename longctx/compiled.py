"""The compiled folder: what compile writes and run reads, and all that passes between compiler/ and runtime/.

It holds gencode.py, the generated module; plan.json, which `PlanFile` describes; report.md, for people to read; and
what Python makes of gencode.py.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longctx.errors import CompiledError, DecisionsError

PLAN, CODE, REPORT = "plan.json", "gencode.py", "report.md"
# All that a compiled folder may hold. The first is the mark of one: by it a folder is known to be this program's.
FILES = (PLAN, CODE, REPORT, "__pycache__")


@dataclass(frozen=True)
class GeneratedModule:
    """What run has to know of the module in gencode.py."""

    class_name: str
    layers_path: str  # the module's list of layers; "" if it has none
    recompute: tuple[str, ...]  # each layer's recompute policy
    plan_sharded: dict[str, int]  # plan-sharded weights, and the dimension that each is split along
    parameters: dict[str, list[int]]  # every weight's whole shape
    forward_flops: float  # of one row, attention counted whole
    forward_flops_causal: float  # of one row, attention counted by half


@dataclass(frozen=True)
class PlanFile:
    """plan.json.

    `inputs` is the cache key: all that the plan and the code depend on. `decisions` is what the planner chose, which
    another compile can take over. `module` is what run relies on. `predicted` is for people: seconds and bytes.
    """

    inputs: dict[str, Any]
    decisions: dict[str, Any]
    module: GeneratedModule
    predicted: dict[str, Any]


def fingerprint(inputs: dict[str, Any]) -> str:
    """A hash of a plan's inputs, the same in every process."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def write_plan_file(folder: Path, plan: PlanFile) -> None:
    facts = {"fingerprint": fingerprint(plan.inputs), **asdict(plan)}
    (folder / PLAN).write_text(json.dumps(facts, indent=1) + "\n")


def read_plan_file(folder: Path) -> PlanFile:
    """The plan.json of a compiled folder.

    Raises:
        CompiledError: there is none, or it is damaged.
    """
    try:
        facts = json.loads((folder / PLAN).read_text())
        module = GeneratedModule(**{**facts["module"], "recompute": tuple(facts["module"]["recompute"])})
        return PlanFile(facts["inputs"], facts["decisions"], module, facts["predicted"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompiledError(f"{folder / PLAN} is missing or damaged; remove the folder {folder}") from error


def read_fingerprint(folder: Path) -> str | None:
    """The fingerprint of a compiled folder; None where there is none that is whole."""
    if not (folder / CODE).is_file():
        return None
    try:
        return json.loads((folder / PLAN).read_text())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_decisions(path: Path) -> dict[str, Any]:
    """The decisions in a plan.json.

    Raises:
        DecisionsError: it is none.
    """
    try:
        return json.loads(path.read_text())["decisions"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DecisionsError("it is no plan.json that compile wrote") from error
