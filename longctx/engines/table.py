"""The engines by name. Each has `ensure_compiled(job)` and `run(job)`."""

from types import ModuleType

from longctx.engines import builtin
from longctx.engines.nnscaler import engine as nnscaler

ENGINES: dict[str, ModuleType] = {"torch": builtin, "nnscaler": nnscaler}
