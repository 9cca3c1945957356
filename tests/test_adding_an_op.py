"""docs/adding_an_op.md: the entry that it adds is all that an operator needs."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F

from longctx.compiler.ir import Op, Tensor
from longctx.compiler.lifetimes import saved_tensors
from longctx.compiler.ops import aten, expression, is_known, legal_partitions
from longctx.compiler.ops.python import Expression, Values

PAGE = (Path(__file__).parent.parent / "docs" / "adding_an_op.md").read_text()


def hardswish() -> Op:
    x, y = (Tensor(name, (2, 4, 6), torch.float32, True) for name in "xy")
    return Op("aten.hardswish.default", (x,), {}, (y,), "", None)


def test_without_its_entry_the_pages_operator_is_computed_by_every_rank_and_everything_is_saved():
    op = hardswish()
    assert not is_known(op)
    assert [p.dim for p in legal_partitions(op, 2)] == [None]
    assert saved_tensors(op) == [*op.inputs, *op.outputs]


def test_the_entry_on_the_page_makes_its_operator_known_to_every_stage(monkeypatch):
    (entry,) = re.findall(r"```python\n(pointwise\(.*\))\n```", PAGE)
    spec = eval(entry, vars(aten))
    monkeypatch.setitem(aten.ATEN, spec.name, spec)
    op = hardswish()
    assert is_known(op)
    assert len(legal_partitions(op, 2)) == 4  # along each dimension, and whole
    assert saved_tensors(op) == op.inputs
    written = expression(op, Values(lambda tensor: Expression(tensor.name), "device")).text
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(eval(written, {"F": F, "x": x}), F.hardswish(x), rtol=0, atol=0)


def test_the_function_on_the_page_is_registered_as_it_stands_there(tmp_path, monkeypatch):
    (module,) = re.findall(r"```python\n(# my_ops\.py\n.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "my_ops.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    from longctx.compiler.ops import REGISTERED_OPS

    monkeypatch.setitem(REGISTERED_OPS, "my_ops.gated_product", None)  # so that the table is left as it was
    __import__("my_ops")
    assert REGISTERED_OPS["my_ops.gated_product"].annotate((), {}).text == "b l k^, n k^, n k^ -> b l n"
