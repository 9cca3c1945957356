"""The parts of benchmarks/gpu.py, in the order in which they run: each a module that yields its measurements.

    python -m benchmarks.gpu_parts kernels FOLDER [--small]      # one part alone, into FOLDER/rows.jsonl

A part's `measurements(small, folder)` yields measurements, which measuring.py describes. __main__.py makes them one
after the other and writes down what each gives before the next begins.
"""

from dataclasses import dataclass

ROWS = "rows.jsonl"  # what a part writes


@dataclass(frozen=True)
class Part:
    """One part: a process of its own, with a share of the time."""

    module: str  # in this package
    title: str
    weight: float  # its share of the time, relative to the others'


# The weights are the minutes that each part gets of eight.
PARTS = (
    Part("ceilings", "Ceilings", 0.5),
    Part("kernels", "Kernels at one rank's shapes", 1.5),
    Part("truth", "Truth", 2.8),
    Part("loss", "The loss and its peers", 1.0),
    Part("rehearsal", "Rehearsal of one rank of eight", 2.2),
)
