import pytest

from semcons_ray.commands.progress import Progress


def test_a_plan_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress.planned("warning: data[b].jsonl: 3 of 9 rows left out")
    assert "warning: data[b].jsonl: 3 of 9 rows left out\n" in capsys.readouterr().err
