"""A traced graph at another sequence length, for what the report tells of half and of twice the length."""

from dataclasses import replace
from math import prod

from longctx.compiler.ir import Graph, LayerCall, Op, Tensor, map_tensors
from longctx.compiler.ops import spec_of


def resize(graph: Graph, old: int, new: int) -> Graph | None:
    """The graph at another sequence length; None where the model has another size, of a weight or a head, like it."""
    if any(old in tensor.shape for tensor in graph.all_parameters().values()):
        return None
    for op in graph.all_ops():
        shapes = [[new if size == old else size for size in t.shape] for t in (*op.inputs[:1], op.outputs[0])]
        is_reshape = spec_of(op).sizes is not None and prod(op.inputs[0].shape) == prod(op.outputs[0].shape)
        if is_reshape and prod(shapes[0]) != prod(shapes[-1]):
            return None
    made: dict[Tensor, Tensor] = {}

    def change(tensor: Tensor) -> Tensor:
        if tensor not in made:
            made[tensor] = replace(tensor, shape=resized(tensor))
        return made[tensor]

    def resized(tensor: Tensor) -> tuple[int, ...]:
        if tensor.kind == "host":  # documents are as long as before, and as many more or fewer in a row
            return (max(1, round(tensor.shape[0] * new / old)),)
        return tuple(new if size == old else size for size in tensor.shape)

    def sizes(value):
        return [new if size == old else size for size in value] if isinstance(value, list) else value

    def change_item(item: Op | LayerCall) -> Op | LayerCall:
        if isinstance(item, LayerCall):
            return replace(item, inputs=tuple(map(change, item.inputs)), outputs=tuple(map(change, item.outputs)))
        place = spec_of(item).sizes
        args = tuple(sizes(arg) if i == place else arg for i, arg in enumerate(item.args))
        args, kwargs = map_tensors((args, item.kwargs), change)
        return replace(item, args=args, kwargs=kwargs, outputs=tuple(map(change, item.outputs)))

    kinds = tuple(
        replace(
            kind,
            inputs=tuple(map(change, kind.inputs)),
            outputs=tuple(map(change, kind.outputs)),
            parameters={name: change(t) for name, t in kind.parameters.items()},
            constants={change(t): value for t, value in kind.constants.items()},
            ops=tuple(map(change_item, kind.ops)),
        )
        for kind in graph.kinds
    )
    return replace(
        graph,
        inputs=tuple(map(change, graph.inputs)),
        output=change(graph.output),
        parameters={name: change(t) for name, t in graph.parameters.items()},
        constants={change(t): value for t, value in graph.constants.items()},
        body=tuple(map(change_item, graph.body)),
        kinds=kinds,
    )
