"""What each rank has of a whole, by the definition of its placement."""

import torch

from longctx.compiler.placement import Grid, Placement, Shard


def in_balanced_order(whole: torch.Tensor, n_ranks: int, dim: int) -> list[torch.Tensor]:
    """Each rank's part: the block of its number from the front, and that from the back."""
    blocks = whole.chunk(2 * n_ranks, dim)
    return [torch.cat([blocks[rank], blocks[-1 - rank]], dim) for rank in range(n_ranks)]


def part_of(whole: torch.Tensor, placement: Placement, rank: int, n_ranks: int) -> torch.Tensor:
    """What a rank has of a value: its slice of a split one, else all of it."""
    if isinstance(placement, Grid):
        of_group = part_of(whole, placement.outer, rank // placement.size, n_ranks // placement.size)
        return part_of(of_group, placement.inner, rank % placement.size, placement.size)
    if not isinstance(placement, Shard):
        return whole
    if placement.balanced:
        return in_balanced_order(whole, n_ranks, placement.dim)[rank]
    return whole.chunk(n_ranks // placement.copies, placement.dim)[rank // placement.copies].contiguous()
