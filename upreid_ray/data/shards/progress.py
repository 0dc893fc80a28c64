"""The progress of images: a bar on a terminal, a line now and then in a log."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
)
from rich.text import Text

logger = logging.getLogger(__name__)

LOG_SECONDS = 60.0  # between two lines in a log


class _Speed(ProgressColumn):
    """Images/s since the bar began, and the time left at that speed.

    Shards are finished minutes apart, so that the speed of the last seconds is meaningless.
    """

    def render(self, task: Task) -> Text:
        """Return the text of the column."""
        if not task.completed or not task.elapsed:
            return Text("")
        return Text(_speed(task.completed, task.total or 0, task.elapsed))


def _speed(done: float, total: float, seconds: float) -> str:
    """Return the speed so far, and the time that is left at that speed."""
    speed = done / seconds
    minutes, rest = divmod(round((total - done) / speed), 60)
    return f"{speed:,.0f} images/s, {minutes}:{rest:02d} left"


@contextmanager
def image_progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress on standard error; yield the function that advances it by some images."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _log_progress(description, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.advance(task, done)


def _log_progress(description: str, total: int) -> Callable[[int], None]:
    """Log a line; return the function that logs another one now and then, and at the end."""
    logger.info("%s: %d images", description, total)
    started = said = time.monotonic()
    num_done = 0

    def advance(done: int) -> None:
        nonlocal num_done, said
        num_done += done
        now = time.monotonic()
        if num_done == total or now - said >= LOG_SECONDS:
            said = now
            speed = _speed(num_done, total, max(now - started, 1e-3))
            logger.info("%s: %d of %d images  %s", description, num_done, total, speed)

    return advance
