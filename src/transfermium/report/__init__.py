"""One self-contained HTML page per run or study."""

from .figures import forest, label_curves, loss_curves, parity
from .page import Page
from .run import label_row, run_report
from .structures import Column, need_viewer, parity_columns

__all__ = [
    "Column",
    "Page",
    "forest",
    "label_curves",
    "label_row",
    "loss_curves",
    "need_viewer",
    "parity",
    "parity_columns",
    "run_report",
]
