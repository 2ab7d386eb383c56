"""Kinds of clients of one's own, as small as they may be."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from semcons_ray.messages import Prompt, text_of
from semcons_ray.modeling.client_model import Pair, Score, State, Task


class Parrot:
    """Answers with the response that it has heard to the prompt with the most words in common; before, with `word`.

    With a temperature, it draws among the responses that fit equally well.
    """

    def __init__(self, folder: Path, word: str = "polly", price: float = 0.0) -> None:
        self.folder, self.word, self.price = folder, word, price

    def restore(self, state: State) -> None:
        heard = state.get("heard", b"{}")
        assert isinstance(heard, bytes)
        self.heard: dict[str, str] = json.loads(heard)

    def state(self) -> State:
        return {"heard": json.dumps(self.heard).encode()}

    def learn(self, pairs: Sequence[Pair], task: Task) -> None:
        self.heard |= {text_of(pair.prompt): pair.response for pair in pairs}
        task.tokens, task.cost_usd = len(pairs), self.price * len(pairs)
        with (self.folder / "calls").open("a") as calls:
            calls.write(f"{task.round}\n")

    def answer(self, prompts: Sequence[Prompt], task: Task) -> list[list[str]]:
        task.cost_usd += self.price
        return [[self._say(text_of(prompt), task) for prompt in prompts] for _ in range(task.num_samples)]

    def _say(self, prompt: str, task: Task) -> str:
        words = set(prompt.split())
        near = {heard: len(words.intersection(heard.split())) for heard in self.heard}
        nearest = [heard for heard, common in near.items() if common == max(near.values())]
        drawn = int(task.generator.integers(len(nearest))) if nearest and task.temperature else 0
        return self.heard[nearest[drawn]] if nearest else self.word


class Listening(Parrot):
    """A parrot that tells how likely it finds a text: a nat for each byte that is no vowel."""

    def score(self, pairs: Sequence[Pair]) -> Score:
        texts = [pair.response for pair in pairs]
        nll = tuple(float(sum(sign not in "aeiou" for sign in text)) for text in texts)
        lengths = tuple(len(text.encode()) for text in texts)
        return Score(nll, lengths, lengths, sum(lengths))


class Caged(Parrot):
    """A parrot that speaks only to who has the key."""

    def __init__(self, folder: Path, key: str = "CAGE_KEY") -> None:
        super().__init__(folder)
        self.environment = (key,)

    def answer(self, prompts: Sequence[Prompt], task: Task) -> list[list[str]]:
        return [[f"opened {bool(os.environ[self.environment[0]])}"] * len(prompts)] * task.num_samples


class Shy(Parrot):
    """A parrot that falls ill in some round: it `fails`, says `nothing` at all, or `numbers`."""

    def __init__(self, folder: Path, how: str = "fails", round: int = 2) -> None:
        super().__init__(folder)
        self.how, self.round = how, round

    def answer(self, prompts: Sequence[Prompt], task: Task) -> list[list[str]]:
        if task.round == self.round and task.purpose == "answer":
            if self.how == "fails":
                raise RuntimeError("pieces of eight")
            return [] if self.how == "nothing" else [[8] * len(prompts)] * task.num_samples  # type: ignore[list-item]
        return super().answer(prompts, task)


class Mute:
    """No kind of client: it can't answer."""

    def learn(self, pairs: Sequence[Pair], task: Task) -> None: ...

    def state(self) -> State:
        return {}

    def restore(self, state: State) -> None: ...
