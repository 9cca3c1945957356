"""Writes a plan as Python: one module for all ranks, such as an engineer would have written.

Equal layers share one class. Parameters have their Hugging Face names, and values the names of the variables in the
model's own source. What the source computes in one statement is one statement here.
"""

import keyword
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from importlib.util import find_spec

import numpy
import torch

from longctx.compiler.ir import Graph, LayerCall, LayerKind, Op, Tensor, nbytes
from longctx.compiler.lifetimes import storages
from longctx.compiler.memory import say_bytes
from longctx.compiler.ops import expression, imports_of, passed_round, spec_of
from longctx.compiler.ops.python import Expression, Values
from longctx.compiler.plan import Plan
from longctx.compiler.recompute import Recompute, names_of_keepable

LINE = 120
LARGE = 10_000_000  # bytes; so many of a value that no gradient is made for, as rotary tables, are worth a `del`
CARRIED = "hidden_states"  # the name of the value that one layer passes to the next
KEEP, KEPT, KEPT_MODULE = "keep", "kept", "longctx.kernels.kept"  # what keeps outputs while a layer is recomputed

_PRELUDE = '''
def module(**parts):
    """A module that has, under the given names, submodules or parameters of the given shapes."""
    result = nn.Module()
    for name, part in parts.items():
        setattr(result, name, nn.Parameter(torch.empty(part)) if isinstance(part, tuple) else part)
    return result
'''


def generate(graph: Graph, plan: Plan, title: str) -> str:
    """The text of gencode.py, from the graph of one rank. `title` is the first line of the file's docstring."""
    constants = _name_constants(graph)
    root, names = _root_class(graph, plan, constants)
    classes = [_layer_class(graph, number, plan, constants, names) for number in range(len(graph.kinds))]
    parts = [
        f'"""{title}\n\nWritten by train.py --run_mode compile; plan.json holds the plan, report.md explains it.\n"""',
        _imports(graph, plan),
        *(_constant(name, value) for name, value in constants.values()),
        _PRELUDE,
        *classes,
        root,
    ]
    return format_code("\n\n".join(part.strip("\n") for part in parts) + "\n")


def has_formatter() -> bool:
    """Whether ruff is installed, which the generated code is formatted with."""
    return find_spec("ruff") is not None


def format_code(text: str) -> str:
    """`text` as ruff formats it; unchanged, with long lines, where there is no ruff."""
    if not has_formatter():
        return text
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", str(LINE), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def _imports(graph: Graph, plan: Plan) -> str:
    functions = [imported for op in graph.all_ops() for imported in imports_of(op)]
    if any(policy.kept for policy in plan.recompute):
        functions += [(KEPT_MODULE, KEEP), (KEPT_MODULE, KEPT)]
    by_module: dict[str, set[str]] = {}
    for module, function in functions:
        by_module.setdefault(module, set()).add(function)
    lines = ["import torch", "import torch.nn.functional as F", "from torch import nn"]
    if any(policy.kept is not None for policy in plan.recompute):
        lines.append("from torch.utils.checkpoint import checkpoint")
    lines.append("")
    lines += [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(by_module.items())]
    return "\n".join(lines)


# --- constants -------------------------------------------------------------------------------------------------------


def _name_constants(graph: Graph) -> dict[Tensor, tuple[str, torch.Tensor]]:
    """A module-level name and the value of every constant tensor. Constants of equal value share a name.

    The buffers that hold them take no name that a submodule or a parameter has.
    """
    reserved = {path.split(".")[0] for owner in (graph, *graph.kinds) for path in owner.parameters}
    reserved |= {graph.layers_path.split(".")[0]}
    named: dict[Tensor, tuple[str, torch.Tensor]] = {}
    for tensors in (graph.constants, *(kind.constants for kind in graph.kinds)):
        for tensor, value in tensors.items():
            name = tensor.name.upper()
            taken = dict(named.values())
            number = 0
            while _buffer(name) in reserved or name in taken and not _are_equal(taken[name], value):
                number += 1
                name = f"{tensor.name.upper()}_{number}"
            named[tensor] = (name, value)
    return dict(sorted(named.items(), key=lambda item: item[1][0]))


def _are_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _buffer(name: str) -> str:
    """The buffer that holds a constant in a module. Buffers follow the module to its device, once and for all."""
    return name.lower()


def _buffers(owner: Graph | LayerKind, constants: dict[Tensor, tuple[str, torch.Tensor]]) -> dict[str, str]:
    """The expressions that make the buffers of a class. Checkpoints don't have them, since the code does."""
    names = dict.fromkeys(constants[tensor][0] for tensor in owner.constants)
    return {_buffer(name): f"nn.Buffer({name}, persistent=False)" for name in names}


def _constant(name: str, value: torch.Tensor) -> str:
    """NAME = torch.tensor([...]), with numbers that give the value exactly, to the bit."""
    dtype = "" if value.dtype in (torch.float32, torch.int64, torch.bool) else f", dtype={value.dtype}"
    shape = "" if value.dim() == 1 else f".view({tuple(value.shape)})"
    numbers = ", ".join(_literal(number) for number in value.flatten())
    body = "\n".join(textwrap.wrap(numbers, LINE - 4, initial_indent="    ", subsequent_indent="    "))
    text = f"torch.tensor(\n    [\n{textwrap.indent(body, '    ')}\n    ]{dtype}\n){shape}"
    return f"# fmt: off\n{name} = {text}\n# fmt: on"


def _literal(number: torch.Tensor) -> str:
    """The shortest Python literal that gives a number of this dtype exactly."""
    if number.dtype == torch.bool or not number.dtype.is_floating_point:
        return repr(number.item())
    shortest = str(numpy.float32(number.item())) if number.dtype == torch.float32 else repr(number.item())
    exact = torch.tensor(float(shortest), dtype=number.dtype).equal(number)
    text = shortest if exact else repr(number.item())
    return f'float("{text}")' if text in ("inf", "-inf", "nan") else text


# --- function bodies -------------------------------------------------------------------------------------------------


@dataclass
class _Body:
    """A function while it is written: which ops are statements, which are inlined in them, and the names of values."""

    device: str  # the expression that new tensors take their device from
    reserved: set[str]  # names that no variable may take
    constants: dict[Tensor, tuple[str, torch.Tensor]]
    parameters: dict[Tensor, str]  # 'self.mlp.up_proj.weight'
    results: tuple[Tensor, ...]  # the values that the function returns
    statements: list[Op | LayerCall] = field(default_factory=list)
    inlined: dict[Tensor, Op] = field(default_factory=dict)
    names: dict[Tensor, str] = field(default_factory=dict)
    last_use: dict[Tensor, int] = field(default_factory=dict)  # index of the last statement that reads a value
    targets: dict[Tensor, str] = field(default_factory=dict)  # the variable that the model's source assigns a value to
    module_results: set[Tensor] = field(default_factory=set)  # the values that only other modules read
    kept: dict[Op, str] = field(default_factory=dict)  # ops whose outputs some layers keep, by the names for that
    large: set[Tensor] = field(default_factory=set)  # worth a `del` although no gradient is made for them

    def express(self, op: Op) -> Expression:
        """The expression of an op: `kept("name", function, arguments)` if some layers keep its output."""
        written = expression(op, Values(self.refer, self.device))
        return written.called_by(KEPT, f'"{self.kept[op]}"') if op in self.kept else written

    def refer(self, tensor: Tensor) -> Expression:
        """How a statement refers to a value: by a name, or by the expression of the op that is inlined."""
        if tensor in self.inlined:
            return self.express(self.inlined[tensor])
        if tensor in self.parameters:
            return Expression(self.parameters[tensor])
        if tensor in self.constants:
            return Expression(f"self.{_buffer(self.constants[tensor][0])}")
        return Expression(self.names[tensor])

    def reads(self, item: Op | LayerCall) -> Iterable[Tensor]:
        """The values that a statement reads, those of the ops inlined in it included."""
        for tensor in item.inputs:
            if tensor in self.inlined:
                yield from self.reads(self.inlined[tensor])
            else:
                yield tensor

    def choose_name(self, tensor: Tensor, candidates: Iterable[str], at: int) -> str:
        """Gives a value that statement `at` makes the first of the names that no value has that is still to be read."""
        live = {name for other, name in self.names.items() if self.last_use.get(other, -1) > at}
        names = [c for c in candidates if _is_name(c) and c != "_"]
        names = [c for c in names if c not in self.reserved] or ["value"]
        numbered = (f"{names[0]}_{i}" for i in range(1, len(live) + 2))
        self.names[tensor] = next(name for name in (*names, *numbered) if name not in live)
        return self.names[tensor]


def _start_body(graph: Graph, owner: Graph | LayerKind, constants: dict, device: str) -> _Body:
    """Decides which ops are statements and which are inlined, so that each statement is one of the model's source."""
    items = owner.body if isinstance(owner, Graph) else owner.ops
    results = (owner.output,) if isinstance(owner, Graph) else owner.outputs
    reserved = {"torch", "F", "nn", "checkpoint", KEEP, KEPT, "module", "self", "layer"}
    reserved |= {name for name, _ in constants.values()}
    reserved |= {name for op in graph.all_ops() for _, name in imports_of(op)}
    body = _Body(device, reserved, constants, {t: _attribute(name) for name, t in owner.parameters.items()}, results)

    users: dict[Tensor, list[Op | LayerCall]] = {}
    for item in items:
        for tensor in item.inputs:
            users.setdefault(tensor, []).append(item)
    for item in items:
        if len(item.outputs) == 1 and item.outputs[0] not in results and len(users[item.outputs[0]]) == 1:
            (user,) = users[item.outputs[0]]
            if isinstance(item, Op) and isinstance(user, Op) and _in_one_statement(item, user):
                body.inlined[item.outputs[0]] = item
    body.statements = [item for item in items if item.outputs[0] not in body.inlined]
    for index, item in enumerate(body.statements):
        body.last_use |= dict.fromkeys(body.reads(item), index)
    body.last_use |= dict.fromkeys(results, len(body.statements))
    body.large = {t for t, storage in storages(items).items() if t is storage and nbytes(t) >= LARGE}
    _match_targets(body, users)
    for op in body.statements:
        if isinstance(op, Op) and all(user.module != op.module for t in op.outputs for user in users.get(t, [])):
            body.module_results.update(op.outputs)
    return body


def _in_one_statement(op: Op, user: Op) -> bool:
    """Whether both ops came from one statement of the source, or one of them from a function that it calls."""
    if op.statement is None or user.statement is None:
        return False
    if op.statement.place in {s.place for s in (*user.statement.callers, user.statement)}:
        return True
    return not op.statement.targets and user.statement.place in {s.place for s in op.statement.callers}


def _match_targets(body: _Body, users: dict[Tensor, list[Op | LayerCall]]) -> None:
    """Finds the variable of the source that each value is: the results of a statement are, in order, its targets."""
    groups: dict[tuple, list[Op]] = {}
    targets: dict[tuple, tuple[str, ...]] = {}
    for op in body.statements:
        if isinstance(op, Op) and op.statement and op.statement.targets:
            groups.setdefault(_source_place(op), []).append(op)
            targets[_source_place(op)] = op.statement.targets
    for place, ops in groups.items():
        within = {id(op) for op in (*ops, *body.inlined.values()) if _source_place(op) == place}
        results = [t for op in ops for t in op.outputs if any(id(u) not in within for u in users.get(t, [None]))]
        body.targets |= dict(zip(results[-len(targets[place]) :], targets[place], strict=False))


def _source_place(op: Op) -> tuple:
    """The module and the statement that an op came from; empty if it came from none."""
    return (op.module.rsplit(".", 1)[0], op.statement.place) if op.statement else ()


def _candidates(op: Op, tensor: Tensor, body: _Body) -> list[str]:
    """Names for a value, the best first.

    They are the variable in the source, the name of the value before a cast or a reshard, the name of its module, and
    that of its operator.
    """
    source = next((body.names[t] for t in body.reads(op) if t in body.names), None)
    operator = spec_of(op).name
    names = [body.targets[tensor]] if tensor in body.targets else []
    if not names and source and (op.note or spec_of(op).keeps_name):
        names.append(source)
    elif not names and op.statement:
        names += [s.targets[0] for s in reversed(op.statement.callers[-1:]) if len(s.targets) == 1]
    if tensor in body.module_results:
        names.append(op.module.rsplit(".", 1)[-1])
    names += _inlined_modules(op, body)
    return [*names, f"{source}_{operator}" if source else operator]


def _inlined_modules(op: Op, body: _Body) -> list[str]:
    """The names of the modules, inside the op's own, whose results are inlined in the op's statement; nearest first."""
    names = []
    for inner in (body.inlined[t] for t in op.inputs if t in body.inlined):
        if inner.module != op.module and inner.module.startswith(op.module):
            names.append(inner.module.rsplit(".", 1)[-1])
        names += _inlined_modules(inner, body)
    return names


def _write_op(op: Op, index: int, body: _Body) -> list[str]:
    """The lines of an op that is the body's statement `index`.

    They are `name = expression  # shape`, and then a `del` of the values with a gradient, and of other large ones, that
    no later statement reads. The last statement is followed by a `return`, or is one.
    """
    right = body.express(op).text
    dead = [t for t in dict.fromkeys(body.reads(op)) if t in body.names and body.last_use[t] == index]
    left = [body.choose_name(t, _candidates(op, t, body), index) for t in op.outputs]
    if index + 1 == len(body.statements) and op.outputs == body.results and op.statement and not op.statement.targets:
        return [f"return {right}"]
    shape = f"# {list(op.outputs[0].shape)}"
    resharding = spec_of(op).resharding
    moves = _describe_reshard(op, resharding.comment) if resharding else _describe_ring(op)
    lines = [f"# {moves}", ""] if moves else [""]
    lines[-1] = f"{', '.join(left)} = {right}"
    if len(lines[-1]) + len(shape) + 10 <= LINE:
        lines[-1] += f"  {shape}"
    freed = [body.names[t] for t in dead if (t.requires_grad or t in body.large) and body.names[t] not in left]
    if index + 1 == len(body.statements):
        lines.append(f"return {', '.join(body.names[t] for t in body.results)}")
    elif freed:
        lines.append(f"del {', '.join(freed)}")
    return lines


def _describe_reshard(op: Op, comment: str) -> str:
    """The comment before a reshard: what it sends, how many bytes of that a rank holds, and why it is needed."""
    before, after = (say_bytes(nbytes(t)) for t in (op.inputs[0], op.outputs[0]))
    gradient = f", its gradient is all-gathered to {before}" if op.outputs[0].requires_grad else ""
    over = {"within": " within {} neighbours", "across": " between groups of {}"}
    where = "".join(text.format(op.kwargs[name]) for name, text in over.items() if name in op.kwargs)
    return f"{comment.format(before=before, after=after, gradient=gradient)}{where}: {op.note}"


def _describe_ring(op: Op) -> str:
    """The comment before an op whose inputs are passed round: how many bytes a rank has of these. Else it is empty."""
    told = spec_of(op).told
    spec = told and told.ring
    ring = spec and op.kwargs.get(spec.argument)
    if not spec or not ring:
        return ""
    size = say_bytes(sum(map(nbytes, passed_round(op, spec))))
    where = f", between groups of {ring.across}" if ring.across > 1 else ""
    if spec.reach(op) is None:
        return f"blocks of {size} go round, and the next one travels while one is used{where}"
    return f"of blocks of {size} on other ranks what is in reach is sent{where}"


# --- classes ---------------------------------------------------------------------------------------------------------


def _layer_class(graph: Graph, number: int, plan: Plan, constants: dict, names: dict[Tensor, str]) -> str:
    """The class of layer kind `number`. `names` are the names that the root has for its own values."""
    kind = graph.kinds[number]
    arguments: list[str] = []
    calls = graph.calls_of(number)
    for tensor in calls[0].inputs:
        wanted = names[tensor] if arguments else CARRIED
        arguments.append(wanted if wanted not in arguments else f"{wanted}_{len(arguments)}")
    body = _start_body(graph, kind, constants, f"{arguments[0]}.device")
    body.names = dict(zip(kind.inputs, arguments, strict=True))
    kept = {name for call in calls for name in plan.recompute[call.index].kept or ()}
    body.kept = {op: name for op, name in names_of_keepable(kind.ops).items() if name in kept}
    lines, section = [], None
    ops = [op for op in body.statements if isinstance(op, Op)]  # all of them: no layer calls another
    for index, op in enumerate(ops):
        if section not in (None, op.module.split(".")[0]):
            lines.append("")
        section = op.module.split(".")[0]
        lines += _write_op(op, index, body)
    which = _ranges([call.index for call in calls])
    return _class(
        kind.class_name,
        f"{graph.layers_path}: {which}.",
        _parameter_tree(kind) | _buffers(kind, constants),
        kind.inputs,
        arguments,
        lines,
    )


def _root_class(graph: Graph, plan: Plan, constants: dict) -> tuple[str, dict[Tensor, str]]:
    """The class of the whole model, and the names that it has for its values."""
    arguments = [t.name for t in graph.inputs]
    body = _start_body(graph, graph, constants, f"{arguments[0]}.device")
    body.names = dict(zip(graph.inputs, arguments, strict=True))
    for call in graph.layer_calls[:1]:
        body.targets[call.inputs[0]] = CARRIED
    lines: list[str] = []
    index = 0
    while index < len(body.statements):
        statement = body.statements[index]
        if isinstance(statement, LayerCall):
            run = _run_of_layers(statement, index, body, plan)
            lines += _write_run(run, index, graph, plan, body)
            index += len(run)
        else:
            lines += _write_op(statement, index, body)
            index += 1
    tree = _parameter_tree(graph)
    if graph.kinds:
        *path, name = graph.layers_path.split(".")
        reduce(lambda node, part: node.setdefault(part, {}), path, tree)[name] = _module_list(graph)
    tree |= _buffers(graph, constants)
    says = "The model with its loss, summed over tokens."
    return _class(graph.class_name, says, tree, graph.inputs, arguments, lines), body.names


def _run_of_layers(first_call: LayerCall, first: int, body: _Body, plan: Plan) -> list[LayerCall]:
    """The calls that one loop can make, from `first_call` on, which is statement `first`.

    Each takes the output of the call before it; their other inputs and their recompute policies are the same.
    """
    run = [first_call]
    for call in body.statements[first + 1 :]:
        last = run[-1]
        if not isinstance(call, LayerCall) or len(last.outputs) != 1 or call.index != last.index + 1:
            break
        same = call.inputs == (last.outputs[0], *first_call.inputs[1:])
        read_later = body.last_use[last.outputs[0]] > first + len(run)
        if not same or read_later or plan.recompute[call.index] != plan.recompute[last.index]:
            break
        run.append(call)
    return run


def _say_policy(policy: Recompute) -> str:
    """The comment above the layers that have a policy."""
    if policy.kept is None:
        return "These layers keep all that their backward pass needs."
    if not policy.kept:
        return "These layers keep their input only, and run their forward again in the backward pass."
    return "These layers keep their input and the outputs that are named, and compute the rest again in backward."


def _write_run(run: list[LayerCall], first: int, graph: Graph, plan: Plan, body: _Body) -> list[str]:
    """The lines of a loop over layers, or of the call of a single layer."""
    layers = f"self.{graph.layers_path}"
    given = [body.names[t] for t in run[0].inputs]
    last = first + len(run) - 1
    # The second turn of a loop reads its other inputs again, after the first has given its output a name.
    body.last_use |= {t: max(body.last_use[t], last + 1) for t in run[0].inputs[1:]} if len(run) > 1 else {}
    made = [body.choose_name(t, [CARRIED], last) for t in run[-1].outputs]
    policy = plan.recompute[run[0].index]
    lines = ["", *(f"# {line}" for line in textwrap.wrap(_say_policy(policy), LINE - 10))]

    def call(layer: str, arguments: list[str]) -> str:
        if policy.kept is None:
            return f"{layer}({', '.join(arguments)})"
        ops = graph.kinds[run[0].kind].ops
        random = any(spec_of(op).draws_random(op) for op in ops)
        options = ["use_reentrant=False"] + ([] if random else ["preserve_rng_state=False"])
        if policy.kept:
            kept = ", ".join(f'"{name}"' for name in policy.kept)
            options.append(f"context_fn={KEEP}({kept})")
        return f"checkpoint({', '.join([layer, *arguments, *options])})"

    if len(run) == 1:
        return [*lines, f"{', '.join(made)} = {call(f'{layers}[{run[0].index}]', given)}"]
    if given[0] != made[0]:
        lines.append(f"{made[0]} = {given[0]}")
    whole = len(run) == len(graph.layer_calls)
    span = layers if whole else f"{layers}[{run[0].index}:{run[-1].index + 1}]"
    return [*lines, f"for layer in {span}:", f"    {made[0]} = {call('layer', [made[0], *given[1:]])}", ""]


def _class(name: str, says: str, tree: dict, inputs: Sequence[Tensor], arguments: list[str], lines: list[str]) -> str:
    """The class of a module, with the parameters and buffers in `tree` and a forward that consists of `lines`."""
    assignments = "\n".join(f"self.{part} = {_parameters(value)}" for part, value in tree.items())
    shapes = ", ".join(
        f"{argument} on the host" if t.kind == "host" else f"{argument} {list(t.shape)}"
        for argument, t in zip(arguments, inputs, strict=True)
    )
    forward = "\n".join([f"# {shapes}", *lines])
    return f'''
class {name}(nn.Module):
    """{says}"""

    def __init__(self):
        super().__init__()
{textwrap.indent(assignments, " " * 8)}

    def forward(self, {", ".join(arguments)}):
{textwrap.indent(forward, " " * 8)}
'''


def _parameter_tree(owner: Graph | LayerKind) -> dict:
    """{'mlp': {'up_proj': {'weight': (14336, 4096)}}}: the parameters' shapes, nested as their names are.

    A parameter that is not trained, as a table of sines may be, has the expression that makes it.
    """
    tree: dict = {}
    for name, tensor in owner.parameters.items():
        *path, last = name.split(".")
        frozen = f"nn.Parameter(torch.empty({tensor.shape}), requires_grad=False)"
        node = reduce(lambda node, part: node.setdefault(part, {}), path, tree)
        node[last] = tensor.shape if tensor.requires_grad else frozen
    return tree


def _attribute(path: str) -> str:
    """The expression for a parameter: self.mlp.up_proj.weight, or self.ffn["0"].weight within a list of modules."""
    return "self" + "".join(f".{part}" if _is_name(part) else f'["{part}"]' for part in path.split("."))


def _is_name(part: str) -> bool:
    """Whether Python can write it behind a dot."""
    return part.isidentifier() and not keyword.iskeyword(part)


def _parameters(node: dict | tuple | str) -> str:
    """The Python expression that makes a node of the parameter tree."""
    if isinstance(node, str):
        return node
    if isinstance(node, tuple):
        return f"nn.Parameter(torch.empty({node}))"
    parts = {name: str(v) if isinstance(v, tuple) else _parameters(v) for name, v in node.items()}
    if all(map(_is_name, parts)):
        return f"module({', '.join(f'{name}={text}' for name, text in parts.items())})"
    holder = "nn.ModuleDict"  # its parts are reached by subscript, whatever their names
    if all(isinstance(part, tuple) for part in node.values()):
        holder, parts = "nn.ParameterDict", {name: f"torch.empty({shape})" for name, shape in parts.items()}
    return f"{holder}({{{', '.join(f'{name!r}: {text}' for name, text in parts.items())}}})"


def _module_list(graph: Graph) -> str:
    """The nn.ModuleList of all layers. A pattern of kinds that repeats is written once."""
    kinds = [graph.kinds[call.kind].class_name for call in graph.layer_calls]
    if len(set(kinds)) == 1:
        return f"nn.ModuleList({kinds[0]}() for _ in range({len(kinds)}))"
    n = len(kinds)
    period = next(p for p in range(1, n + 1) if n % p == 0 and kinds == kinds[:p] * (n // p))
    return f"nn.ModuleList(kind() for kind in [{', '.join(kinds[:period])}]{f' * {n // period}' if period < n else ''})"


def _ranges(numbers: list[int]) -> str:
    """'layers 0 to 31', 'layers 0, 2, 4', 'layers 0 to 2, 4 to 6'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "layers " + ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
