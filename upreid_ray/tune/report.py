"""The result of a sweep: its ranked points, as tables, figures and one page of HTML."""

import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import optuna
import optuna.visualization.matplotlib as plots
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from optuna.trial import FrozenTrial, create_trial
from rich.table import Table

from upreid_ray.page import PageFigure, PageSection, png, render_page
from upreid_ray.tune.points import distribution, to_optuna
from upreid_ray.tune.space import Point, SweepPlan, format_value
from upreid_ray.tune.trial_record import METRIC, TrialRecord

SCORED = ("finished", "stopped")
# With fewer trials, nothing can be said about which setting matters.
MIN_IMPORTANCE_TRIALS = 4

POINTS_TEXT = (
    "mAP of the frozen backbone: mean and standard deviation over the seeds of a point. Points "
    "that were trained longer come first."
)
CAPTIONS = {
    "rungs.png": "mAP at each evaluation; a line that ends early was stopped.",
    "parallel.png": "Each line is a trial. Weights below the lowest of the space stand for 0.",
    "importance.png": "Share of the variance of the first mAP that each setting explains.",
}


@dataclass(frozen=True)
class PointOutcome:
    """The trials of a point that have a score, at least one.

    It has diverged if the loss of any of its trials became NaN or infinite.
    """

    point: Point
    records: list[TrialRecord]
    has_diverged: bool

    @property
    def scores(self) -> list[float]:
        """The best mAP of each trial."""
        return [record.best for record in self.records if record.best is not None]

    @property
    def mean(self) -> float:
        """Mean of the scores."""
        return statistics.mean(self.scores)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the scores; None for a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def epochs(self) -> float:
        """Number of epochs that all of its trials reached."""
        return min(record.epochs for record in self.records)

    @property
    def best(self) -> TrialRecord:
        """The trial with the best score."""
        return max(self.records, key=lambda record: record.best or 0.0)


def best_first(records: Sequence[TrialRecord]) -> list[PointOutcome]:
    """Return the points that have a score, the best first.

    A point of which a trial diverged comes after all others. Points that were trained longer
    come first, since a score at a rung does not compare with one at the end; among those that
    were trained equally long, the one with the better mean comes first.
    """
    outcomes = []
    for point in _unique([record.candidate.point for record in records]):
        trials = [record for record in records if record.candidate.point == point]
        scored = [each for each in trials if each.rungs and each.state in SCORED]
        if scored:
            has_diverged = any(each.state == "diverged" for each in trials)
            outcomes.append(PointOutcome(point, scored, has_diverged))
    return sorted(
        outcomes, key=lambda each: (not each.has_diverged, each.epochs, each.mean), reverse=True
    )


def trial_table(records: Sequence[TrialRecord], num_epochs: int) -> Table:
    """Return a table with a row for each trial."""
    paths = list(records[0].candidate.point)
    table = Table("trial", "seed", *_labels(paths).values(), "epochs", METRIC, "state")
    for record in records:
        table.add_row(
            str(record.candidate.number),
            str(record.candidate.seed),
            *(format_value(record.candidate.point[path]) for path in paths),
            f"{record.epochs:g}/{num_epochs}",
            "" if record.best is None else f"{record.best:.4f}",
            record.state,
        )
    return table


def point_table(ranked: Sequence[PointOutcome], num_epochs: int) -> Table:
    """Return a table with a row for each point, the best first."""
    paths = list(ranked[0].point)
    table = Table("place", *_labels(paths).values(), "epochs", METRIC, "+-", "seeds")
    for place, outcome in enumerate(ranked, start=1):
        table.add_row(
            str(place),
            *(format_value(outcome.point[path]) for path in paths),
            f"{outcome.epochs:g}/{num_epochs}",
            f"{outcome.mean:.4f}",
            "" if outcome.spread is None else f"{outcome.spread:.4f}",
            str(len(outcome.scores)) + (", one diverged" if outcome.has_diverged else ""),
        )
    return table


def draw_figures(plan: SweepPlan, records: Sequence[TrialRecord]) -> dict[str, bytes]:
    """Return figures as PNG files by name: rungs, parallel coordinates and importance.

    Trials without a score are left out.
    """
    mpl.use("agg")
    study = _study(plan, records)
    first = min((min(trial.intermediate_values) for trial in study.trials), default=0)

    def first_rung(trial: FrozenTrial) -> float:
        return trial.intermediate_values[first]

    with warnings.catch_warnings():
        # Optuna warns that its figures with matplotlib are experimental.
        warnings.simplefilter("ignore")
        drawn = {"rungs.png": plots.plot_intermediate_values(study)}
        drawn["rungs.png"].set(xlabel="epoch", ylabel=METRIC)
        drawn["rungs.png"].xaxis.set_major_locator(MaxNLocator(integer=True))
        drawn["parallel.png"] = plots.plot_parallel_coordinate(study, target_name=METRIC)
        if len(study.trials) >= MIN_IMPORTANCE_TRIALS:
            drawn["importance.png"] = plots.plot_param_importances(
                study, target=first_rung, target_name=f"{METRIC} at epoch {first}"
            )
    for axes in drawn.values():
        axes.set_title("")
    return {name: _png(axes) for name, axes in drawn.items()}


def _study(plan: SweepPlan, records: Sequence[TrialRecord]) -> optuna.Study:
    """Return the trials that have a score as a study of Optuna, which can draw them."""
    axes = plan.axes()
    labels = _labels(axes)
    study = optuna.create_study(direction="maximize")
    for record in records:
        if record.rungs and record.state in SCORED:
            params = to_optuna(axes, record.candidate.point)
            study.add_trial(
                create_trial(
                    value=record.best,
                    params={labels[path]: value for path, value in params.items()},
                    distributions={
                        labels[path]: distribution(axis) for path, axis in axes.items()
                    },
                    intermediate_values={
                        round(epoch): score for epoch, score in record.rungs.items()
                    },
                )
            )
    return study


def report_page(
    name: str,
    plan: SweepPlan,
    records: Sequence[TrialRecord],
    ranked: Sequence[PointOutcome],
    *,
    figures: Mapping[str, bytes],
    best: str,
) -> str:
    """Return the report as one page of HTML that needs no other file.

    ``ranked`` is from `best_first`, ``figures`` from `draw_figures`; ``best`` are the best
    settings as JSON.
    """
    states = Counter(record.state for record in records)
    summary = f"{len(records)} trials of {plan.num_epochs} epochs: " + ", ".join(
        f"{number} {state}" for state, number in states.items()
    )
    return render_page(
        f"Sweep {name}",
        [
            PageSection(text=summary),
            PageSection(
                "Points",
                table=_cells(point_table(ranked, plan.num_epochs)),
                text=POINTS_TEXT,
                figures=[PageFigure(CAPTIONS[file], image) for file, image in figures.items()],
            ),
            PageSection("Trials", table=_cells(trial_table(records, plan.num_epochs))),
            PageSection("Best settings", preformatted=best),
        ],
    )


def _cells(table: Table) -> list[tuple[str, ...]]:
    """Return the texts of a table, row by row, the names of its columns first."""
    columns = [(str(column.header), *map(str, column.cells)) for column in table.columns]
    return list(zip(*columns, strict=True))


def _png(axes: Axes) -> bytes:
    """Return a figure as a PNG file, and free it."""
    figure = axes.get_figure(root=True)
    assert figure is not None  # noqa: S101, these axes come from a figure
    figure.set_size_inches(11, 5)
    content = png(figure, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return content


def _labels(paths: Iterable[str]) -> dict[str, str]:
    """Return the names of settings, without their sections where the names stay different."""
    names = {path: path.rpartition(".")[2] for path in paths}
    times = Counter(names.values())
    return {path: name if times[name] == 1 else path for path, name in names.items()}


def _unique(points: Sequence[Point]) -> list[Point]:
    return [point for place, point in enumerate(points) if point not in points[:place]]
