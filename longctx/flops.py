"""The FLOPs of a training step, by which both planning and training measure."""


def step_flops(forward_flops: float) -> float:
    """FLOPs of a forward and a backward pass, given those of the forward; the backward takes twice as many."""
    return 3 * forward_flops
