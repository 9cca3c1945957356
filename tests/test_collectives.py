"""Each reshard, forward and backward, equals what one process computes from all ranks' tensors."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from placed import in_balanced_order, part_of
from ranks import run_ranks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from longctx.compiler.placement import PARTIAL, REPLICATE, Grid, Shard, reshard_steps
from longctx.runtime import collectives, parallel

WAYS = 200  # of some 900 between placements that a plan of 4 ranks tries
CASES = 12  # drawn for each reshard and plan_size, half of them in bfloat16
Tensors = list[torch.Tensor]


@dataclass(frozen=True)
class Reference:
    """What a reshard means: `outputs` computes every rank's output from every rank's input, with plain torch ops.

    `same_input`: the input is Replicate, that is, all ranks have the same. `same_gradient`: so is the gradient that
    arrives; then every rank computes the op that follows whole, and its part of the loss counts once. `options` are
    those of the function.
    """

    outputs: Callable[..., Tensors]
    same_input: bool = False
    same_gradient: bool = False
    options: dict[str, bool | int] = field(default_factory=dict)


def gathered(xs: Tensors, dim: int) -> Tensors:
    return [torch.cat(xs, dim)] * len(xs)


def sliced(xs: Tensors, dim: int) -> Tensors:
    return list(xs[0].chunk(len(xs), dim))


def from_balanced_order(xs: Tensors, dim: int) -> torch.Tensor:
    halves = [x.chunk(2, dim) for x in xs]
    return torch.cat([*(front for front, _ in halves), *(back for _, back in reversed(halves))], dim)


def copied(xs: Tensors, dim: int, copies: int) -> Tensors:
    """What ranks have of a whole that is cut into fewer parts than they are."""
    parts = xs[0].chunk(len(xs) // copies, dim)
    return [parts[rank // copies] for rank in range(len(xs))]


def summed(xs: Tensors) -> Tensors:
    return [torch.stack(xs).sum(0)] * len(xs)


REFERENCES = {
    "all_to_all": Reference(lambda xs, split, gather: sliced(gathered(xs, gather), split)),
    "all_gather": Reference(gathered, same_gradient=True),
    "all_gather_reduce": Reference(gathered),
    "take_slice": Reference(sliced, same_input=True),
    "replicate": Reference(lambda xs: xs, same_input=True),
    "all_reduce": Reference(summed, same_gradient=True),
    "all_reduce_both": Reference(summed),
    "reduce_scatter": Reference(lambda xs, dim: sliced(summed(xs), dim)),
}
BALANCED = {
    "all_to_all to": Reference(
        lambda xs, split, gather: in_balanced_order(torch.cat(xs, gather), len(xs), split),
        options={"balanced_split": True},
    ),
    "all_to_all from": Reference(
        lambda xs, split, gather: sliced([from_balanced_order(xs, gather)] * len(xs), split),
        options={"balanced_gather": True},
    ),
    "all_gather from": Reference(
        lambda xs, dim: [from_balanced_order(xs, dim)] * len(xs), same_gradient=True, options={"balanced": True}
    ),
    "all_gather_reduce from": Reference(
        lambda xs, dim: [from_balanced_order(xs, dim)] * len(xs), options={"balanced": True}
    ),
    "take_slice to": Reference(
        lambda xs, dim: in_balanced_order(xs[0], len(xs), dim), same_input=True, options={"balanced": True}
    ),
    "reduce_scatter to": Reference(
        lambda xs, dim: in_balanced_order(sum(xs), len(xs), dim), options={"balanced": True}
    ),
    "reorder to": Reference(
        lambda xs, dim: in_balanced_order(torch.cat(xs, dim), len(xs), dim), options={"balanced": True}
    ),
    "reorder from": Reference(
        lambda xs, dim: sliced([from_balanced_order(xs, dim)] * len(xs), dim), options={"balanced": False}
    ),
}
COPIED = {  # two neighbours have the same part
    "all_to_all to copies": Reference(
        lambda xs, split, gather: copied([torch.cat(xs, gather)] * len(xs), split, 2), options={"copies": 2}
    ),
    "take_slice of copies": Reference(lambda xs, dim: copied(xs, dim, 2), same_input=True, options={"copies": 2}),
    "reduce_scatter of copies": Reference(lambda xs, dim: copied([sum(xs)] * len(xs), dim, 2), options={"copies": 2}),
}


def draw_tensor(shape: list[int], draw: random.Random, dtype: torch.dtype) -> torch.Tensor:
    """Small whole numbers, which sum exactly in any order and dtype, over memory laid out in a drawn order of dims."""
    order = draw.sample(range(len(shape)), len(shape))
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    laid_out = torch.randint(-8, 9, [shape[dim] for dim in order], generator=generator).to(dtype)
    return laid_out.permute([order.index(dim) for dim in range(len(shape))])


def check_reshard(name: str, plan_size: int, rank: int, draw: random.Random, dtype: torch.dtype) -> None:
    function, reference = name.split(" ")[0], (REFERENCES | BALANCED | COPIED)[name]
    reshard = partial(getattr(collectives, function), **reference.options)
    shape = [2 * plan_size * draw.randint(1, 3) for _ in range(draw.randint(2, 4))]
    n_dims = {"all_to_all": 2, "replicate": 0, "all_reduce": 0, "all_reduce_both": 0}.get(function, 1)
    dims = [dim - draw.choice([0, len(shape)]) for dim in draw.sample(range(len(shape)), n_dims)]

    inputs = [draw_tensor(shape, draw, dtype).requires_grad_() for _ in range(plan_size)]
    inputs = inputs[:1] * plan_size if reference.same_input else inputs
    expected = reference.outputs(inputs, *dims)
    gradients = [draw_tensor(list(output.shape), draw, dtype) for output in expected]
    gradients = gradients[:1] * plan_size if reference.same_gradient else gradients
    counted = 1 if reference.same_gradient else plan_size
    loss = sum((g * y).sum(dtype=torch.float64) for g, y in zip(gradients[:counted], expected[:counted], strict=True))
    expected_gradient = torch.autograd.grad(loss, inputs[rank])[0]

    before = inputs[rank].detach().clone()
    output = reshard(inputs[rank], *dims)
    (gradient,) = torch.autograd.grad(output, inputs[rank], gradients[rank])
    case = (name, dims, shape, dtype, plan_size)
    assert output.dtype == gradient.dtype == dtype, case
    assert torch.equal(output, expected[rank]) and torch.equal(gradient, expected_gradient), case
    assert torch.equal(inputs[rank], before), case


PLACEMENTS = [REPLICATE, *(Shard(dim, balanced=balanced) for dim in (0, 1) for balanced in (False, True))]


def check_every_way(plan_size: int, rank: int) -> None:
    """From any placement to any other, those in groups of neighbours among them, and a partitioned op's gradient back.

    Each rank's part of the result counts, weighted, in a loss, whose gradient for the whole tensor is known.
    """
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-8, 9, (8, 16), generator=generator).double()
    grids = [Grid(*pair, 2) for pair in itertools.product(PLACEMENTS, repeat=2)] if plan_size == 4 else []
    ways = list(itertools.product([PARTIAL, *PLACEMENTS, *grids], [*PLACEMENTS, *grids]))
    ways = random.Random(0).sample(ways, min(WAYS, len(ways)))
    for source, target in [*ways, *((source, Shard(1, copies=2)) for source in grids)]:
        weights = [torch.randint(-8, 9, whole.shape, generator=generator).double() for _ in range(plan_size)]
        leaf = whole.clone().requires_grad_()
        parts = [part_of(leaf, target, r, plan_size) for r in range(plan_size)]
        counted = [w.flatten()[: p.numel()].view(p.shape) for w, p in zip(weights, parts, strict=True)]
        (expected,) = torch.autograd.grad(sum((w * p).sum() for w, p in zip(counted, parts, strict=True)), leaf)

        own = whole / plan_size if source == PARTIAL else part_of(whole, source, rank, plan_size)
        y = x = own.clone().requires_grad_()
        for reshard, _ in reshard_steps(source, target, True, True):
            y = getattr(collectives, reshard.function)(y, **dict(reshard.arguments))
        (gradient,) = torch.autograd.grad(y, x, counted[rank], materialize_grads=True)
        assert torch.equal(y, parts[rank]), (source, target)
        assert torch.equal(gradient, part_of(expected, source, rank, plan_size)), (source, target)


def check_own_slice_and_scale_gradient(plan_size: int, rank: int) -> None:
    weight = torch.arange(16.0 * plan_size).view(4, 4 * plan_size).t().requires_grad_()
    piece = collectives.own_slice(weight, -2)
    assert torch.equal(piece, weight.chunk(plan_size)[rank])
    assert piece.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    (gradient,) = torch.autograd.grad(piece, weight, torch.ones_like(piece))
    assert gradient.sum() == piece.numel() and torch.equal(gradient.chunk(plan_size)[rank], torch.ones_like(piece))

    scaled = collectives.scale_gradient(weight, 0.25)
    (gradient,) = torch.autograd.grad(scaled, weight, torch.full_like(weight, 8.0))
    assert torch.equal(scaled, weight) and torch.equal(gradient, torch.full_like(weight, 2.0))


def check_without_gradient(plan_size: int, rank: int) -> None:
    tokens = torch.arange(3 * plan_size)
    part = collectives.take_slice(tokens, 0)
    assert part.tolist() == tokens.chunk(plan_size)[rank].tolist() and not part.requires_grad
    assert torch.equal(collectives.all_gather(part, 0), tokens)
    if plan_size > 1:
        with pytest.raises(ValueError, match=r"dimension 1 of shape \[2, 7\] can't be split evenly over [24] ranks"):
            collectives.reduce_scatter(torch.ones(2, 7), 1)


def check_draw_own(plan_size: int) -> None:
    """Ranks drop elements of their own within draw_own, the same ones behind it, and the same again when recomputed."""
    torch.manual_seed(5)
    drawn = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        own = collectives.draw_own(lambda: F.dropout(x, 0.5))
        drawn.append((own, F.dropout(x, 0.5)))
        return own * x + drawn[-1][1] * x

    ones = torch.ones(1000, requires_grad=True)
    checkpoint(layer, ones, use_reentrant=False).sum().backward()
    (own, same), again = drawn
    assert torch.equal(own, again[0]) and torch.equal(same, again[1])
    everyones = collectives.all_gather(own.detach()[None], 0) > 0
    for rank, other in itertools.combinations(range(plan_size), 2):
        assert 400 < (everyones[rank] ^ everyones[other]).sum() < 600  # two masks that know nothing of each other
    assert all(torch.equal(mask, same.detach()) for mask in collectives.all_gather(same.detach()[None], 0))


def check_ring(plan_size: int, rank: int) -> None:
    """What goes round comes from the rank before, while more is under way; what is exchanged comes from each rank."""
    ring = collectives.ring_of(8 * plan_size, balanced=True)
    assert ring.starts[ring.rank] == collectives.own_starts(8 * plan_size, balanced=True)
    first, second = (torch.full((2, 3), float(10 * rank + number)) for number in range(2))
    arriving = [ring.pass_on(x) for x in (first, second)]
    before = (rank - 1) % plan_size
    assert [arrive().unique().tolist() for arrive in arriving] == [[10.0 * before], [10.0 * before + 1]]
    sent = torch.cat([torch.full((other,), float(rank)) for other in range(plan_size)])  # so many to each
    received = ring.exchange(sent, list(range(plan_size)), [rank] * plan_size)
    assert received.tolist() == [other for other in range(plan_size) for _ in range(rank)]


class ColumnAndRow(nn.Module):
    """Two layers, the hidden dimension split over ranks: x is Replicate, the output is Partial until it is reduced."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Parameter(torch.empty(hidden, width))
        self.down = nn.Parameter(torch.empty(width, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [b, l, width] on every rank -> [b, l/plan_size, width]
        h = F.gelu(F.linear(collectives.replicate(x), collectives.own_slice(self.up, 0)))
        return collectives.reduce_scatter(F.linear(h, collectives.own_slice(self.down, 1)), 1)


class SplitSequence(ColumnAndRow):
    """The same two layers, the first on this rank's part of the sequence, the second computed whole by every rank."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = collectives.all_gather(F.gelu(F.linear(collectives.take_slice(x, 1), self.up)), 1)
        y = F.linear(h, collectives.scale_gradient(self.down, 1 / collectives.plan_size()))
        return collectives.take_slice(y, 1)


class ColumnAndRowReduced(ColumnAndRow):
    """The same two layers, x split over ranks and gathered for the columns, the output summed, then split."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = collectives.all_gather_reduce(collectives.take_slice(x, 1), 1)
        h = F.gelu(F.linear(x, collectives.own_slice(self.up, 0)))
        return collectives.take_slice(collectives.all_reduce(F.linear(h, collectives.own_slice(self.down, 1))), 1)


def check_mlp(kind: type[ColumnAndRow], plan_size: int, rank: int) -> None:
    """Loss, and the gradients of the weights and of x, recomputed in the backward pass, under FSDP2 over all ranks.

    Each plan group has an x of its own: with fewer ranks in it than there are, FSDP sums over data-parallel copies.
    """
    torch.manual_seed(0)
    width, hidden, length, n_copies = 4 * plan_size, 8 * plan_size, 2 * plan_size, dist.get_world_size() // plan_size
    up, down = torch.randn(hidden, width) / width**0.5, torch.randn(width, hidden) / hidden**0.5
    x, target = torch.randn(2, n_copies, 3, length, width).unbind()
    leaves = [leaf.clone().requires_grad_() for leaf in (up, down, x)]
    expected = (F.linear(F.gelu(F.linear(leaves[2], leaves[0])), leaves[1]) - target).square().sum()
    expected.backward()

    with torch.device("meta"):
        mlp = kind(width, hidden)
    fully_shard(mlp)
    mlp.set_gradient_divide_factor(1.0)
    mlp.set_force_sum_reduction_for_comms(True)
    mlp.to_empty(device="cpu")
    parallel.load_tensors(mlp, [("up", up), ("down", down)])
    copy = dist.get_rank() // plan_size
    mine = x[copy].clone().requires_grad_()
    loss = (checkpoint(mlp, mine, use_reentrant=False) - target[copy].chunk(plan_size, 1)[rank]).square().sum()
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss)

    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    gradients = mlp.up.grad.full_tensor(), mlp.down.grad.full_tensor(), mine.grad
    expected_gradients = leaves[0].grad, leaves[1].grad, leaves[2].grad[copy]
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


def check_everything() -> None:
    """Four ranks as plans of 1, 2 and 4 ranks, one after the other, to start the processes only once."""
    dist.init_process_group("gloo")
    for plan_size in (1, 2, 4):
        collectives.set_plan_group(dist.new_subgroups(plan_size)[0])
        assert collectives.plan_size() == plan_size
        rank = collectives.plan_rank()
        draw = random.Random(plan_size)  # every rank draws the same
        for name in (*REFERENCES, *BALANCED, *(COPIED if plan_size % 2 == 0 else ())):
            for case in range(CASES):
                check_reshard(name, plan_size, rank, draw, (torch.float32, torch.bfloat16)[case % 2])
        check_own_slice_and_scale_gradient(plan_size, rank)
        check_without_gradient(plan_size, rank)
        check_every_way(plan_size, rank)
        check_draw_own(plan_size)
        check_ring(plan_size, rank)
        for kind in (ColumnAndRow, SplitSequence, ColumnAndRowReduced):
            check_mlp(kind, plan_size, rank)
    dist.destroy_process_group()


def test_every_reshard_and_its_gradient_equal_their_one_process_reference():
    run_ranks(4, check_everything)


@pytest.fixture
def rank_0_of_8(monkeypatch):
    """Makes this process rank 0 of 8 that are not there: collectives return at once, with undefined contents."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    monkeypatch.setattr(collectives, "_plan_group", dist.group.WORLD)
    yield
    dist.destroy_process_group()


def test_reshards_of_fake_tensors_have_the_shapes_of_real_ones(rank_0_of_8):
    """What the memory benchmark relies on: a generated program runs on fake tensors, backward pass included."""
    dims = {"all_to_all": (1, 2), "replicate": (), "all_reduce": (), "all_reduce_both": ()}
    shapes = {"all_to_all": [2, 8, 512], "all_gather": [2, 512, 64], "all_gather_reduce": [2, 512, 64]}
    shapes |= {name: [2, 8, 64] for name in ("take_slice", "reduce_scatter", "own_slice")}
    with FakeTensorMode():
        for name in (*REFERENCES, "own_slice"):
            x = torch.empty(2, 64, 64, dtype=torch.bfloat16, requires_grad=True)
            y = getattr(collectives, name)(x, *dims.get(name, (1,)))
            assert list(y.shape) == shapes.get(name, [2, 64, 64]), name
            y.sum().backward()
            assert x.grad.shape == x.shape, name


def test_a_slice_shares_no_memory_with_the_tensor_it_is_taken_from(rank_0_of_8):
    whole = torch.randn(8, 16)
    assert collectives.take_slice(whole, 0).untyped_storage().nbytes() == whole.nbytes // 8


@pytest.mark.parametrize("name", REFERENCES)
def test_what_is_sent_is_contiguous_as_nccl_demands_even_of_one_number_that_is_expanded(name, rank_0_of_8, monkeypatch):
    sent = []
    for owner, function in (
        (collectives, "all_gather_single"),
        (collectives, "reduce_scatter_single"),
        (dist, "all_reduce"),
        (dist, "all_to_all_single"),
    ):
        original = getattr(owner, function)

        def spy(*args, original=original, **kwargs):
            sent.extend(tensor.is_contiguous() for tensor in args)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, function, spy)
    dims = {"all_to_all": (0, 1), "replicate": (), "all_reduce": (), "all_reduce_both": ()}.get(name, (0,))
    x = torch.ones((), requires_grad=True).expand(8, 8)
    getattr(collectives, name)(x, *dims).sum().backward()
    assert sent and all(sent)


def test_the_gradient_of_a_sum_of_gathered_losses_is_still_one_number_that_is_expanded(rank_0_of_8):
    """What lets the loss see, with no look at the values, that the gradients of all tokens are equal."""
    losses = torch.ones(1, 4, requires_grad=True)
    strides = []
    losses.register_hook(lambda gradient: strides.append((gradient.shape, gradient.stride())))
    collectives.all_gather(losses, 1).sum().backward()
    assert strides == [((1, 4), (0, 0))]


def test_a_reshard_before_set_plan_group_raises_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(collectives, "_plan_group", None)
    with pytest.raises(RuntimeError, match="set_plan_group"):
        collectives.all_reduce(torch.ones(2))
