"""Where consensus and averaging break even, on ledgers with numbers that are easy to reckon with."""

import math
from pathlib import Path

import pandas as pd
import pytest

import semcons_ray as sr
from semcons_ray.config import FederationConfig
from semcons_ray.errors import ConfigError, UserError
from semcons_ray.reporting.replay import Recorded, replay
from semcons_ray.studies.break_even import BreakEven, rate_in_words
from tests.reporting.recorded import TEXT, WEIGHTS, recorded

DEVICES = {"own": "laptop-cpu", "llama-3.1-8b": "rtx-4090"}
REST = FederationConfig(server_link="datacentre")


@pytest.fixture(scope="module")
def runs() -> dict[str, list[Recorded]]:
    return {"consensus": [recorded("semantic_consensus", TEXT)], "averages": [recorded("fedavg_lora", WEIGHTS)]}


@pytest.fixture(scope="module")
def found(runs: dict[str, list[Recorded]]) -> BreakEven:
    return BreakEven.of(runs, "averages", DEVICES, ["dsl", "lan"], REST)


@pytest.mark.parametrize("kind", ["hours", "joules"])
@pytest.mark.parametrize("model", [*DEVICES])
def test_at_the_break_even_both_take_as_much_and_below_it_consensus_less(
    runs: dict[str, list[Recorded]], found: BreakEven, model: str, kind: str
) -> None:
    def ratio(mbit: float) -> float:
        own = {"line": {"up_mbit": mbit, "down_mbit": mbit, "latency_ms": 10}}
        scaled = None if model == "own" else model
        imagined = FederationConfig(devices={DEVICES[model]: 1}, links={"line": 1}, own_links=own, model=scaled)
        consensus, averages = (replay(runs[arm][0], imagined).totals[kind] for arm in ("consensus", "averages"))
        return float(consensus / averages)

    rate = float(found.rates.set_index("model").loc[model, f"{kind}_mbit"])
    assert 0.01 < rate < 1e5
    assert ratio(rate) == pytest.approx(1, abs=0.02)
    assert ratio(rate / 3) < 1 < ratio(rate * 3)


def test_the_map_has_the_ratios_of_replays(runs: dict[str, list[Recorded]], found: BreakEven) -> None:
    assert found.arms == ["consensus"]
    for model, device in DEVICES.items():
        for link in ("dsl", "lan"):
            imagined = FederationConfig(
                devices={device: 1}, links={link: 1}, model=None if model == "own" else model, server_link="datacentre"
            )
            consensus, averages = (replay(runs[arm][0], imagined).totals for arm in ("consensus", "averages"))
            for kind in ("hours", "joules"):
                assert found.ratios("consensus", kind).loc[model, link] == consensus[kind] / averages[kind]
    assert (found.table.query("arm == 'averages'")[["hours_ratio", "joules_ratio"]] == 1).all(axis=None)


def test_an_arm_that_always_or_never_takes_less(runs: dict[str, list[Recorded]]) -> None:
    more = recorded("fedavg_lora", [{"stage": "fine_tune", "tokens": 9000, "downlink_bytes": 50_000_000}])
    nothing = recorded("local_only", [{"stage": "fine_tune", "tokens": 1}])
    arms = {**runs, "more": [more], "nothing": [nothing]}
    rates = BreakEven.of(arms, "averages", {"own": "laptop-cpu"}, ["lan"], REST).rates.set_index("arm")
    assert rates.loc["more", "hours_mbit"] == 0
    assert rates.loc["nothing", "hours_mbit"] == math.inf
    assert [rate_in_words(rates.loc[arm, "hours_mbit"]) for arm in ("more", "nothing")] == ["never", "always"]


def test_text_and_files_have_every_model_and_link(found: BreakEven, tmp_path: Path) -> None:
    text = str(found)
    for word in ("own", "llama-3.1-8b", "rtx-4090", "dsl", "lan", "Mbit/s", "consensus for each of averages"):
        assert word in text
    found.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"map.csv", "break_even.csv", "map.svg", "map.png"}
    written = pd.read_csv(tmp_path / "map.csv")
    assert written["hours_ratio [calculated]"].tolist() == pytest.approx(found.table["hours_ratio"].tolist(), rel=1e-5)


def test_arms_of_a_comparison_are_told_by_name(compared: Path) -> None:
    given = {"models": {"own": "laptop-cpu"}, "links": ["dsl"]}
    done = sr.break_even(compared, **given)
    assert (done.against, done.arms) == ("averages", ["consensus"])
    other = sr.break_even(compared, **given, against="consensus")
    ratio = done.ratios("consensus", "hours").iloc[0, 0]
    assert other.ratios("averages", "hours").iloc[0, 0] == pytest.approx(1 / ratio)
    for options, words in (
        ({"against": "consenus"}, "--against: there is no arm consenus; there are consensus; averages"),
        ({"arms": ["x"]}, "--arms: there is no arm x"),
        ({"arms": ["averages"]}, "two arms or more"),
        ({"links": ["dls"]}, "did you mean dsl"),
        ({"models": {"llama-3.1-8c": "rtx-4090"}}, "did you mean llama-3.1-8b"),
        ({"models": ["own"]}, "federation.devices is empty"),
        ({"models": {"llama-3.1-405b": "laptop-cpu"}}, "laptop-cpu"),
    ):
        with pytest.raises(ConfigError, match=words):
            sr.break_even(compared, **(given | options))
    for arm, words in (("averages", "several arms average weights"), ("consensus", "no arm averages weights")):
        with pytest.raises(ConfigError, match=words):
            sr.break_even(*sorted(compared.glob(f"runs/{arm}/*")), **given)
    with pytest.raises(UserError):
        sr.break_even(models=["own"])


def test_devices_come_from_the_federation_where_a_model_has_none(compared: Path) -> None:
    given = {"devices": {"laptop-cpu": 1}, "region": "norway"}
    done = sr.break_even(compared, models=["own"], links=["dsl"], federation=given)
    assert done.table["device"].unique().tolist() == ["laptop-cpu"]
    assert "norway" in str(done)
