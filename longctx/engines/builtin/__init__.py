"""The built-in engine, on stock PyTorch: torch.export, an exact plan, generated Python, FSDP2."""

from longctx.engines.builtin.cache import ensure_compiled
from longctx.engines.builtin.rehearse import rehearse
from longctx.engines.builtin.run import run

__all__ = ["ensure_compiled", "rehearse", "run"]
