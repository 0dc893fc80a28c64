"""How fast and how well training goes: what a worker measures between two log entries."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from ray.util.metrics import Gauge

from upreid_ray.core import distributed
from upreid_ray.core.training import StepReport

logger = logging.getLogger(__name__)


class Gauges:
    """The newest values of a run, which Prometheus scrapes from Ray's own metrics.

    Args:
        run: Its name, the tag of every value.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def set(self, values: Mapping[str, float]) -> None:
        """Set values: ``section/name`` is ``ray_upreid_section_name`` in Prometheus."""
        for name, value in values.items():
            if name not in self._gauges:
                metric = f"upreid_{name.replace('/', '_')}"
                self._gauges[name] = Gauge(metric, tag_keys=("run",))
            self._gauges[name].set(value, tags={"run": self._run})


class Meter:
    """Means of the loss terms, and the speed.

    Attributes:
        terms: Names of the loss and its terms, as of the last reading.
        skipped_steps: Of the last reading, those that changed nothing.
        most_skipped: The longest row of them up to a step of the last reading.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._reports: list[StepReport] = []
        self._window_started = 0.0
        self._windows: list[tuple[int, float]] = []
        self.terms: tuple[str, ...] = ()
        self.skipped_steps: list[int] = []
        self.most_skipped = 0

    def start(self) -> None:
        """Begin to measure time."""
        self._window_started = time.perf_counter()

    def add(self, report: StepReport) -> None:
        """Take in one step."""
        self._reports.append(report)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the speed."""
        before = time.perf_counter()
        yield
        self._window_started += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """Return the means since the last reading, over all workers, and begin a new one.

        Steps that were skipped take no part in the means, which are NaN if all were.
        """
        reports, self._reports = self._reports, []
        names = self.terms = tuple(name for name in reports[0].terms if name != "skipped")
        skipped = torch.stack([report.terms["skipped"] for report in reports])
        terms = torch.stack([torch.stack([r.terms[name] for name in names]) for r in reports])
        taken = (skipped == 0)[:, None]
        means = terms.where(taken, 0).sum(0) / taken.sum(0)
        distributed.average_([means])
        values = means.tolist()  # waits for the device, so that the time below is that of work
        in_a_row = skipped.int().tolist()
        self.skipped_steps = [r.step for r, n in zip(reports, in_a_row, strict=True) if n > 0]
        self.most_skipped = max(in_a_row)
        seconds = time.perf_counter() - self._window_started
        self._windows.append((len(reports) * self._batch_size, seconds))
        self.start()
        return {
            **{f"train/{name}": value for name, value in zip(names, values, strict=True)},
            "train/images_per_second": len(reports) * self._batch_size / seconds,
            "train/skipped_steps": float(len(self.skipped_steps)),
            "train/data_wait": sum(report.data_seconds for report in reports) / seconds,
        }

    @property
    def mean_images_per_second(self) -> float:
        """Speed over all readings but the first, which contains the start of the stream."""
        windows = self._windows[1:] or self._windows
        seconds = sum(seconds for _, seconds in windows)
        return sum(images for images, _ in windows) / seconds if seconds else 0.0
