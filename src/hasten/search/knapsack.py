"""One option for each site, so that the least is lost within a time: the multiple-choice knapsack.

Losses add up over sites, as the sensitivities of single changes about do. Times are a sum of terms, each over one
site or a few: a convolution's time depends on the width that it reads *and* on the one that it makes.

``solve`` is exact (``scipy.optimize.milp``; terms over several sites become the local polytope of their options, which
is exact at whole numbers). ``solve_dp`` is the dynamic program of SPDY over discretised time (E. Frantar, D. Alistarh,
"SPDY: accurate pruning with speedup guarantees", ICML 2022, arXiv:2201.13096): one table answers every budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from hasten.errors import BadInput, BuildFailed, Unsupported

Floats = npt.NDArray[np.float64]
Choice = tuple[int, ...]
"""The index of the chosen option, for each site."""

ROUNDS = 12
"""Linearisations that ``solve_dp`` tries where terms join sites; it settles after two or three, or goes in circles."""

FRONT = 24
"""Budgets of a front."""

ROUNDING = 1e-9
"""Share by which a sum of times may be over a budget and still keep it: float sums depend on their order."""


@dataclass(frozen=True, eq=False)
class Term:
    """Nanoseconds that depend on the options of some sites: ``time_ns`` has one axis for each, in order."""

    sites: tuple[int, ...]
    time_ns: Floats


@dataclass(frozen=True)
class Problem:
    """What there is to choose. ``losses[site][option]`` is what is lost by it, 0 or more; option 0 need not be free.

    Raises:
        BadInput: a site has no option, a number is not finite, or a term does not fit the sites.
    """

    losses: tuple[tuple[float, ...], ...]
    terms: tuple[Term, ...]
    fixed_ns: float = 0.0

    def __post_init__(self) -> None:
        if not all(self.losses):
            raise BadInput("every site of a knapsack needs an option; leave out the sites that have none")
        if not all(math.isfinite(loss) for options in self.losses for loss in options):
            raise BadInput("a loss of the knapsack is not finite; leave out the options that ruin the outputs")
        for term in self.terms:
            wanted = tuple(len(self.losses[site]) for site in term.sites)
            if term.time_ns.shape != wanted or len(set(term.sites)) != len(term.sites):
                raise BadInput(f"a term over the sites {term.sites} has times {term.time_ns.shape}, wanted {wanted}")
            if not np.isfinite(term.time_ns).all():
                raise BadInput(f"a term over the sites {term.sites} has a time that is not finite")

    def loss(self, choice: Choice) -> float:
        """Add up the losses of a choice."""
        return math.fsum(options[at] for options, at in zip(self.losses, choice, strict=True))

    def time_ns(self, choice: Choice) -> float:
        """Add up the times of a choice."""
        return self.fixed_ns + math.fsum(
            float(term.time_ns[tuple(choice[site] for site in term.sites)]) for term in self.terms
        )

    @cached_property
    def joined(self) -> tuple[Term, ...]:
        """The terms, those over the same sites added up."""
        found: dict[tuple[int, ...], Floats] = {}
        for term in self.terms:
            order = tuple(int(i) for i in np.argsort(term.sites))
            sites = tuple(term.sites[i] for i in order)
            values = np.transpose(term.time_ns, order)
            found[sites] = found[sites] + values if sites in found else values
        return tuple(Term(sites, values) for sites, values in found.items())


@dataclass(frozen=True)
class Solution:
    """A choice with what it costs, by the problem's own numbers."""

    choice: Choice
    loss: float
    time_ns: float


Solver = Callable[[Problem, float], Solution]


def solve(problem: Problem, budget_ns: float) -> Solution:
    """Give the choice that loses least within a budget, exactly.

    Raises:
        Unsupported: no choice is within the budget; the message has the fastest. BuildFailed: the solver gave up.
    """
    program = _Program.of(problem)
    found = program.minimize(program.losses, budget_ns)
    if found is None:
        raise _infeasible(problem, budget_ns, fastest(problem))
    return found


def fastest(problem: Problem) -> Solution:
    """Give the choice that takes the least time; of those that take the same, any.

    Raises:
        BuildFailed: the solver gave up.
    """
    program = _Program.of(problem)
    found = program.minimize(program.times_ns, None)
    if found is None:
        raise BuildFailed("knapsack", "a choice without a budget was found impossible")
    return found


def solve_dp(problem: Problem, budget_ns: float, *, buckets: int = 10_000) -> Solution:
    """Give a choice within a budget by the dynamic program of SPDY.

    Times are rounded up to whole buckets, so the budget is always kept; what is lost is at most what the best choice
    loses within a budget smaller by one bucket a site. Where terms join sites, the problem is linearised around a
    choice, and solved again around what came of it; the best choice within the budget by its true time is given.

    Args:
        problem: What to choose from.
        budget_ns: The time that may be taken.
        buckets: Into how many parts the budget is divided.

    Raises:
        Unsupported: no choice was found within the budget.
    """
    around: Choice = tuple(0 for _ in problem.losses)
    best: Solution | None = None
    seen: set[Choice] = set()
    for _ in range(ROUNDS):
        linear = linearised(problem, around)
        choice = _Table.of(linear, budget_ns, buckets).choice(budget_ns) or fastest(linear).choice
        found = solution(problem, choice)
        if found.time_ns <= budget_ns * (1 + ROUNDING) and (best is None or found.loss < best.loss):
            best = found
        if choice in seen:
            break
        seen.add(choice)
        around = choice
    if best is None:
        least = fastest(problem)
        if least.time_ns > budget_ns:
            raise _infeasible(problem, budget_ns, least)
        best = least  # the linearised budgets were all too tight for what is possible
    return best


def linearised(problem: Problem, around: Choice) -> Problem:
    """Give the problem with every term over several sites replaced by the change of each site alone from ``around``.

    Times are then exact for choices that differ from ``around`` in one site of a term.
    """
    fixed = problem.fixed_ns
    alone = [np.zeros(len(options)) for options in problem.losses]
    for term in problem.joined:
        at = tuple(around[site] for site in term.sites)
        here = float(term.time_ns[at])
        fixed += here
        for axis, site in enumerate(term.sites):
            line = tuple(slice(None) if i == axis else where for i, where in enumerate(at))
            alone[site] += term.time_ns[line] - here
    return Problem(problem.losses, tuple(Term((site,), times) for site, times in enumerate(alone)), fixed)


def front(problem: Problem, *, budgets_ns: Iterable[float] | None = None, solver: Solver = solve) -> list[Solution]:
    """Give what is lost least for every time: solutions from the fastest on, each losing less than the one before.

    Args:
        problem: What to choose from.
        budgets_ns: The times to solve for; by default ``FRONT`` of them, in equal ratios from the fastest possible to
            that of the choice that loses least.
        solver: ``solve`` or ``solve_dp``.
    """
    least = fastest(problem)
    if budgets_ns is None:
        slowest = problem.time_ns(tuple(int(np.argmin(options)) for options in problem.losses))
        low = max(least.time_ns, 1e-3)
        budgets_ns = np.geomspace(low, max(slowest, low), FRONT)
    roomy = (float(budget) * (1 + ROUNDING) for budget in budgets_ns)
    return undominated(solver(problem, budget) for budget in sorted(roomy) if budget >= least.time_ns)


def undominated(solutions: Iterable[Solution]) -> list[Solution]:
    """Give the solutions that no other beats in time and loss, fastest first; of equals, one."""
    kept: list[Solution] = []
    for item in sorted(solutions, key=lambda item: (item.time_ns, item.loss, item.choice)):
        if not kept or item.loss < kept[-1].loss:
            kept.append(item)
    return kept


def solution(problem: Problem, choice: Choice) -> Solution:
    """Price a choice."""
    return Solution(choice, problem.loss(choice), problem.time_ns(choice))


@dataclass(frozen=True, eq=False)
class _Program:
    """The knapsack as a mixed integer program: a binary for each option, a share for each entry of a joining term."""

    problem: Problem
    starts: tuple[int, ...]
    """The first variable of each site."""
    binaries: int
    losses: Floats
    times_ns: Floats
    equalities: sparse.csr_array
    sums: Floats

    @classmethod
    def of(cls, problem: Problem) -> _Program:
        counts = [len(options) for options in problem.losses]
        starts = [sum(counts[:site]) for site in range(len(counts))]
        binaries = sum(counts)
        joins = [term for term in problem.joined if len(term.sites) > 1]
        total = binaries + sum(term.time_ns.size for term in joins)
        losses, times = np.zeros(total), np.zeros(total)
        losses[:binaries] = [loss for options in problem.losses for loss in options]
        rows: list[tuple[list[int], list[float], float]] = [
            (list(range(start, start + count)), [1.0] * count, 1.0) for start, count in zip(starts, counts, strict=True)
        ]
        for term in problem.joined:
            if len(term.sites) == 1:
                start = starts[term.sites[0]]
                times[start : start + term.time_ns.size] += term.time_ns
        base = binaries
        for term in joins:
            times[base : base + term.time_ns.size] = term.time_ns.reshape(-1)
            rows += _marginals(term, base, starts)
            base += term.time_ns.size
        return cls(problem, tuple(starts), binaries, losses, times, *_matrix(rows, total))

    def minimize(self, cost: Floats, budget_ns: float | None) -> Solution | None:
        """Give the best choice, or None where the budget allows none."""
        constraints = [LinearConstraint(self.equalities, self.sums, self.sums)]
        if budget_ns is not None:
            room = budget_ns - self.problem.fixed_ns
            scale = max(float(np.abs(self.times_ns).max(initial=0.0)), abs(room), 1e-12)
            constraints.append(LinearConstraint(self.times_ns[None, :] / scale, -np.inf, room / scale))
        integral = np.zeros(len(cost), dtype=np.int64)
        integral[: self.binaries] = 1
        made = milp(
            cost / max(float(np.abs(cost).max(initial=0.0)), 1e-300),
            constraints=constraints,
            integrality=integral,
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if made.status == 2:
            return None
        if made.x is None:
            raise BuildFailed("knapsack", f"the solver gave up: {made.message}")
        return solution(self.problem, self._choice(np.asarray(made.x)))

    def _choice(self, values: Floats) -> Choice:
        counts = [len(options) for options in self.problem.losses]
        return tuple(
            int(np.argmax(values[start : start + count])) for start, count in zip(self.starts, counts, strict=True)
        )


def _marginals(term: Term, base: int, starts: Sequence[int]) -> list[tuple[list[int], list[float], float]]:
    """Tie a term's entries to its sites' options: those of one option add up to that option's binary."""
    rows = []
    index = np.arange(base, base + term.time_ns.size).reshape(term.time_ns.shape)
    for axis, site in enumerate(term.sites):
        for option in range(term.time_ns.shape[axis]):
            entries = np.take(index, option, axis=axis).reshape(-1)
            columns = [*(int(entry) for entry in entries), starts[site] + option]
            rows.append((columns, [1.0] * len(entries) + [-1.0], 0.0))
    return rows


def _matrix(rows: Sequence[tuple[list[int], list[float], float]], width: int) -> tuple[sparse.csr_array, Floats]:
    columns = [column for listed, _, _ in rows for column in listed]
    values = [value for _, listed, _ in rows for value in listed]
    numbers = [number for number, (listed, _, _) in enumerate(rows) for _ in listed]
    made = sparse.coo_array((values, (numbers, columns)), shape=(len(rows), width))
    return made.tocsr(), np.array([total for _, _, total in rows])


@dataclass(frozen=True, eq=False)
class _Table:
    """SPDY's table: the least loss of the first sites within each number of buckets, and the option that gave it."""

    problem: Problem
    bucket_ns: float
    base_ns: float
    """Fixed time, and each site's fastest option: what every choice takes."""
    least: Floats
    """Of all sites, [buckets + 1]."""
    options: tuple[npt.NDArray[np.int32], ...]
    """For each site, [buckets + 1]."""
    steps: tuple[npt.NDArray[np.int64], ...]
    """Buckets of each option over its site's fastest."""

    @classmethod
    def of(cls, problem: Problem, budget_ns: float, buckets: int) -> _Table:
        times = [np.zeros(len(options)) for options in problem.losses]
        for term in problem.joined:
            times[term.sites[0]] += term.time_ns
        base = problem.fixed_ns + math.fsum(float(line.min()) for line in times)
        bucket = max(budget_ns - base, 0.0) / buckets or 1.0
        # Where a time is a whole number of buckets but for rounding, it must not be pushed into the next one.
        steps = tuple(np.ceil((line - line.min()) / bucket - 1e-6).astype(np.int64) for line in times)
        least = np.zeros(buckets + 1)
        chosen = []
        for losses, step in zip(problem.losses, steps, strict=True):
            least, option = _extend(least, losses, step)
            chosen.append(option)
        return cls(problem, bucket, base, least, tuple(chosen), steps)

    def choice(self, budget_ns: float) -> Choice | None:
        """Read the best choice within a budget off the table; None where there is none."""
        if budget_ns * (1 + ROUNDING) < self.base_ns:
            return None
        at = min(int((budget_ns - self.base_ns) / self.bucket_ns + 1e-6), len(self.least) - 1)
        at = max(at, 0)
        if not math.isfinite(self.least[at]):
            return None
        picked: list[int] = []
        for option, step in zip(reversed(self.options), reversed(self.steps), strict=True):
            picked.append(int(option[at]))
            at -= int(step[picked[-1]])
        return tuple(reversed(picked))


def _extend(
    least: Floats, losses: Sequence[float], steps: npt.NDArray[np.int64]
) -> tuple[Floats, npt.NDArray[np.int32]]:
    """Add a site to the table: for each number of buckets, the best of its options with what is left for the others."""
    tried = np.full((len(losses), len(least)), np.inf)
    for option, (loss, step) in enumerate(zip(losses, steps, strict=True)):
        if step < len(least):
            tried[option, step:] = least[: len(least) - step] + loss
    best = tried.argmin(axis=0).astype(np.int32)
    return tried.min(axis=0), best


def brute_force(problem: Problem, budget_ns: float) -> Solution | None:
    """Try every choice: for small problems, and to check the solvers by. None where none is within the budget."""
    choices = product(*(range(len(options)) for options in problem.losses))
    priced = (solution(problem, choice) for choice in choices)
    fitting = [item for item in priced if item.time_ns <= budget_ns * (1 + ROUNDING)]
    return min(fitting, key=lambda item: (item.loss, item.time_ns), default=None)


def _infeasible(problem: Problem, budget_ns: float, least: Solution) -> Unsupported:
    return Unsupported(
        "knapsack",
        f"no choice takes at most {budget_ns / 1e6:.3f} ms: the fastest of {len(problem.losses)} sites' options is "
        f"predicted to take {least.time_ns / 1e6:.3f} ms",
    )
