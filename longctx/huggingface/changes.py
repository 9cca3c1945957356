"""What is changed of a model's configuration. overrides.py makes the changes; nothing here imports transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Changes:
    """What is changed of a configuration.

    Attributes:
        rope_parameters: keys of transformers' rope_parameters, or such for each type of layer; None for none.
        rope_theta: the base of the frequencies.
        overrides: `key=value` each.
        sequence_length: tokens of the rows that are trained on; None if that is not known.
    """

    rope_parameters: Mapping[str, Any] | None = None
    rope_theta: float | None = None
    overrides: tuple[str, ...] = ()
    sequence_length: int | None = None


UNCHANGED = Changes()
