"""The knapsack: never over the budget, never worse than trying everything."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.errors import BadInput, Unsupported
from hasten.search.knapsack import Problem, Term, brute_force, fastest, front, linearised, solve, solve_dp

MODEST = settings(max_examples=25, deadline=None)


@st.composite
def problems(draw, *, joined=2):
    """Make a problem of at most four sites with whole numbers, so that sums are exact and ties happen."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    losses = tuple(tuple(float(draw(st.integers(0, 20))) for _ in range(n)) for n in counts)
    terms = []
    for _ in range(draw(st.integers(1, 5))):
        sites = draw(st.lists(st.integers(0, len(counts) - 1), min_size=1, max_size=joined, unique=True))
        shape = tuple(counts[site] for site in sites)
        size = int(np.prod(shape))
        values = draw(st.lists(st.integers(0, 30), min_size=size, max_size=size))
        terms.append(Term(tuple(sites), np.array(values, float).reshape(shape)))
    return Problem(losses, tuple(terms), float(draw(st.integers(0, 10))))


def linear(losses, times):
    """Make a problem without joins."""
    terms = tuple(Term((site,), np.array(line, float)) for site, line in enumerate(times))
    return Problem(tuple(tuple(map(float, line)) for line in losses), terms)


@MODEST
@given(problems(joined=3), st.integers(0, 150))
def test_the_exact_solver_loses_what_trying_everything_loses(problem, budget) -> None:
    best = brute_force(problem, budget)
    if best is None:
        with pytest.raises(Unsupported, match="no choice takes at most"):
            solve(problem, budget)
        return
    found = solve(problem, budget)
    assert found.time_ns <= budget
    assert found.loss == pytest.approx(best.loss)


@MODEST
@given(problems(joined=1), st.integers(0, 150))
def test_the_dynamic_program_finds_the_best_where_times_are_whole_buckets(problem, budget) -> None:
    best = brute_force(problem, budget)
    room = budget - fastest(problem).time_ns  # the table spans what is left over the fastest choice
    if best is None or room <= 0:
        return
    found = solve_dp(problem, budget, buckets=int(room))
    assert found.time_ns <= budget
    assert found.loss == pytest.approx(best.loss)


@MODEST
@given(problems(joined=3), st.integers(1, 150))
def test_the_dynamic_program_keeps_the_budget_also_where_terms_join_sites(problem, budget) -> None:
    best = brute_force(problem, budget)
    if best is None:
        with pytest.raises(Unsupported, match="no choice takes at most"):
            solve_dp(problem, budget)
        return
    found = solve_dp(problem, budget, buckets=500)
    assert found.time_ns <= budget * (1 + 1e-9)
    assert found.loss >= best.loss - 1e-9
    assert found.loss == pytest.approx(problem.loss(found.choice))


@MODEST
@given(problems(joined=3))
def test_the_fastest_choice_is_the_fastest_of_all(problem) -> None:
    assert brute_force(problem, fastest(problem).time_ns - 0.5) is None


@MODEST
@given(problems())
def test_along_the_front_more_time_loses_less(problem) -> None:
    found = front(problem)
    assert found[0].time_ns == pytest.approx(fastest(problem).time_ns)
    assert all(a.time_ns < b.time_ns and a.loss > b.loss for a, b in pairwise(found))
    assert found[-1].loss == pytest.approx(sum(min(options) for options in problem.losses))


@MODEST
@given(problems(joined=3), st.data())
def test_linearised_times_are_exact_for_one_change(problem, data) -> None:
    around = tuple(data.draw(st.integers(0, len(options) - 1)) for options in problem.losses)
    site = data.draw(st.integers(0, len(around) - 1))
    option = data.draw(st.integers(0, len(problem.losses[site]) - 1))
    changed = (*around[:site], option, *around[site + 1 :])
    near = linearised(problem, around)
    assert near.time_ns(around) == pytest.approx(problem.time_ns(around))
    assert near.time_ns(changed) == pytest.approx(problem.time_ns(changed))


def test_widths_on_both_sides_of_a_product_are_chosen_together() -> None:
    widths = np.array([1.0, 0.5])
    product = Term((0, 1), 100 * np.outer(widths, widths))
    problem = Problem(((0.0, 1.0), (0.0, 1.5)), (product,))
    assert solve(problem, 50.0).choice == (1, 0)
    assert solve(problem, 25.0).choice == (1, 1)


def test_an_impossible_budget_is_said_with_the_fastest_there_is() -> None:
    problem = linear([[0, 1], [0, 1]], [[5e6, 3e6], [4e6, 2e6]])
    with pytest.raises(Unsupported, match=r"at most 4\.000 ms.*predicted to take 5\.000 ms"):
        solve(problem, 4e6)


@pytest.mark.parametrize(
    ("losses", "terms"),
    [
        (((),), ()),
        (((0.0, float("nan")),), ()),
        (((0.0, 1.0),), (Term((0,), np.zeros(3)),)),
        (((0.0,),), (Term((0,), np.array([np.inf])),)),
    ],
)
def test_a_problem_that_cannot_be_is_refused(losses, terms) -> None:
    with pytest.raises(BadInput):
        Problem(losses, terms)


def test_a_chain_of_fifty_groups_of_seven_widths_is_solved() -> None:
    random = np.random.default_rng(0)
    widths = np.linspace(1, 0.25, 7)
    losses = tuple(tuple(np.cumsum([0.0, *random.uniform(0, 1, 6)])) for _ in range(50))
    terms = tuple(Term((i, i + 1), 1e5 * random.uniform(0.5, 2) * np.outer(widths, widths)) for i in range(49))
    problem = Problem(losses, terms)
    budget = problem.time_ns((0,) * 50) / 2
    exact, near = solve(problem, budget), solve_dp(problem, budget)
    assert max(exact.time_ns, near.time_ns) <= budget * (1 + 1e-6)
    assert exact.loss <= near.loss + 1e-6
