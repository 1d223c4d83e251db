"""Progress of long work: a bar on stderr for people, lines for logs, nothing for libraries."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Called as progress(done, total, what) after each step; `no_progress` ignores it.
Progress = Callable[[int, int, str], None]

_SECONDS = 10  # between two lines


def no_progress(done: int, total: int, what: str) -> None:
    """What library calls use unless told otherwise."""


@contextmanager
def progress_bar(description: str) -> Iterator[Progress]:
    """A `rich` bar on stderr with the time left; where stderr is no terminal, a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(description)
        return
    columns = (
        TextColumn(description),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=None, what="")
        yield lambda done, total, what: bar.update(task, completed=done, total=total, what=what)


def _lines(description: str) -> Progress:
    """Write a line where the last was long ago; a command that is soon done writes none."""
    written = time.monotonic()

    def progress(done: int, total: int, what: str) -> None:
        nonlocal written
        if time.monotonic() - written >= _SECONDS:
            written = time.monotonic()
            sys.stderr.write(f"{description}: {done}/{total} {what}\n")
            sys.stderr.flush()

    return progress
