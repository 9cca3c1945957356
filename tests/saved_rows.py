"""Rows in a folder as `save_to_disk` of the library `datasets` leaves it, which is not everywhere installed."""

import json
from pathlib import Path

import pyarrow as pa
import torch


def save_rows(
    folder: Path,
    rows: torch.Tensor | list,
    kind: pa.DataType | None = None,
    column: str = "input_ids",
    n_files: int = 1,
) -> str:
    """Saves a row for each element of `rows`, of the Arrow type `kind` or the one that fits; returns the folder."""
    folder.mkdir(parents=True)
    values = pa.array(list(rows.int().numpy()) if isinstance(rows, torch.Tensor) else rows, kind)
    files = []
    for i in range(n_files):
        first, end = len(values) * i // n_files, len(values) * (i + 1) // n_files
        table = pa.table({column: values[first:end]})
        files.append({"filename": f"data-{i:05d}-of-{n_files:05d}.arrow"})
        with pa.ipc.new_stream(str(folder / files[-1]["filename"]), table.schema) as stream:
            stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    return str(folder)
