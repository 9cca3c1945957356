"""Annotations: nnScaler's grammar, its errors quoting the annotation and pointing at the place."""

import functools
import importlib.util

import pytest
import torch

from longctx.compiler.annotation import output_shapes, parse
from longctx.compiler.ops import REGISTERED_OPS, RegisteredOp, register_op
from longctx.compiler.ops.aten import UNKNOWN
from longctx.errors import AnnotationError


@pytest.mark.parametrize(
    ("text", "shapes", "outputs"),
    [
        ("b l d^, n^ d^, b l -> b l", [(2, 5, 8), (100, 8), (2, 5)], [(2, 5)]),
        (
            "b (k g) l^ d^, b k l^ d^, b k l^ e^ -> b l^ (k g) e^",
            [(1, 8, 5, 4), (1, 2, 5, 4), (1, 2, 5, 3)],
            [(1, 5, 8, 3)],
        ),
        ("* d^, d^ -> * d^", [(2, 3, 4, 8), (8,)], [(2, 3, 4, 8)]),
        ("* d^, d^ -> * d^", [(8,), (8,)], [(8,)]),
        ("m k+, k+ n -> m n", [(2, 3), (3, 4)], [(2, 4)]),
        ("a 2, ? -> a, a 2", [(3, 2), None], [(3,), (3, 2)]),
        ("(h d^) l, h -> l h d^, ?", [(6, 4), (2,)], [(4, 2, 3), None]),
    ],
)
def test_shapes_of_the_outputs_follow_from_those_of_the_inputs(text, shapes, outputs):
    assert output_shapes(parse(text), shapes) == outputs


def test_an_output_dimension_whose_length_no_input_tells_is_an_error():
    with pytest.raises(AnnotationError, match="dimension 'h' has a length that no input tells"):
        output_shapes(parse("(h d^) l -> l h d^"), [(6, 4)])


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("a $ b -> a", "character 3", "'$' is not part of an annotation"),
        ("a b -> a c", "character 10", "'c' is in an output but in no input"),
        ("a+ b -> a b", "character 9", "'a' is summed over"),
        ("a, a+ -> 1", "character 4", "'a' is marked differently"),
        ("(a b -> a", "character 6", "expected a dimension, found '->'"),
        ("() -> 1", "character 2", "at least one identifier"),
        ("a, -> a", "character 4", "an entry is missing"),
        ("a b -> a", "character 3", "'b' is not in every output"),
        ("a ? -> a", "character 1", "'?' stands alone"),
        ("a * -> a", "character 3", "'*' stands for leading dimensions"),
        ("a -> * a", "character 6", "'*' is in an output but in no input"),
        ("a, b", "character 5", "expected '->'"),
        ("a -> a -> a", "character 8", "unexpected '->'"),
    ],
)
def test_an_annotation_that_breaks_the_grammar_is_quoted_and_the_place_is_pointed_at(text, place, problem):
    with pytest.raises(AnnotationError) as error:
        parse(text)
    assert repr(text) in str(error.value)
    assert f"at {place} " in str(error.value)
    assert problem in str(error.value)


def test_a_dimension_with_two_lengths_is_refused_with_both():
    with pytest.raises(AnnotationError, match=r"'d\^' has length 8 in one tensor and 9 in another"):
        output_shapes(parse("b l d^, n^ d^, b l -> b l"), [(2, 5, 8), (100, 9), (2, 5)])


def test_a_tensor_with_another_number_of_dimensions_than_its_annotation_is_refused():
    with pytest.raises(AnnotationError, match=r"input 0 has 3 dimensions there, but the tensor's shape is \[2, 5\]"):
        output_shapes(parse("b l d^, n^ d^, b l -> b l"), [(2, 5), (100, 9), (2, 5)])


def test_only_functions_that_generated_code_can_import_are_registered():
    def local(x: torch.Tensor) -> torch.Tensor:
        return x

    with pytest.raises(AnnotationError, match="move it to the top level of a module"):
        register_op("a -> a")(local)


def whole(x: torch.Tensor) -> str:
    return "a^ -> a^"


def test_the_fingerprint_of_an_annotation_function_is_its_place_and_its_source(tmp_path):
    fingerprint = RegisteredOp(torch.relu, whole, UNKNOWN).fingerprint()
    assert fingerprint.startswith(f"{__name__}.whole ") and "0x" not in fingerprint
    told = set()
    for body in ('"a -> a"', '"a^ -> a^"'):
        (tmp_path / "theirs.py").write_text(f"def whole(x):\n    return {body}\n")
        spec = importlib.util.spec_from_file_location("theirs", tmp_path / "theirs.py")
        theirs = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(theirs)
        told.add(RegisteredOp(torch.relu, theirs.whole, UNKNOWN).fingerprint())
    assert len(told) == 2


def test_an_annotation_is_text_or_a_function():
    with pytest.raises(AnnotationError, match="neither a string nor a function"):
        register_op(functools.partial(whole))


def test_an_annotation_that_contradicts_the_op_is_an_error_when_it_is_traced(monkeypatch):
    from families import small_config

    from longctx.compiler.trace import sample_row, trace
    from longctx.huggingface.build import build_model
    from longctx.kernels.rms_norm import rms_norm

    wrong = RegisteredOp(rms_norm, "* d^, d^ -> *", UNKNOWN)
    monkeypatch.setitem(REGISTERED_OPS, wrong.name, wrong)
    wrapped = build_model(small_config("llama"), torch.float32)
    sample = sample_row(8)
    with pytest.raises(AnnotationError, match=r"promises an output of shape \[1, 8\], but it gives \[1, 8, 64\]"):
        trace(wrapped, sample)
