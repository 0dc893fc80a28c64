"""Loss and speed of a worker between two log entries."""

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
    """The newest metrics of a run, which Prometheus scrapes along with Ray's own metrics."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def set(self, values: Mapping[str, float]) -> None:
        """Set metrics; Ray exports ``section/Name`` as ``ray_upreid_section_name``."""
        for name, value in values.items():
            if name not in self._gauges:
                metric = f"upreid_{name.replace('/', '_')}"
                self._gauges[name] = Gauge(metric, tag_keys=("run",))
            self._gauges[name].set(value, tags={"run": self._run})


class Meter:
    """Means of the loss terms, skipped steps, and the speed.

    Args:
        batch_size: Images of a step on all workers together.

    Attributes:
        terms: Names of the loss and its terms at the last reading.
        skipped_steps: Steps of the last reading that had no finite gradient.
        most_skipped: The most of such steps in a row, up to a step of the last reading.
        seconds_per_step: Seconds that a step took in the last reading. The first step of all,
            which waits for the stream, counts only if there is no other one, without that wait.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._reports: list[StepReport] = []
        self._window_started = 0.0
        self._first_step_seconds = 0.0
        self._windows: list[tuple[int, float]] = []
        self.terms: tuple[str, ...] = ()
        self.skipped_steps: list[int] = []
        self.most_skipped = 0
        self.seconds_per_step = 0.0

    def start(self) -> None:
        """Begin to measure time."""
        self._window_started = time.perf_counter()

    def add(self, report: StepReport) -> None:
        """Add the report of one step."""
        if not self._windows and not self._reports:
            self._first_step_seconds = time.perf_counter() - self._window_started
        self._reports.append(report)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside this block from the speed."""
        before = time.perf_counter()
        yield
        self._window_started += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """Return the means over all workers since the last reading, and begin a new one.

        Skipped steps are excluded; if every step was skipped, the means are NaN.
        """
        reports, self._reports = self._reports, []
        names = self.terms = tuple(name for name in reports[0].terms if name != "skipped")
        skipped = torch.stack([report.terms["skipped"] for report in reports])
        terms = torch.stack([torch.stack([r.terms[name] for name in names]) for r in reports])
        taken = (skipped == 0)[:, None]
        means = terms.where(taken, 0).sum(0) / taken.sum(0)
        distributed.average_([means])
        values = means.tolist()  # Wait for the device before the time is read.
        in_a_row = skipped.int().tolist()
        self.skipped_steps = [r.step for r, n in zip(reports, in_a_row, strict=True) if n > 0]
        self.most_skipped = max(in_a_row)
        seconds = time.perf_counter() - self._window_started
        self.seconds_per_step = self._steady_seconds(reports, seconds) / len(reports)
        self._windows.append((len(reports) * self._batch_size, seconds))
        self.start()
        return {
            **{f"train/{name}": value for name, value in zip(names, values, strict=True)},
            "train/images_per_second": len(reports) * self._batch_size / seconds,
            "train/skipped_steps": float(len(self.skipped_steps)),
            "train/data_wait": sum(report.data_seconds for report in reports) / seconds,
        }

    def _steady_seconds(self, reports: list[StepReport], seconds: float) -> float:
        """Return how long these steps would have taken if the stream had been running."""
        if self._windows:
            return seconds
        if len(reports) == 1:
            return seconds - reports[0].data_seconds
        others = len(reports) - 1
        return (seconds - self._first_step_seconds) * len(reports) / others

    @property
    def mean_images_per_second(self) -> float:
        """Speed over all readings except the first, in which the stream starts."""
        windows = self._windows[1:] or self._windows
        seconds = sum(seconds for _, seconds in windows)
        return sum(images for images, _ in windows) / seconds if seconds else 0.0
