"""The result of a comparison: means and deviations, as a table, a picture and a file."""

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Self

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter
from rich.table import Table

from upreid_ray.downstream.comparison_runs import FROZEN, ComparisonRun, heading
from upreid_ray.page import png
from upreid_ray.tracking import runs
from upreid_ray.train.folder import RunFolder

COMPARISON_FILE = "comparison.json"
PLOT_FILE = "comparison.png"

Scores = dict[str, float]


@dataclass(frozen=True)
class Spread:
    """A score over several runs: their mean and sample standard deviation.

    There is no deviation of a single run.
    """

    mean: float
    std: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Summarize one value or more."""
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, tuple(values))

    def __str__(self) -> str:
        deviation = "" if self.std is None else f" +- {100 * self.std:.1f}"
        return f"{100 * self.mean:.1f}{deviation}"


@dataclass(frozen=True)
class CompareResult:
    """Result of a comparison.

    Attributes:
        run_id: Id of the MLflow run.
        scores: Scores by label, column (``frozen``, and each split) and name.
        failed: Reasons of the runs that have no score, by label and column.
        result_dir: Folder of the comparison, with ``comparison.json`` and ``comparison.png``.
    """

    run_id: str
    scores: dict[str, dict[str, dict[str, Spread]]]
    failed: dict[str, dict[str, list[str]]]
    result_dir: str

    def cell(self, label: str, column: str, score: str) -> str:
        """Return a score in percent, with the number of runs that failed."""
        spreads = self.scores.get(label, {}).get(column)
        failed = len(self.failed.get(label, {}).get(column, []))
        texts = [str(spreads[score])] if spreads else []
        return " ".join([*texts, f"({failed} failed)"] if failed else texts)

    def table(self) -> Table:
        """Return mAP and rank-1 in percent, a row for each label."""
        columns = list(dict.fromkeys(name for row in self.scores.values() for name in row))
        table = Table("mAP / rank-1, %", *map(heading, columns))
        for label in self.scores | self.failed:
            cells = (
                " / ".join(self.cell(label, column, score) for score in ("mAP", "rank1"))
                for column in columns
            )
            table.add_row(label, *cells)
        return table


def summarize(
    planned: Sequence[ComparisonRun],
    scores: Mapping[str, Scores],
    failures: Mapping[str, str],
    *,
    run_id: str,
    result_dir: str,
) -> CompareResult:
    """Gather the runs of each cell; scores and failures come by the name of the run."""
    spreads: dict[str, dict[str, dict[str, Spread]]] = {}
    failed: dict[str, dict[str, list[str]]] = {}
    for label, column in dict.fromkeys((each.label, each.column) for each in planned):
        names = [each.name for each in planned if (each.label, each.column) == (label, column)]
        found = [scores[name] for name in names if name in scores]
        reasons = [failures[name] for name in names if name in failures]
        if found:
            spreads.setdefault(label, {})[column] = {
                score: Spread.of([each[score] for each in found]) for score in found[0]
            }
        if reasons:
            failed.setdefault(label, {})[column] = reasons
    return CompareResult(run_id, spreads, failed, result_dir)


def publish(result: CompareResult, folder: RunFolder, client: runs.Client) -> None:
    """Write the scores and the picture to the folder of the comparison and to MLflow."""
    content = json.dumps(
        {"scores": asdict(result)["scores"], "failed": result.failed}, indent=1
    )
    picture = png(plot(result, "mAP"), dpi=120)
    for file, written in ((COMPARISON_FILE, content.encode()), (PLOT_FILE, picture)):
        folder.write(file, written)
        runs.log_file(client, result.run_id, file, written)
    means = {
        f"{column}/{re.sub(r'[^A-Za-z0-9_. -]', '-', label)}/mAP": spreads["mAP"].mean
        for label, columns in result.scores.items()
        for column, spreads in columns.items()
    }
    runs.log_metrics(client, result.run_id, means)


def plot(result: CompareResult, score: str) -> Figure:
    """Draw a score over the share of the persons, with a line for each label."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    shares: set[float] = set()
    has_bars = False
    for number, (label, columns) in enumerate(result.scores.items()):
        color = f"C{number}"
        by_share = {float(name): c[score] for name, c in columns.items() if name != FROZEN}
        spreads = [by_share[share] for share in sorted(by_share)]
        axes.errorbar(
            sorted(by_share),
            [spread.mean for spread in spreads],
            # NaN draws no bar: a single run has no deviation.
            [math.nan if spread.std is None else spread.std for spread in spreads],
            color=color,
            marker="o",
            capsize=3,
            label=label,
        )
        if FROZEN in columns:
            axes.axhline(columns[FROZEN][score].mean, color=color, linestyle=":")
        shares.update(by_share)
        has_bars |= any(spread.std is not None for spread in spreads)
    finetuned = "fine-tuned (mean and standard deviation)" if has_bars else "fine-tuned"
    axes.set(
        xscale="log",
        xlabel="persons with labels",
        ylabel=score,
        title=f"{finetuned}; dotted: frozen",
    )
    axes.set_xticks(sorted(shares), [f"{100 * share:g} %" for share in sorted(shares)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    axes.legend()
    return figure
