"""The statements of a model's source, by which generated code groups its expressions and names its values."""

import ast
import os
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from longctx.compiler.ir import Statement

# Stack frames in PyTorch's files and in ours say nothing of the model. They are known by where the packages lie: a
# folder named torch may as well be one that all libraries are installed in.
PYTORCH, OURS = (f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parent.parent))


def statement_of(stack_trace: str) -> Statement | None:
    """The innermost statement of the model's source in a stack trace, or of ours if no statement is the model's."""
    frames = [(file, int(line)) for file, line in re.findall(r'File "([^"]+)", line (\d+)', stack_trace)]
    frames = [f for f in frames if not f[0].startswith(PYTORCH)]
    theirs = [f for f in frames if not f[0].startswith(OURS)]
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
