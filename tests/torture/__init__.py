"""Runs that are killed, starved and damaged thousands of times: `make torture`. Parts are modules with a `main`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """How often something was tried, and how it went."""

    what: str
    tries: int
    outcome: str
