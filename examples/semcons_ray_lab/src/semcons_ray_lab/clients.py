"""A client kind of one's own: a client without a language model, which repeats what it has heard."""

import json
from collections.abc import Sequence

from semcons_ray.messages import Prompt, text_of
from semcons_ray.modeling.client_model import Pair, State, Task


class Parrot:
    """Answers with the response to that question, of those it has heard, which shares the most words with a prompt.

    A client kind has the methods of `ClientModel`. What `state` returns is all that is kept from one visit to the next,
    so that a client goes on alike wherever it works. Parameters of the constructor would be options.
    """

    def __init__(self) -> None:
        self.heard: dict[str, str] = {}

    def learn(self, pairs: Sequence[Pair], task: Task) -> None:
        """Remember private examples and pseudo-labels."""
        self.heard |= {text_of(pair.prompt): pair.response for pair in pairs}

    def answer(self, prompts: Sequence[Prompt], task: Task) -> Sequence[Sequence[str]]:
        """The same answers for each sample that is asked for; empty ones before it has heard anything."""
        return [[self.nearest(text_of(prompt)) for prompt in prompts]] * task.num_samples

    def nearest(self, asked: str) -> str:
        """The answer to one prompt."""
        shared = [len({*asked.split()} & {*question.split()}) for question in self.heard]
        return [*self.heard.values()][shared.index(max(shared))] if shared else ""

    def state(self) -> State:
        """What it has heard."""
        return {"heard": json.dumps(self.heard).encode()}

    def restore(self, state: State) -> None:
        """Know it again."""
        self.heard = json.loads(state.get("heard", b"{}"))
