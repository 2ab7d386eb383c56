"""Multiple-choice questions: what is scored of an option, so that lm-eval's tasks give the same numbers.

An answer is scored with the end of its turn; an option is not. As in lm-eval (0.4.13), it follows the prompt, with a
space between them where there is no chat template, and white space at the end of the prompt is scored with it. All that
is needed to choose is then in `evaluation.metrics`.
"""

from __future__ import annotations

from semcons_ray.messages import Prompt, turns_of
from semcons_ray.modeling.chat import ChatFormat, Encoded


class ChoiceFormat(ChatFormat):
    """A chat format that also writes the options of questions."""

    def option(self, prompt: Prompt, option: str) -> Encoded:
        """Ids of a prompt with an option as its answer, of which the option's are scored.

        It is cut to `max_length` at its beginning; an option gets at most half of it.
        """
        asked = self._style.prompt(turns_of(prompt))
        between = "" if self._tokenizer.chat_template else " "
        ids, begin = self._ids(asked + between + option), len(self._ids(asked.rstrip()))
        scored = ids[begin:][: self._max_length // 2]
        before = self._shortened_prompt(ids[:begin], self._max_length - len(scored))
        return Encoded([*before, *scored], ((len(before), len(before) + len(scored)),), len(option.encode()))
