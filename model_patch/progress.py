"""Progress of long work: a bar on stderr for people, nothing for libraries."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Called as progress(done, total, what) after each step; `no_progress` ignores it.
Progress = Callable[[int, int, str], None]


def no_progress(done: int, total: int, what: str) -> None:
    """What library calls use unless told otherwise."""


@contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """A `rich` bar on stderr with the time left; plain lines stay off when stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn(description),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None, what="")
        yield lambda done, total, what: bar.update(task, completed=done, total=total, what=what)
