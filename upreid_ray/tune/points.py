"""Points of a search space: Optuna draws them, all at once or one by one near good ones."""

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

from upreid_ray.config.errors import InputError
from upreid_ray.train.pretrain import check_shapes
from upreid_ray.tune.space import Axis, Choice, Grid, LogUniform, Point, SweepPlan
from upreid_ray.tune.trial_record import CANDIDATE, METRIC, Candidate

logger = logging.getLogger(__name__)
optuna.logging.set_verbosity(optuna.logging.WARNING)

# After this many draws in a row without a new point, a space counts as exhausted.
MAX_DRAWS = 200


def distribution(axis: Axis) -> BaseDistribution:
    """Return the distribution of Optuna that draws the values of an axis."""
    if isinstance(axis, Choice | Grid):
        return CategoricalDistribution(axis.values)
    is_log = isinstance(axis, LogUniform)
    if isinstance(axis.low, int) and isinstance(axis.high, int):
        return IntDistribution(axis.low, axis.high, log=is_log)
    return FloatDistribution(axis.floor, axis.high, log=is_log)


def from_optuna(axes: Mapping[str, Axis], params: Mapping[str, Any]) -> Point:
    """Return the point that Optuna's parameters stand for."""
    point = dict(params)
    for path, value in params.items():
        axis = axes[path]
        if isinstance(axis, LogUniform) and value < axis.low:
            point[path] = 0.0
    return point


def to_optuna(axes: Mapping[str, Axis], point: Point) -> dict[str, Any]:
    """Return the parameters of Optuna that stand for a point."""
    return {
        path: axis.floor if isinstance(axis, LogUniform) and point[path] == 0 else point[path]
        for path, axis in axes.items()
    }


def draw_points(plan: SweepPlan) -> list[Point]:
    """Draw the points of a random search, each of them once.

    Points whose settings contradict each other are left out. The points are a function of the
    plan. Each draw is crossed with the values of all grids; a space of grids alone yields every
    combination once.

    Raises:
        InputError: No point of the space can be trained.
    """
    axes = plan.axes()
    grids = {path: axis for path, axis in axes.items() if isinstance(axis, Grid)}
    drawn = {path: distribution(axis) for path, axis in axes.items() if path not in grids}
    study = optuna.create_study(sampler=RandomSampler(plan.base.seed))
    points: list[Point] = []
    refusals: list[InputError] = []
    num_drawn = num_in_vain = 0
    while num_drawn < plan.search.num_trials and num_in_vain < MAX_DRAWS:
        draw = from_optuna(axes, study.ask(drawn).params)
        new = []
        for values in product(*(axis.values for axis in grids.values())):
            point = {**draw, **dict(zip(grids, values, strict=True))}
            try:
                check_shapes(plan.base.override(point))
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
        logger.info("%d points are left out; the first: %s", len(refusals), refusals[0])
    if drawn and num_drawn < plan.search.num_trials:
        logger.info("the space has only %d points", len(points))
    return points


def candidates(plan: SweepPlan, points: list[Point]) -> list[Candidate]:
    """Return a candidate for each point and seed."""
    seeds = range(plan.base.seed, plan.base.seed + plan.search.num_seeds)
    return [
        Candidate(number=number, point=point, seed=seed)
        for number, (point, seed) in enumerate(product(points, seeds))
    ]


class PointSearch(Searcher):
    """A searcher of Ray Tune that proposes points near good ones, by Optuna's TPE.

    It proposes only points that can be trained, each of them once with every seed. Ray's own
    `OptunaSearch` has no public way to reject a point or to propose one again.

    Attributes:
        study: Optuna's study, which learns the score of each trial.

    Args:
        plan: Plan of the sweep.
        earlier: Candidates that an interrupted sweep has tried, by the number of the trial;
            they are proposed again.
    """

    def __init__(self, plan: SweepPlan, earlier: Mapping[int, Candidate]) -> None:
        super().__init__(metric=METRIC, mode="max")
        self.study = optuna.create_study(
            direction="maximize", sampler=TPESampler(seed=plan.base.seed)
        )
        self._plan = plan
        self._earlier = earlier
        self._axes = plan.axes()
        self._distributions = {path: distribution(axis) for path, axis in self._axes.items()}
        self._num_suggested = 0
        self._asked: dict[str, optuna.Trial] = {}
        self._params: dict[str, Any] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return the candidate that the next trial trains."""
        number = self._num_suggested
        seed = number % self._plan.search.num_seeds
        if number in self._earlier:
            self._params = to_optuna(self._axes, self._earlier[number].point)
        if seed or number in self._earlier:
            self.study.enqueue_trial(self._params)
        for _ in range(MAX_DRAWS):
            asked = self.study.ask(self._distributions)
            self._params = asked.params
            point = from_optuna(self._axes, self._params)
            try:
                check_shapes(self._plan.base.override(point))
            except InputError:
                self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
                continue
            self._asked[trial_id] = asked
            self._num_suggested += 1
            chosen = Candidate(number=number, point=point, seed=self._plan.base.seed + seed)
            return {CANDIDATE: chosen.model_dump()}
        return Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, **_: object
    ) -> None:
        """Tell Optuna the last score of a trial, or that the trial failed without one."""
        asked = self._asked[trial_id]
        if result and METRIC in result:
            self.study.tell(asked, result[METRIC], skip_if_finished=True)
        else:
            failed = optuna.trial.TrialState.FAIL
            self.study.tell(asked, state=failed, skip_if_finished=True)
