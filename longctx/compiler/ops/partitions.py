"""The annotations of PyTorch's operators: which of their dimensions may be partitioned, told from their shapes.

A rule takes an op and returns its annotation, in the notation of annotation.py. Many operators share a rule: what
matters is not what they compute but how the elements of their output depend on those of their inputs.
"""

from collections.abc import Callable, Sequence
from math import prod

from longctx.compiler.ir import Op


def names_of(shape: Sequence[int]) -> list[str]:
    """A name for every dimension, by its place counted from the last, so that broadcast dimensions agree."""
    return [_LETTERS[len(shape) - 1 - i] for i in range(len(shape))]


_LETTERS = "zyxwvutsrqponm"


def _join(*entries: Sequence[str]) -> str:
    return ", ".join(" ".join(entry) if entry else "?" for entry in entries)


def elementwise(op: Op) -> str:
    """Dimensions agree from the last on; one of length 1 that another tensor stretches stays as it is."""
    out = op.outputs[0].shape
    names = names_of(out)

    def entry(shape: Sequence[int]) -> list[str]:
        aligned = list(zip(shape, out[len(out) - len(shape) :], names[len(out) - len(shape) :], strict=True))
        return [name if size == full else "1" for size, full, name in aligned]

    return f"{_join(*(entry(t.shape) for t in op.inputs))} -> {_join(_only_read(names, op))}"


def _only_read(names: list[str], op: Op) -> list[str]:
    """The output's names; a dimension that no input has in full has its length instead."""
    out = op.outputs[0].shape
    read = set()
    for tensor in op.inputs:
        offset = len(out) - len(tensor.shape)
        read |= {offset + i for i, size in enumerate(tensor.shape) if size == out[offset + i]}
    return [name if i in read else str(out[i]) for i, name in enumerate(names)]


def linear(op: Op) -> str:
    """x @ weight.T + bias: the inner dimension may be summed over ranks only where no bias would be added by each."""
    x = op.inputs[0].shape
    rows = names_of(x)[:-1]
    if len(op.inputs) == 3:
        return f"{_join([*rows, 'k^'], ['n', 'k^'], ['n'])} -> {_join([*rows, 'n'])}"
    return f"{_join([*rows, 'k+'], ['n', 'k+'])} -> {_join([*rows, 'n'])}"


def matmul(op: Op) -> str:
    left, right = op.inputs[0].shape, op.inputs[1].shape
    if len(left) != len(right) or len(left) < 2 or left[:-2] != right[:-2]:
        return replicated(op)
    batch = [f"b{i}" for i in range(len(left) - 2)]
    return f"{_join([*batch, 'm', 'k+'], [*batch, 'k+', 'n'])} -> {_join([*batch, 'm', 'n'])}"


def baddbmm(op: Op) -> str:
    """bias + left @ right for each of a batch; the bias may have length 1 where the product has more."""
    bias, out = op.inputs[0].shape, op.outputs[0].shape
    entry = [name if size == full else "1" for name, size, full in zip("bmn", bias, out, strict=True)]
    return f"{_join(entry, ['b', 'm', 'k^'], ['b', 'k^', 'n'])} -> b m n"


def embedding(op: Op) -> str:
    rows = names_of(op.inputs[1].shape)
    return f"n^ d, {_join(rows)} -> {_join([*rows, 'd'])}"


def layer_norm(op: Op) -> str:
    x = op.inputs[0].shape
    n_normalized = len(op.args[1])
    rows, features = names_of(x)[: len(x) - n_normalized], [f"{n}^" for n in names_of(x)[len(x) - n_normalized :]]
    return f"{_join([*rows, *features], *[features] * (len(op.inputs) - 1))} -> {_join([*rows, *features])}"


def never_along(*arguments: int) -> Callable[[Op], str]:
    """The output has the input's dimensions, and the one named by an argument is never split (softmax, cumsum)."""

    def write(op: Op) -> str:
        shape = op.inputs[0].shape
        dim = op.kwargs.get("dim", next(op.args[i] for i in arguments if len(op.args) > i))
        names = names_of(shape)
        names[dim % len(shape)] += "^"
        return f"{_join(*[names] * len(op.inputs))} -> {_join(*[names] * len(op.outputs))}"

    return write


def dim_of(op: Op, argument: int, default: int = 0) -> int:
    """The dimension that an argument names, by its place if it has no name; `default` if the call leaves it out."""
    return op.kwargs.get("dim", op.args[argument] if len(op.args) > argument else default)


def resized_along(argument: int, *, removed: bool = False, default: int = 0) -> Callable[[Op], str]:
    """The output has another length along the dimension named by an argument, or not that dimension."""

    def write(op: Op) -> str:
        shape = op.inputs[0].shape
        dim = dim_of(op, argument, default) % len(shape)
        names = names_of(shape)

        def entry(length: int) -> list[str]:
            return [*names[:dim], str(length), *names[dim + 1 :]]

        befores = [entry(tensor.shape[dim]) for tensor in op.inputs]
        afters = [names[:dim] + names[dim + 1 :] if removed else entry(t.shape[dim]) for t in op.outputs]
        return f"{_join(*befores)} -> {_join(*afters)}"

    return write


def one_index_of(argument: int) -> Callable[[Op], str]:
    """The second tensor is put in at one index of the dimension named by an argument, which it does not have."""

    def write(op: Op) -> str:
        shape = op.inputs[0].shape
        dim = dim_of(op, argument) % len(shape)
        names = names_of(shape)
        names[dim] = str(shape[dim])
        return f"{_join(names, [*names[:dim], *names[dim + 1 :]])} -> {_join(names)}"

    return write


def at_indices(op: Op) -> str:
    """gather, scatter: indices along one dimension, which is never split; the others are where all have the same."""
    shapes = [tensor.shape for tensor in (*op.inputs, *op.outputs)]
    names = names_of(shapes[0])
    whole = {op.args[1] % len(names)} | {d for d, sizes in enumerate(zip(*shapes, strict=True)) if len({*sizes}) > 1}
    entries = [[str(n) if d in whole else names[d] for d, n in enumerate(shape)] for shape in shapes]
    return f"{_join(*entries[: len(op.inputs)])} -> {_join(*entries[len(op.inputs) :])}"


def stack(op: Op) -> str:
    out = op.outputs[0].shape
    dim = (op.args[1] if len(op.args) > 1 else 0) % len(out)
    names = names_of(op.inputs[0].shape)
    return f"{_join(*[names] * len(op.inputs))} -> {_join([*names[:dim], str(out[dim]), *names[dim:]])}"


def reduced(mark: str) -> Callable[[Op], str]:
    """Dimensions that are reduced are summed over ranks (mark '+') or never split (mark '^': a mean, a maximum)."""

    def write(op: Op) -> str:
        shape = op.inputs[0].shape
        given = op.args[1] if len(op.args) > 1 else None
        dims = {d % len(shape) for d in ([given] if isinstance(given, int) else given or range(len(shape)))}
        keepdim = len(op.args) > 2 and op.args[2]
        names = [f"{name}{mark if i in dims else ''}" for i, name in enumerate(names_of(shape))]
        after = ["1" if i in dims else name for i, name in enumerate(names) if i not in dims or keepdim]
        return f"{_join(names)} -> {_join(after or ['1'])}"

    return write


def permute(op: Op) -> str:
    """The dimensions in the order that the second argument lists."""
    return _reordered(op, [d % len(op.args[1]) for d in op.args[1]])


def transpose(op: Op) -> str:
    """Two dimensions trade places: those that the arguments name, or, where there are none, the only two."""
    order = list(range(len(op.inputs[0].shape)))
    if len(order) > 1:
        first, second = op.args[1:3] if len(op.args) > 1 else (0, 1)
        order[first], order[second] = order[second], order[first]
    return _reordered(op, order)


def _reordered(op: Op, order: Sequence[int]) -> str:
    names = names_of(op.inputs[0].shape)
    return f"{_join(names)} -> {_join([names[d] for d in order])}"


def reshaped(op: Op) -> str:
    """view, reshape, flatten, unsqueeze: dimensions merged or cut, found from the two shapes.

    A group of dimensions that becomes one, or one that becomes a group, may be split by its outermost; where several
    become several, none may.
    """
    before, after = op.inputs[0].shape, op.outputs[0].shape
    left: list[str] = ["1"] * len(before)
    right: list[str] = ["1"] * len(after)
    for number, (i, j) in enumerate(_reshape_groups(before, after)):
        name = f"g{number}x"
        if len(i) == 1 and len(j) == 1:
            left[i[0]] = right[j[0]] = name
        elif len(j) == 1:
            _fill_group(left, before, i, right, j[0], name)
        elif len(i) == 1:
            _fill_group(right, after, j, left, i[0], name)
        else:
            for d in i:
                left[d] = str(before[d])
            for d in j:
                right[d] = str(after[d])
    return f"{_join(left)} -> {_join(right)}"


def _fill_group(parts: list[str], shape: Sequence[int], dims: list[int], whole: list[str], dim: int, name: str) -> None:
    """`parts[dims]` are the factors of `whole[dim]`: the outermost has a name, the others their lengths."""
    names = [name, *(str(shape[d]) for d in dims[1:])]
    for d, part in zip(dims, names, strict=True):
        parts[d] = part
    whole[dim] = f"({' '.join(names)})"


def _reshape_groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions, those of length 1 left out, that have equal products before and after."""
    left = [i for i, size in enumerate(before) if size != 1]
    right = [j for j, size in enumerate(after) if size != 1]
    groups = []
    while left and right:
        i, j = [left.pop(0)], [right.pop(0)]
        while (a := prod(before[d] for d in i)) != (b := prod(after[d] for d in j)):
            (i if a < b else j).append((left if a < b else right).pop(0))
        groups.append((i, j))
    return groups


def squeeze(op: Op) -> str:
    """A dimension that would go if it had length 1 stays whole otherwise: a rank's part of it may have length 1."""
    shape = op.inputs[0].shape
    given = op.args[1] if len(op.args) > 1 else range(len(shape))
    dims = {d % len(shape) for d in ([given] if isinstance(given, int) else given)}
    names = [str(shape[i]) if i in dims else name for i, name in enumerate(names_of(shape))]
    return f"{_join(names)} -> {_join([name for i, name in enumerate(names) if i not in dims or shape[i] != 1])}"


def unflatten(op: Op) -> str:
    """A dimension that is cut into pieces may be split by the outermost if its size is left open (-1): the others are
    the same on every rank."""
    shape, (dim, sizes) = op.inputs[0].shape, op.args[1:]
    dim %= len(shape)
    pieces = [str(size) for size in op.outputs[0].shape[dim : dim + len(sizes)]]
    whole, names = str(shape[dim]), names_of(shape)
    if sizes[0] == -1:
        pieces[0] = names[dim]
        whole = f"({' '.join(pieces)})"
    return f"{_join([*names[:dim], whole, *names[dim + 1 :]])} -> {_join([*names[:dim], *pieces, *names[dim + 1 :]])}"


def repeat_interleave(op: Op) -> str:
    """Element i becomes elements i * n to i * n + n - 1, so a split of the input is one of the output."""
    shape = op.inputs[0].shape
    if len(op.args) < 3 or op.args[2] is None or not isinstance(op.args[1], int) or op.kwargs:
        return replicated(op)
    dim = op.args[2] % len(shape)
    names = names_of(shape)
    return f"{_join(names)} -> {_join([*names[:dim], f'({names[dim]} {op.args[1]})', *names[dim + 1 :]])}"


def outer(op: Op) -> str:
    """Every element of one vector times every element of the other."""
    return "y, z -> y z"


def matrices(op: Op) -> str:
    """tril, triu: each matrix of the last two dimensions is looked at as a whole."""
    names = names_of(op.inputs[0].shape)
    names = [*names[:-2], *(f"{name}^" for name in names[-2:])]
    return f"{_join(names)} -> {_join(names)}"


def like_first(op: Op) -> str:
    """type_as: of the second tensor only the dtype matters."""
    names = names_of(op.inputs[0].shape)
    return f"{_join(names, *[[]] * (len(op.inputs) - 1))} -> {_join(names)}"


def replicated(op: Op) -> str:
    """Whatever it is, it is right if every rank computes it whole."""
    return f"{_join(*[[]] * len(op.inputs))} -> {_join(*[[]] * len(op.outputs))}"
