from pathlib import Path

from semcons_ray.config import ExperimentConfig
from semcons_ray.data.losses import REPEATED, Tally
from semcons_ray.runs.run_folder import RunFolder
from semcons_ray.studies.batch import warn_of_losses


def test_a_loss_of_data_that_runs_share_is_warned_of_once(tmp_path: Path) -> None:
    said: set[str] = set()
    lines: list[str] = []
    for name, lost in (("a", 1), ("b", 2), ("c", 2)):
        folder = RunFolder.create(tmp_path / name, ExperimentConfig())
        folder.write_tallies([Tally.of("data.source x.csv", "rows left out", 100, {REPEATED: lost})])
        warn_of_losses(folder.path, said, lines.append)
    assert lines == ["warning: data.source x.csv: 2 of 100 rows left out (2 with the prompt of an earlier row)"]
