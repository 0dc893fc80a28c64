"""Points of a search space, drawn by Optuna: all at once, or one by one near good ones."""

import logging
from collections.abc import Mapping
from itertools import product
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import RandomSampler, TPESampler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from upreid_ray.config.errors import InputError
from upreid_ray.tune.space import Axis, Choice, Grid, LogUniform, Point, SweepPlan
from upreid_ray.tune.trial_record import CANDIDATE, METRIC, Candidate

logger = logging.getLogger(__name__)
optuna.logging.set_verbosity(optuna.logging.WARNING)

# Draws without a new point after which a space counts as used up.
MAX_DRAWS = 200


def distribution(axis: Axis) -> BaseDistribution:
    """Return an axis as Optuna knows it."""
    if isinstance(axis, Choice | Grid):
        return CategoricalDistribution(axis.values)
    is_log = isinstance(axis, LogUniform)
    if isinstance(axis.low, int) and isinstance(axis.high, int):
        return IntDistribution(axis.low, axis.high, log=is_log)
    return FloatDistribution(axis.floor, axis.high, log=is_log)


def decode(axes: Mapping[str, Axis], params: Mapping[str, Any]) -> Point:
    """Return the point that Optuna's numbers stand for."""
    point = dict(params)
    for path, value in params.items():
        axis = axes[path]
        if isinstance(axis, LogUniform) and value < axis.low:
            point[path] = 0.0
    return point


def encode(axes: Mapping[str, Axis], point: Point) -> dict[str, Any]:
    """Return the numbers that stand for a point."""
    return {
        path: axis.floor if isinstance(axis, LogUniform) and point[path] == 0 else point[path]
        for path, axis in axes.items()
    }


def draw_points(plan: SweepPlan) -> list[Point]:
    """Draw the points of a random search, each once and consistent as a whole.

    A space with grids alone gives all of its points. The points are a function of the plan.

    Raises:
        InputError: No point is consistent.
    """
    axes = plan.axes()
    grids = {path: axis for path, axis in axes.items() if isinstance(axis, Grid)}
    drawn = {path: distribution(axis) for path, axis in axes.items() if path not in grids}
    study = optuna.create_study(sampler=RandomSampler(plan.base.seed))
    points: list[Point] = []
    refusals: list[InputError] = []
    num_drawn = num_in_vain = 0
    while num_drawn < plan.search.num_trials and num_in_vain < MAX_DRAWS:
        draw = decode(axes, study.ask(drawn).params)
        new = []
        for values in product(*(axis.values for axis in grids.values())):
            point = {**draw, **dict(zip(grids, values, strict=True))}
            try:
                plan.base.override(point)
            except InputError as error:
                refusals.append(error)
            else:
                new += [point] if point not in points else []
        points += new
        num_drawn, num_in_vain = (num_drawn + 1, 0) if new else (num_drawn, num_in_vain + 1)
        if not drawn:
            break
    if not points:
        raise InputError(f"--space: no point of it can be trained; {refusals[-1]}")
    if refusals:
        logger.info("%d points are left out, such as: %s", len(refusals), refusals[0])
    if drawn and num_drawn < plan.search.num_trials:
        logger.info("the space has no more than %d points", len(points))
    return points


def candidates(plan: SweepPlan, points: list[Point]) -> list[Candidate]:
    """Return each point with each of its seeds."""
    seeds = range(plan.base.seed, plan.base.seed + plan.search.num_seeds)
    return [
        Candidate(number=number, point=point, seed=seed)
        for number, (point, seed) in enumerate(product(points, seeds))
    ]


class PointSearch(OptunaSearch):
    """Optuna's TPE, which proposes consistent points only, and each with all of its seeds.

    Args:
        plan: Of the sweep.
        earlier: What a sweep that goes on has tried, by number; it is proposed again.
    """

    def __init__(self, plan: SweepPlan, earlier: Mapping[int, Candidate]) -> None:
        self._plan = plan
        self._earlier = earlier
        self._axes = plan.axes()
        self._num_suggested = 0
        self._params: dict[str, Any] = {}
        super().__init__(
            space={path: distribution(axis) for path, axis in self._axes.items()},
            metric=METRIC,
            mode="max",
            sampler=TPESampler(seed=plan.base.seed),
        )

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return what the next trial trains."""
        number = self._num_suggested
        seed = number % self._plan.search.num_seeds
        if number in self._earlier:
            self._params = encode(self._axes, self._earlier[number].point)
        if seed or number in self._earlier:
            self._ot_study.enqueue_trial(self._params)
        for _ in range(MAX_DRAWS):
            self._params = super().suggest(trial_id)
            point = decode(self._axes, self._params)
            try:
                self._plan.base.override(point)
            except InputError:
                self._forget(trial_id)
                continue
            self._num_suggested += 1
            chosen = Candidate(number=number, point=point, seed=self._plan.base.seed + seed)
            return {CANDIDATE: chosen.model_dump()}
        return Searcher.FINISHED

    def _forget(self, trial_id: str) -> None:
        """Tell Optuna that a point cannot be tried."""
        self._ot_study.tell(self._ot_trials.pop(trial_id), state=optuna.trial.TrialState.FAIL)
