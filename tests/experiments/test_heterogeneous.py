from pathlib import Path

import pytest

from tests.experiments.scripts import load_script
from tests.reporting.builder import write_run

heterogeneous = load_script("heterogeneous")
MODELS = ("packaged:one", "packaged:two")


def write_comparison(folder: Path, *, seeds: tuple[int, ...] = (0, 1), lost: dict[int, tuple[int, ...]] | None = None):
    for seed in seeds:
        shape = {"num_rounds": 3, "models": MODELS}
        write_run(
            folder / "runs" / "semantic-consensus" / f"seed_{seed}",
            **shape, lost=lost, answer_last_round=False, settings={"seed": seed},
        )  # fmt: skip
        write_run(folder / "runs" / "local-only" / f"seed_{seed}", **shape, local_only=True, settings={"seed": seed})
    return folder


def test_votes_are_those_of_the_last_round_in_which_clients_answered(tmp_path: Path) -> None:
    table = heterogeneous.twins(write_comparison(tmp_path))
    assert table[["seed", "client_id"]].to_numpy().tolist() == [[s, c] for s in (0, 1) for c in (0, 1, 2)]
    # Round 2: client (prompt + 2) % 3 of prompts 1 to 4; the third round had no answers.
    assert table["votes_won"].tolist()[:3] == pytest.approx([2 / 5, 1 / 5, 1 / 5])
    assert table["model"].tolist()[:3] == ["one", "two", "one"]
    assert table["consensus_nll"].tolist()[:3] == pytest.approx([1.7, 1.4, 1.1])
    assert table["consensus_bits_per_byte"].tolist()[:3] == pytest.approx([0.85, 0.35, 0.55])
    assert table["local_bits_per_byte"].tolist() == table["consensus_bits_per_byte"].tolist()


def test_a_client_without_a_last_measurement_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"clients \[1\] were not measured after round 3"):
        heterogeneous.twins(write_comparison(tmp_path, lost={3: (1,)}))


def test_table_and_figure_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_comparison(tmp_path / "compared")
    monkeypatch.setattr("sys.argv", ["run.py", str(folder), "--out", str(tmp_path / "out")])
    heterogeneous.main()
    assert (tmp_path / "out" / "twins.csv").read_text().startswith("seed,client_id,model,base_nll,base_bits_per_byte")
    assert "bits per byte" in (tmp_path / "out" / "twins.svg").read_text()
