"""How attacks go, worked out by hand from answers that are written down here."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from semcons_ray.consensus import Election
from semcons_ray.errors import ConfigError
from semcons_ray.security.attacks import Draws, Scene
from semcons_ray.studies.attacks import Outcome, attack_table, make_attacks, play
from semcons_ray.studies.labels import Answered, elect

PLURALITY = Election("plurality", {"min_cosine": 1.0})


class Letters:
    """Embeds a text by the letter that it begins with, so different letters have nothing in common."""

    dimension = 26

    def embed(self, texts: Sequence[str]) -> Tensor:
        return torch.eye(26)[[ord((text or "a")[0]) - ord("a") for text in texts]]


RUN = Answered(
    samples={1: {0: [["a", "b", "c", "q"]], 1: [["a", "b", "d", "q"]], 2: [["a", "y", "e", "q"]]}},
    prompts=["one", "two", "three", "four"],
    references=["a", "b", "c", "z"],
    categories=["", "", "", ""],
    embedder=Letters(),
    num_examples={0: 5, 1: 5, 2: 5},
)
"""Plurality elects a, b, one of c, d and e, and q, which is wrong."""


class Says:
    """Attackers who send the same text, four letters for four prompts, in a round of its own number each."""

    def __init__(self, *rounds: str, honest_rounds: int = 0) -> None:
        self.rounds, self.honest_rounds = rounds, honest_rounds
        self.seen: list[Scene] = []

    def __call__(self, scene: Scene) -> Sequence[Draws]:
        self.seen.append(scene)
        return scene.together(self.rounds[min(scene.round, len(self.rounds)) - 1])


def played(attack: Says, share: float, election: Election = PLURALITY, run: Answered = RUN) -> Outcome:
    longer = replace(run, samples=dict.fromkeys(range(1, 6), run.samples[1]))
    return play(run, election, attack, share, elect(longer, election, 1))


def test_a_label_is_captured_if_it_is_theirs_and_wrong_and_was_not_there_before() -> None:
    # Two attackers among five: x loses to three a, wins nothing against two b but by a draw, and wins at the third.
    outcome = played(Says("xbxq"), 0.4)
    assert outcome.num_attackers == 2
    assert outcome.captured == 0.25  # the third; q is wrong, but would be elected anyway, and b is right
    assert outcome.accuracy == 0.5


def test_a_right_answer_of_theirs_is_no_capture() -> None:
    outcome = played(Says("abcz"), 0.6)
    assert (outcome.num_attackers, outcome.captured, outcome.accuracy) == (4, 0.0, 1.0)
    assert outcome.labels == ["a", "b", "c", "z"]
    assert outcome.usual[:2] == ["a", "b"]


def test_labels_whose_right_answer_is_not_known_do_not_count() -> None:
    outcome = played(Says("xbxq"), 0.4, run=replace(RUN, references=["a", "b", "c", ""]))
    assert (outcome.captured, outcome.accuracy) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_only_rounds_in_which_they_do_harm_count_and_honest_clients_go_on() -> None:
    attack = Says("abcq", "abcq", "xxxx", honest_rounds=2)
    outcome = played(attack, 0.6)
    assert [scene.round for scene in attack.seen] == [1, 2, 3]
    assert attack.seen[2].honest == attack.seen[0].honest
    assert (outcome.captured, outcome.accuracy) == (1.0, 0.0)


@pytest.mark.parametrize(("share", "count"), [(0.1, 0), (0.2, 1), (0.3, 1), (0.5, 3)])
def test_attackers_are_a_share_of_all(share: float, count: int) -> None:
    assert played(Says("xxxx"), share).num_attackers == count


def test_the_table_has_what_is_lost(tmp_path: Path) -> None:
    said: list[str] = []
    done = attack_table([RUN, replace(RUN, seed=1)], [PLURALITY], {"says": Says("xxxx")}, [0.6], said.append)
    assert len(said) == 2
    assert done.table["attack"].tolist() == ["none", "says"] * 2
    attacked = done.table[done.table["attack"] == "says"]
    alone = done.table[done.table["attack"] == "none"]
    assert attacked["captured"].tolist() == [1.0, 1.0]
    assert (attacked["lost"].to_numpy() == alone["accuracy"].to_numpy() - attacked["accuracy"].to_numpy()).all()
    done.write(tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"attack.csv", "attack.svg", "attack.png"}
    text = str(done)
    assert "60% malicious" in text
    assert "± half of the 95% t-interval" in text


def test_a_share_of_nobody_is_left_out_and_told_or_refused() -> None:
    told: list[str] = []
    done = attack_table([RUN], [PLURALITY], {"says": Says("xxxx")}, [0.1, 0.6], told.append)
    assert set(done.table["share"]) == {0.0, 0.6}
    assert told[0] == "at 0.1 of so few clients none is malicious: left out"
    with pytest.raises(ConfigError, match="--shares: beside 3 honest clients not one is malicious"):
        attack_table([RUN], [PLURALITY], {"says": Says("xxxx")}, [0.1], print)


def test_what_is_no_share_and_what_are_no_answers_is_refused() -> None:
    with pytest.raises(ConfigError, match="--shares must be above 0 and under 1, not 1"):
        attack_table([RUN], [PLURALITY], {"says": Says("xxxx")}, [0.5, 1.0], print)
    with pytest.raises(ConfigError, match="attack Says must give 2 attackers 1 answers to each prompt"):
        played(Says("xxx"), 0.4)
    with pytest.raises(ConfigError, match="--attacks: backdoor has no option word"):
        make_attacks(["backdoor {word: gcd}"])
