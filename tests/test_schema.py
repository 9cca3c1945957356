"""Decoded JSON becomes an object of the right types whole, or a ValueError that names the key at fault."""

import enum
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import pytest

from longctx.schema import Count, Positive, Range, decode, describe, read_json


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Position:
    step: Count
    share: Annotated[float, Range(above=0, at_most=1)]


@dataclass(frozen=True)
class State:
    position: Position
    shapes: dict[str, list[int]]
    pairs: list[tuple[str, str | None]]
    rates: dict[Color, Positive]
    size: float | str
    format: Literal[1, 2]
    exact: bool
    rest: Any
    names: tuple[str, ...]
    later: int | None = None


STATE = {
    "position": {"step": 3, "share": 0.5},
    "shapes": {"w": [2, 3]},
    "pairs": [["a", None], ["b", "c"]],
    "rates": {"red": 2},
    "size": 1.5,
    "format": 2,
    "exact": True,
    "rest": {"any": [None, "thing"]},
    "names": ["a", "b"],
    "of_a_later_version": 3,
}


def test_a_value_of_the_right_types_is_decoded_whole():
    state = decode(State, STATE)
    assert (state.position, state.later) == (Position(3, 0.5), None)
    assert (state.pairs, state.names) == ([("a", None), ("b", "c")], ("a", "b"))
    assert type(state.rates[Color.RED]) is float
    assert asdict(state)["rest"] == STATE["rest"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"position": None}, "position: null, where an object belongs"),
        ({"position": {"step": -3, "share": 1}}, "position.step: -3, where a whole number of 0 or more belongs"),
        ({"position": {"step": True, "share": 1}}, "position.step: true, where a whole number of 0 or more belongs"),
        ({"position": {"step": 2.0, "share": 1}}, "position.step: 2.0, where a whole number of 0 or more belongs"),
        ({"position": {"step": 2**63, "share": 1}}, "position.step: 9223372036854775808, where a number of at most 64"),
        ({"position": {"step": 0}}, "position.share is missing"),
        ({"position": {"step": 0, "share": 0}}, "position.share: 0, where a number above 0 and of 1 or less belongs"),
        ({"position": {"step": 0, "share": float("nan")}}, "position.share: NaN, where a number above 0"),
        ({"shapes": {"w": 3}}, "shapes.w: 3, where a list belongs"),
        ({"shapes": {"w": [1, "2"]}}, 'shapes.w[1]: "2", where a whole number belongs'),
        ({"pairs": [["a", None], ["b"]]}, "pairs[1]: a list of 1, where one of 2 belongs"),
        ({"pairs": [["a", 3]]}, "pairs[0][1]: 3, where a string belongs"),
        ({"rates": {"green": 1.0}}, 'rates: "green", where "red" or "blue" belongs'),
        ({"rates": {"red": 10**400}}, "rates.red: 0x"),
        ({"rates": {"red": float("inf")}}, "rates.red: Infinity, where a number above 0 belongs"),
        ({"size": None}, "size: null, where a number or a string belongs"),
        ({"format": 99}, "format: 99, where 1 or 2 belongs"),
        ({"format": True}, "format: true, where 1 or 2 belongs"),
        ({"exact": 1}, "exact: 1, where true or false belongs"),
        ({"later": "x" * 100}, 'later: "' + "x" * 39 + "..., where a whole number belongs"),
        ({"names": {"a": 1}}, "names: an object, where a list belongs"),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused_by_its_path(change, sentence):
    with pytest.raises(ValueError) as error:
        decode(State, STATE | change)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize("name", [name for name in STATE if name != "of_a_later_version"])
def test_a_key_may_be_missing_only_where_its_default_is_none(name):
    with pytest.raises(ValueError, match=f"^{name} is missing$"):
        decode(State, {key: value for key, value in STATE.items() if key != name})


def test_a_whole_that_is_no_object_is_refused():
    with pytest.raises(ValueError, match="^a list, where an object belongs$"):
        decode(State, [])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "Expecting value"),
        (b'{"a"', "Expecting ':'"),
        (b"\xff", "can't decode byte 0xff"),
        (b"[" * 100_000, "it is nested too deep"),
        (b"9" * 5000, "integer string conversion"),
    ],
)
def test_a_file_that_is_not_json_is_refused_with_the_reason(tmp_path, content, sentence):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_json(tmp_path / "file")


def test_what_is_no_file_is_refused_with_the_reason(tmp_path):
    for path, reason in ((tmp_path, "it is no file"), (tmp_path / "none", "No such file or directory")):
        with pytest.raises(ValueError, match=f"^{reason}$"):
            read_json(path)


@pytest.mark.parametrize(
    ("allowed", "text"),
    [
        (Range(), "a number"),
        (Range(at_least=1), "a number of 1 or more"),
        (Range(above=0), "a number above 0"),
        (Range(at_most=9), "a number of 9 or less"),
        (Range(at_least=1, at_most=9), "a number from 1 to 9"),
    ],
)
def test_a_range_is_described_in_words(allowed, text):
    assert describe(Annotated[float, allowed]) == text
