"""What a job shows while it works: a live line on a terminal, plain lines in a log."""

import io
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

logger = logging.getLogger(__name__)

# The line that a worker logs about its steps: the step, the number of steps, and the rest.
STEP_LINE = re.compile(r"step (\d+)/(\d+)  (.+ left)")


@contextmanager
def stage(text: str) -> Iterator[None]:
    """Show what a job does in this block: a log line, or a spinner with the time."""
    if not sys.stderr.isatty():
        logger.info("%s", text)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(text, total=None)
        yield


@contextmanager
def training_line(text: str) -> Iterator[None]:
    """Show the progress of training in this block; first ``text``, until a step was taken.

    In a log, the lines of the workers come as they are. On a terminal, the newest line about a
    step becomes one live line with a bar; all other lines are printed above it.
    """
    if not sys.stderr.isatty():
        logger.info("%s", text)
        yield
        return
    with training_progress(Console(stderr=True), text) as stream, redirect_stderr(stream):
        yield


@contextmanager
def training_progress(console: Console, text: str) -> Iterator[io.TextIOBase]:
    """Show a live line on a console; yield the stream that takes the lines of the workers."""
    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=16),
        TextColumn("{task.description}", table_column=Column(no_wrap=True, ratio=1)),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, redirect_stderr=False, expand=True) as progress:
        task = progress.add_task(text, total=None)

        def show(line: str) -> None:
            found = STEP_LINE.fullmatch(line)
            if found is None:
                progress.console.print(Text(line), soft_wrap=True)
                return
            step, num_steps, rest = found.groups()
            progress.update(
                task,
                completed=int(step),
                total=int(num_steps),
                description=f"{step}/{num_steps}  {rest}",
            )

        yield _Lines(show)


class _Lines(io.TextIOBase):
    """A text stream that calls a function with each whole line, without its end."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._begun = ""

    def write(self, text: str) -> int:
        """Take some text; the last line waits for its end."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._show(line)
        return len(text)
