"""A progress bar that counts images."""

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


class _Speed(ProgressColumn):
    """Images/s since the bar began, and the time left at that speed.

    Shards are finished minutes apart, so that the speed of the last seconds is meaningless.
    """

    def render(self, task: Task) -> Text:
        """Return the text of the column."""
        if not task.completed or not task.elapsed:
            return Text("")
        speed = task.completed / task.elapsed
        minutes, seconds = divmod(round((task.remaining or 0) / speed), 60)
        return Text(f"{speed:,.0f} images/s, {minutes}:{seconds:02d} left")


@contextmanager
def image_progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error; yield the function that advances it by some images."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total)
        yield lambda done: progress.advance(task, done)
