"""Reports of a run folder: tables for the terminal, figures, and a self-contained HTML page.

They are made from the folder's files only, so a run can be reported on another machine, and while it is still going on.
Imports neither torch nor ray.
"""

from semcons_ray.reporting.html import write_report
from semcons_ray.reporting.tables import Run, print_result, read_run, render_result

__all__ = ["Run", "print_result", "read_run", "render_result", "write_report"]
