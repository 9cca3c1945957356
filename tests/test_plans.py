"""Every plan, drawn or chosen, computes the Hugging Face model's loss and gradients."""

import pytest
from plans import check_cases, draw_cases


@pytest.mark.parametrize(("n_ranks", "n_cases"), [(1, 4), (2, 18), (3, 4), (4, 18), (6, 3), (8, 3)])
def test_plans_drawn_op_by_op_are_right_on_any_number_of_ranks(n_ranks, n_cases):
    for case, (loss_error, gradient_error, worst) in check_cases(
        draw_cases(n_cases, n_ranks, first_seed=10_000)
    ).items():
        assert loss_error < 1e-6, case
        assert gradient_error < 1e-4, (case, worst)


def test_the_plans_that_the_planner_chooses_are_right():
    for case, (loss_error, gradient_error, worst) in check_cases(draw_cases(10, 2), chosen=True).items():
        assert loss_error < 1e-6, case
        assert gradient_error < 1e-4, (case, worst)
