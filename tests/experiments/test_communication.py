import pandas as pd

from tests.experiments.scripts import load_script

communication = load_script("communication")

# Bytes since the run's beginning, as semcons compare writes them.
ROUNDS = pd.DataFrame(
    [
        ("text", 0, 0, 0, 10),
        ("text", 0, 2, 200, 130),
        ("text", 0, 1, 100, 50),
        ("text", 1, 1, 110, 60),
        ("nothing", 0, 2, 0, 0),
        ("weights", 0, 2, 4000, 6000),
    ],
    columns=["arm", "seed", "round", "uplink_bytes", "downlink_bytes"],
)


def test_bytes_of_a_run_are_those_of_its_last_round():
    table = communication.measure(ROUNDS)
    assert list(table.index) == ["nothing", "text", "weights"]
    assert table.loc["text"].to_dict() == {
        "seeds": 2,
        "rounds": 2,
        "uplink_bytes": 155,
        "downlink_bytes": 95,
        "total_bytes": 250,
        "least": 170,
        "most": 330,
    }


def test_the_figure_names_every_arm_also_one_that_sent_nothing(tmp_path):
    communication.draw_measured(communication.measure(ROUNDS), tmp_path / "measured.svg")
    drawn = (tmp_path / "measured.svg").read_text()
    assert all(text in drawn for text in ("nothing", "text", "weights", "0 B", "250 B", "10.0 kB"))


def test_our_setting_and_the_others_come_to_about_1006():
    settings = [(communication.TARGETS, {}), *communication.OTHERS]
    rows = [
        communication.calculate(communication.MODEL, targets, communication.SETTING | changed)
        for targets, changed in settings
    ]
    assert all(min(abs(row[name] - 1006) for name in ("ratio", "ratio_of_a_round")) < 1 for row in rows)
