"""Legal plans drawn at random, op by op, with no eye to speed: whatever the algebra allows has to be right.

    PYTHONPATH=. python tests/plans.py --cases 500      # on 1 to 8 ranks; prints the worst errors of each family

compares loss and every gradient with the Hugging Face model's, in float32.
"""

import argparse
import random
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from families import (
    FAMILIES,
    config_of,
    random_documents,
    random_rows,
    reference_loss,
    reference_model,
    worst_gradient_error,
)
from ranks import run_ranks
from tqdm import tqdm
from transformers import PreTrainedConfig

import train
from longctx.compiler import codegen, planner
from longctx.compiler.hardware import HARDWARE
from longctx.compiler.ir import Graph, Op, Tensor
from longctx.compiler.localize import Assignment, localize
from longctx.compiler.ops import Row, legal_partitions
from longctx.compiler.placement import REPLICATE, Partition, Placement, Shard
from longctx.compiler.plan import Plan, Setting
from longctx.compiler.recompute import Recompute, names_of_keepable
from longctx.compiler.trace import sample_row, trace
from longctx.compiler.work import Work
from longctx.data.rows import apart
from longctx.huggingface.build import build_model
from longctx.proof import gradients_of
from longctx.runtime import parallel

LENGTH = 48

train.register_loss()


@dataclass(frozen=True)
class Case:
    """One drawn plan of one family's model, for `plan_ngpus` of `n_ranks` ranks.

    `apart` is whether the documents of a row do not see each other; the Hugging Face model then runs them one by one.
    """

    family: str
    seed: int
    plan_ngpus: int
    n_ranks: int
    apart: bool = False

    @property
    def n_rows(self) -> int:
        return self.n_ranks // self.plan_ngpus

    @property
    def reference(self) -> str:
        """The file of what the Hugging Face model computes."""
        return f"{self.family}-{self.n_rows}{'-apart' if self.apart else ''}.pt"


def random_assignment(graph: Graph, plan_size: int, seed: int, group_sizes: Sequence[int] = ()) -> Assignment:
    """One of each op's legal partitions; placements of what layers take; which weights are plan-sharded.

    Ranks may form groups of one of `group_sizes` neighbours, and of none if it is empty.
    """
    draw = random.Random(seed)
    eager = draw.random()  # how often an op that can be split is
    row = Row(graph.inputs[0].shape[-1], draw.choice([False, True]), draw.choice([1, *group_sizes]))
    partitions: dict[Op, Partition] = {}
    for op in (*graph.body, *(op for kind in graph.kinds for op in kind.ops)):
        if isinstance(op, Op):
            whole, *split = legal_partitions(op, plan_size, row)
            partitions[op] = draw.choice(split) if split and draw.random() < eager else whole

    def draw_placement(tensor: Tensor) -> Placement:
        orders = [(d, size, row.balanced and size == row.length) for d, size in enumerate(tensor.shape)]
        shards = [
            Shard(d, balanced=balanced) for d, size, balanced in orders if size % (plan_size * (1 + balanced)) == 0
        ]
        shards = [] if tensor.kind == "host" else shards
        return draw.choice([REPLICATE, *shards])

    alike = graph.placed_alike()
    drawn = {t: draw_placement(t) for t in dict.fromkeys(alike.values())}
    inputs = {t: drawn[leader] for t, leader in alike.items()}
    plan_sharded = {}
    for owner in (graph, *graph.kinds):
        ops = [op for op in (owner.body if isinstance(owner, Graph) else owner.ops) if isinstance(op, Op)]
        for tensor in owner.parameters.values():
            wanted = {partitions[op].inputs[i] for op in ops for i, t in enumerate(op.inputs) if t is tensor}
            dims = [d for d in range(len(tensor.shape)) if wanted == {Shard(d)}]
            if dims and draw.random() < 0.5:
                plan_sharded[tensor] = dims[0]
    boundary = draw_placement(graph.layer_calls[0].inputs[0]) if graph.layer_calls else REPLICATE
    return Assignment(plan_size, partitions, boundary, inputs, plan_sharded)


def random_policies(graph: Graph, seed: int) -> tuple[Recompute, ...]:
    """What each layer recomputes: nothing, everything, or all but some that are drawn of what may be kept."""
    draw = random.Random(seed)
    keepable = [list(names_of_keepable(kind.ops).values()) for kind in graph.kinds]
    drawn = (tuple(name for name in keepable[call.kind] if draw.random() < 0.5) for call in graph.layer_calls)
    return tuple(draw.choice([Recompute.NOTHING, Recompute.EVERYTHING, Recompute(kept)]) for kept in drawn)


def config_for(family: str, apart: bool) -> PreTrainedConfig:
    """The family's small configuration; without a routers' loss, which is of a whole row, where documents are apart."""
    config = config_of(family)
    if apart and hasattr(config, "output_router_logits"):
        config.output_router_logits = False
    return config


@cache
def trace_family(family: str, apart: bool = False) -> Graph:
    model = build_model(
        config_for(family, apart), torch.float32, sequence_length=LENGTH if apart else None, documents_apart=apart
    )
    return trace(model, sample_row(LENGTH, 4 if apart else 0))


def documents_of(case: Case) -> list[tuple[int, ...]]:
    """Where the documents of each row begin, if they are apart."""
    return [random_documents(LENGTH, seed=row) for row in range(case.n_rows)] if case.apart else []


def write_reference(folder: Path, case: Case) -> None:
    """The Hugging Face model's weights, loss and gradients on a case's rows."""
    reference = reference_model(config_for(case.family, case.apart))
    loss = reference_loss(reference, *random_rows(case.n_rows, LENGTH, 256), documents_of(case))
    loss.backward()
    stored = reference.state_dict()
    weights = {name: stored[name] for name in trace_family(case.family, case.apart).all_parameters()}
    torch.save((weights, gradients_of(reference), loss.item()), folder / case.reference)


def chosen_plan(graph: Graph, case: Case) -> Plan:
    """The planner's choice, for links and processors as fast against each other as the seed makes them."""
    draw = random.Random(case.seed)
    cpu = HARDWARE["cpu"]
    link = replace(cpu.node_link, latency=1e-7, bandwidth=10 ** draw.uniform(7, 12), pair_bandwidth=1e12)
    products = replace(cpu.rates[Work.FLOAT32_PRODUCTS], a_second=10 ** draw.uniform(9, 13))
    rates = {**cpu.rates, Work.FLOAT32_PRODUCTS: products}
    device = replace(cpu, node_link=link, rates=rates, launch_latency=1e-7)
    return planner.make_plan(graph, Setting(case.plan_ngpus, case.n_ranks, device, 64e9))


def write_case(folder: Path, case: Case, graph: Graph, chosen: bool) -> None:
    """The case's generated code, and what running it takes."""
    if chosen:
        plan = chosen_plan(graph, case)
    else:
        group_sizes = [n for n in range(2, case.plan_ngpus) if case.plan_ngpus % n == 0]
        assignment = random_assignment(graph, case.plan_ngpus, case.seed, group_sizes)
        plan = Plan(assignment, random_policies(graph, case.seed), seconds=0.0, memory=0.0)
    text = codegen.generate(localize(graph, plan.assignment), plan, str(case))
    path = folder / f"{case}"
    path.mkdir()
    (path / "gencode.py").write_text(text)
    resident = graph.named(plan.assignment.plan_sharded)
    torch.save((graph.class_name, graph.layers_path, resident), path / "facts.pt")


def run_cases(folder: Path, cases: list[Case]) -> None:
    """On each rank: every case's loss and gradients against the reference's; rank 0 writes the errors down."""
    errors = {}
    with parallel.process_group() as device:
        for case in tqdm(cases, disable=dist.get_rank() != 0):
            class_name, layers_path, resident = torch.load(folder / f"{case}" / "facts.pt")
            weights, gradients, expected = torch.load(folder / case.reference)
            module = parallel.load_generated(folder / f"{case}", class_name)
            model = parallel.parallelize(module, layers_path, device, torch.float32, case.plan_ngpus, resident)
            parallel.load_tensors(model, weights.items())
            row = model.data_parallel_rank
            inputs = [x[row : row + 1] for x in random_rows(case.n_rows, LENGTH, 256)]
            loss = module(*(apart(*inputs, documents_of(case)[row]) if case.apart else inputs))
            loss.backward()
            parallel.reduce_plan_sharded_gradients(model)
            total = loss.detach().clone()
            dist.all_reduce(total, group=model.mesh.get_group("data_parallel"))
            trained = {n for n, p in module.named_parameters() if p.requires_grad}
            found = {n: model.globally(n, g).full_tensor() for n, g in gradients_of(module).items() if n in trained}
            worst, name = worst_gradient_error(found, gradients)
            errors[case] = (abs(total.item() - expected) / abs(expected), worst, name)
        if dist.get_rank() == 0:
            torch.save(errors, folder / "errors.pt")


def check_cases(
    cases: list[Case], chosen: bool = False, start_method: str = "spawn"
) -> dict[Case, tuple[float, float, str]]:
    """Runs cases of one number of ranks; returns each one's relative loss error, worst gradient error and where.

    Args:
        chosen: whether the planner chooses the plans, where otherwise they are drawn.
        start_method: how the ranks' processes are started, as run_ranks takes it.
    """
    (n_ranks,) = {case.n_ranks for case in cases}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in cases:
            graph = trace_family(case.family, case.apart)  # refuses what transformers can't run either, in a sentence
            if not (folder / case.reference).exists():
                write_reference(folder, case)
            write_case(folder, case, graph, chosen)
        run_ranks(n_ranks, run_cases, folder, cases, start_method=start_method)
        return torch.load(folder / "errors.pt", weights_only=False)


def draw_cases(n_cases: int, n_ranks: int, first_seed: int = 0, apart: bool = False) -> list[Case]:
    """Cases over all families in turn, of plans over all ranks; on 4 ranks, also of plans of 2."""
    families = list(FAMILIES)
    plans = {4: [4, 4, 2]}.get(n_ranks, [n_ranks])
    seeds = range(first_seed, first_seed + n_cases)
    return [Case(families[i % len(families)], i, plans[i // len(families) % len(plans)], n_ranks, apart) for i in seeds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--apart", action="store_true", help="rows of documents that do not see each other")
    args = parser.parse_args()
    train.register_loss()
    worst = defaultdict(lambda: (0, 0.0, 0.0))
    for n_ranks, share in ((1, 0.05), (2, 0.3), (3, 0.1), (4, 0.35), (6, 0.1), (8, 0.1)):
        for case, (loss, gradient, _) in check_cases(
            draw_cases(round(args.cases * share), n_ranks, apart=args.apart)
        ).items():
            count, loss_before, gradient_before = worst[case.family]
            worst[case.family] = (count + 1, max(loss, loss_before), max(gradient, gradient_before))
    print("| family | plans | worst loss error | worst gradient error |\n| --- | --- | --- | --- |")
    for family, (count, loss, gradient) in worst.items():
        print(f"| {family} | {count} | {loss:.1e} | {gradient:.1e} |")


if __name__ == "__main__":
    main()
