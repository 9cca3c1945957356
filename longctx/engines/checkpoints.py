"""Every engine's way of storing checkpoints, by the engine's name: each engine tells its own from the others'."""

from longctx.engines import NNSCALER, TORCH
from longctx.engines.nnscaler import checkpoints as nnscaler
from longctx.runtime import checkpoint, merge, writing

FORMATS: checkpoint.Formats = {
    TORCH: checkpoint.CheckpointFormat(
        mark=checkpoint.STATE,
        shards="*.distcp",
        read_state=checkpoint.read_state,
        check=checkpoint.check,
        check_folder=writing.check_last,
        merge=merge.merge,
        as_builtin=lambda merged: merged,
        exports_shards=True,
    ),
    NNSCALER: nnscaler.FORMAT,
}
