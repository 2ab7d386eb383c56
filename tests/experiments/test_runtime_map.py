"""What the break-even of semantic consensus and averaging rests on, on ledgers with numbers that are easy to reckon
with."""

import pandas as pd
import pytest

from semcons_ray.reporting.replay import Recorded
from tests.experiments.scripts import load_script
from tests.reporting.recorded import TEXT, WEIGHTS, recorded

script = load_script("runtime", "run.py")


@pytest.fixture(scope="module")
def runs() -> dict[str, list[Recorded]]:
    return {"consensus": [recorded("semantic_consensus", TEXT)], "FedAvg-LoRA": [recorded("fedavg_lora", WEIGHTS)]}


def test_sensitivities_name_each_assumption_twice(runs: dict[str, list[Recorded]]) -> None:
    table = pd.DataFrame(script.sensitivities(runs))
    assert table["assumption"].value_counts().drop("as assumed").unique().tolist() == [2]
    more = table.query("assumption == 'private examples a round'")["hours"].tolist()
    assert table["hours"].iloc[0] < more[0] < more[1]  # what is the same for both comes to outweigh messages
    base = table.set_index("assumption").loc["as assumed", "hours"]
    slower = table.query("assumption == 'up_mbit' and factor == 0.5")["hours"].iloc[0]
    faster = table.query("assumption == 'up_mbit' and factor == 2")["hours"].iloc[0]
    assert slower < base < faster  # who sends much loses more by a slow link
