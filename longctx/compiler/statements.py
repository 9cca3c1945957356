"""The statements of a model's source, by which generated code groups its expressions and names its values."""

import ast
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from longctx.compiler.ir import Statement

PACKAGE = str(Path(__file__).parent.parent)  # stack frames in our own files say nothing of the model


def statement_of(stack_trace: str) -> Statement | None:
    """The innermost statement of the model's source in a stack trace, or of ours if no statement is the model's."""
    frames = [(file, int(line)) for file, line in re.findall(r'File "([^"]+)", line (\d+)', stack_trace)]
    frames = [f for f in frames if "/torch/" not in f[0] and "\\torch\\" not in f[0]]
    theirs = [f for f in frames if not f[0].startswith(PACKAGE)]
    found = [s for file, line in theirs or frames if (s := _statements(file).get(line))]
    return replace(found[-1], callers=tuple(found[:-1])) if found else None


@lru_cache(maxsize=64)
def _statements(file: str) -> dict[int, Statement]:
    """The simple statement on each line of a source file: an assignment, a return or an expression."""
    try:
        with open(file) as source:
            tree = ast.parse(source.read())
    except (OSError, SyntaxError, ValueError):
        return {}
    lines = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)):
            assigned = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            names = assigned.elts if isinstance(assigned, ast.Tuple) else [assigned]
            targets = tuple(n.id for n in names if isinstance(n, ast.Name))
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                lines[line] = Statement((file, node.lineno), targets)
    return lines
