"""A mixed integer linear program, built row by row and solved by HiGHS through scipy.

It knows nothing of plans: program.py says what variables and rows mean. An exact solver is taken, and no search of our
own, because the program of a model has some thousand variables, whatever the number of layers, and HiGHS solves it to
optimality within a second.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, milp
from scipy.sparse import coo_array

from longctx.errors import SolverError

Expression = dict[int, float]  # variable -> coefficient; CONSTANT for what has none
CONSTANT = -1
SOLVER_SECONDS = 60.0  # a solve
RELATIVE_GAP = 1e-5  # to the optimum, at which a solution counts as optimal
INFEASIBLE, OUT_OF_TIME = 2, 1  # of scipy's result.status


@dataclass(frozen=True)
class Solution:
    """The value of every variable, and by how much, at most, another solution costs less: 0.05 for 5%, 0 if none."""

    values: np.ndarray
    gap: float


class LinearProgram:
    """Variables with costs and bounds, and rows: minimize the costs' sum subject to lower <= row <= upper."""

    def __init__(self) -> None:
        self.costs: list[float] = []
        self.upper: list[float] = []
        self.integer: list[bool] = []
        self.rows: list[tuple[Expression, float, float]] = []
        self.maxima: dict[int, tuple[Expression, ...]] = {}  # variable -> what it is the largest of
        self.products: dict[tuple[int, int], int] = {}  # (binary, count) -> their product

    def variable(self, cost: float = 0.0, upper: float = 1.0, integer: bool = False) -> int:
        """A variable between 0 and `upper`."""
        self.costs.append(cost)
        self.upper.append(upper)
        self.integer.append(integer)
        return len(self.costs) - 1

    def row(self, terms: Expression, lower: float = -np.inf, upper: float = np.inf) -> None:
        """Holds an expression between two bounds."""
        constant = terms.get(CONSTANT, 0.0)
        self.rows.append((without_constant(terms), lower - constant, upper - constant))

    def largest(self, *expressions: Expression) -> int:
        """A variable that is at least each of the expressions; whoever minimizes it makes it their maximum."""
        variable = self.variable(upper=np.inf)
        for expression in expressions:
            self.row(total({variable: 1.0}, scaled(expression, -1)), lower=0)
        self.maxima[variable] = expressions
        return variable

    def any_of(self, *expressions: Expression) -> int:
        """A variable that is 1 if any of the expressions is, each of which is 0 or 1, and else 0, whoever wants it."""
        variable = self.largest(*expressions)
        self.upper[variable] = 1.0
        self.row(total({variable: 1.0}, *(scaled(expression, -1) for expression in expressions)), upper=0)
        return variable

    def product(self, binary: int, count: int, most: int) -> int:
        """A variable that is `count`, of at most `most`, where `binary` is 1, and 0 where that is 0."""
        if (binary, count) not in self.products:
            variable = self.products[binary, count] = self.variable(upper=most)
            self.row({variable: 1.0, count: -1.0, binary: -float(most)}, lower=-most)
            self.row({variable: 1.0, binary: -float(most)}, upper=0)
            self.row({variable: 1.0, count: -1.0}, upper=0)
        return self.products[binary, count]

    def minimize(
        self,
        costs: np.ndarray,
        limits: Iterable[tuple[Expression, float]] = (),
        held: Mapping[int, float] | None = None,
    ) -> Solution | None:
        """The solution of least cost with every expression of `limits` at most its bound, and the variables of `held`
        at their values; None if there is none.

        Raises:
            SolverError: the solver ended (out of time, most often) with no solution and no proof that there is none.
        """
        rows = list(self.rows)
        rows += [(without_constant(e), -np.inf, most - e.get(CONSTANT, 0.0)) for e, most in limits]
        at = [(i, v, c) for i, (terms, _, _) in enumerate(rows) for v, c in terms.items()]
        row, column, coefficient = (np.array(part) for part in zip(*at, strict=True))
        matrix = coo_array((coefficient, (row, column)), shape=(len(rows), len(costs))).tocsr()
        lower, upper = np.zeros(len(costs)), np.array(self.upper)
        for variable, value in (held or {}).items():
            lower[variable] = upper[variable] = value
        scale = 1e4 / max(costs.max(), 1e-30)  # HiGHS's tolerances are absolute, its gap of 1e-6 too
        result = milp(
            costs * scale,
            integrality=np.array(self.integer, int),
            bounds=Bounds(lower, upper),  # pyright: ignore[reportArgumentType]  (scipy takes arrays)
            constraints=(matrix, [low for _, low, _ in rows], [up for _, _, up in rows]),
            options={"mip_rel_gap": RELATIVE_GAP, "time_limit": SOLVER_SECONDS},
        )
        if result.x is not None:
            gap = float(result.mip_gap or 0.0) if result.status == OUT_OF_TIME else 0.0
            return Solution(self._tightened(result.x), gap)
        if result.status == INFEASIBLE:
            return None
        message = " ".join(str(result.message).split()).rstrip(".")
        raise SolverError(
            f"the integer program's solver found no plan, and no proof that there is none ({message}); fewer ranks or "
            "a fixed plan make the program smaller"
        )

    def _tightened(self, values: np.ndarray) -> np.ndarray:
        """A solution without what the solver leaves open: integers round, maxima no larger than they must be, and their
        products what they are."""
        values = np.where(self.integer, np.round(values), values)
        of_maxima = {v: pair for pair, v in self.products.items() if pair[0] in self.maxima}
        for variable in sorted({*self.maxima, *of_maxima}):  # as they were made: the inner ones first
            if variable in self.maxima:
                values[variable] = max(0.0, *(value_of(e, values) for e in self.maxima[variable]))
            else:
                binary, count = of_maxima[variable]
                values[variable] = values[binary] * values[count]
        return values


def total(*expressions: Expression) -> Expression:
    """The sum of expressions."""
    result: Expression = {}
    for expression in expressions:
        for variable, coefficient in expression.items():
            result[variable] = result.get(variable, 0.0) + coefficient
    return result


def scaled(expression: Expression, factor: float) -> Expression:
    return {variable: factor * coefficient for variable, coefficient in expression.items()}


def without_constant(expression: Expression) -> Expression:
    return {variable: c for variable, c in expression.items() if variable != CONSTANT}


def value_of(expression: Expression, values: np.ndarray) -> float:
    """What an expression is worth in a solution."""
    return float(sum(c * (1.0 if variable == CONSTANT else values[variable]) for variable, c in expression.items()))
