"""What a part yields, and what comes of it. Nothing here needs PyTorch, which takes seconds to import."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Row:
    """One line of the table: what was measured, and what came out. A figure is None where there is none."""

    what: str
    ms: float | None = None  # of one call
    tflops: float | None = None  # 1e12 floating-point operations a second
    tb_per_s: float | None = None  # 1e12 bytes a second, read and written
    peak_gb: float | None = None  # 1e9 bytes, above what was held before the call
    note: str = ""
    state: str = "measured"  # or 'left out', or 'failed', for which the note says why
    detail: Any = None  # for gpu.json only


class Measurement(NamedTuple):
    """Something to measure. If `measure` raises, the row of this name says so, and the next measurement follows."""

    what: str
    measure: Callable[[], list[Row]]


class LeftOut(Exception):
    """There is nothing to measure on this machine; the message says what is missing."""
