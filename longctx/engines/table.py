"""The engines by name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from longctx.engines import NNSCALER, TORCH, builtin
from longctx.engines.nnscaler import engine as nnscaler
from longctx.job import Job


@dataclass(frozen=True)
class Engine:
    """What an engine does.

    Attributes:
        ensure_compiled: compiles the job's plan, unless that has been done, and returns the folder.
        run: compiles if it has to and trains; returns the steps that were done before it and the steps that are now.
        rehearse: compiles if it has to, and times and weighs one rank alone; None where an engine can't.
    """

    ensure_compiled: Callable[[Job], Path]
    run: Callable[[Job], tuple[int, int]]
    rehearse: Callable[[Job], None] | None = None


ENGINES = {
    TORCH: Engine(builtin.ensure_compiled, builtin.run, builtin.rehearse),
    NNSCALER: Engine(nnscaler.ensure_compiled, nnscaler.run),
}
