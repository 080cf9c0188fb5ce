"""One self-contained HTML page per run or study."""

from .figures import forest, label_curves, loss_curves, parity
from .page import Page
from .run import run_report

__all__ = ["Page", "forest", "label_curves", "loss_curves", "parity", "run_report"]
