"""What a layer recomputes in its backward pass, instead of keeping it from its forward."""

from enum import Enum


class Recompute(Enum):
    """A layer's policy. The values are what plan.json holds."""

    NOTHING = "nothing"  # keep all that the backward pass needs
    ALL_BUT_ATTENTION = "all but attention"  # keep the layer's input, and attention's output, the dearest to recompute
    EVERYTHING = "everything"  # keep the layer's input alone
