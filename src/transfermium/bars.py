"""Progress bars that speak in lines where there is no terminal, as in the log of a batch job."""

from __future__ import annotations

from datetime import timedelta
from time import monotonic
from typing import Any

from rich.progress import Progress, TaskID

FIRST, MOST = 10.0, 600.0  # seconds until the first line, and between lines at most


class Bars(Progress):
    """Bars, or now and then a line of what goes on: less often the longer it takes, at least every ten minutes."""

    def __init__(self, *columns: Any, **options: Any):
        super().__init__(*columns, **options)
        self.started = self.spoken = monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """See `rich.progress.Progress`."""
        super().update(task_id, **changes)
        self._speak(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """See `rich.progress.Progress`."""
        super().advance(task_id, advance)
        self._speak(task_id)

    def _speak(self, task_id: TaskID) -> None:
        now = monotonic()
        due = self.spoken + min(max(FIRST, (self.spoken - self.started) / 4), MOST)
        if self.console.is_terminal or self.console.is_jupyter or self.disable or now < due:
            return
        self.spoken = now
        task = next(task for task in self.tasks if task.id == task_id)
        note = f", {task.fields['note']}" if task.fields.get("note") else ""
        left = f", {timedelta(seconds=round(task.time_remaining))} left" if task.time_remaining else ""
        done = f"{task.completed:,.0f}" if task.total is None else f"{task.percentage:.0f} %"
        self.console.print(f"{task.description}: {done}{note}{left}", markup=False, soft_wrap=True)
