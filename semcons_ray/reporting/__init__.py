"""What a run folder says: tables for the terminal, figures, and one self-contained HTML page.

Reads only what is written in the folder, so a run can be reported on another machine, and at any time while it is
still going on. Imports neither torch nor ray.
"""

from semcons_ray.reporting.html import write_report
from semcons_ray.reporting.tables import Run, print_result, read_run, render_result

__all__ = ["Run", "print_result", "read_run", "render_result", "write_report"]
