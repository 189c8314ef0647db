"""Progress bars on stderr, for functions with `progress=True`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def tracking(total: int, what: str, progress: bool) -> Iterator[Callable[[str], None]]:
    """A function that advances a bar and says what comes next; it does nothing where progress is False."""
    if not progress:
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    # No refresh from a second thread: it would run inside the timed calls. A terminal is left as it was, a log gets the last line.
    with Progress(*columns, console=console, transient=console.is_terminal, auto_refresh=False) as bar:
        task = bar.add_task(what, total=total)
        yield lambda text: bar.update(task, description=text, advance=1, refresh=True)


def tracked(work: Sequence[T], what: str, progress: bool) -> Iterator[T]:
    """The items of `work`, the bar advancing after each."""
    with tracking(len(work), what, progress) as step:
        for item in work:
            yield item
            step(what)
