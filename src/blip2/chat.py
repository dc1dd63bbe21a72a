"""A conversation about one image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Unpack

from blip2.decoding import BEAMS, Decoding, Options
from blip2.errors import PromptError
from blip2.results import ImageFeatures

if TYPE_CHECKING:
    from blip2.blip2 import Blip2


@dataclass
class Chat:
    """A conversation about one image: `say` asks and remembers.

    Attributes:
        turns: questions and answers that the model still sees, oldest first.
        forgotten: how many older turns have left because the context was full.
    """

    model: Blip2
    features: ImageFeatures
    turns: list[tuple[str, str]] = field(default_factory=list)
    forgotten: int = 0

    def say(self, text: str, **options: Unpack[Options]) -> str:
        """The answer to a question, in the light of the conversation so far.

        The oldest turns leave when they no longer fit; `forgotten` counts them.

        Args:
            options: how the text is chosen, see `Decoding`; five beams by default.
        Raises:
            PromptError: the question is empty, or too long even for a conversation that begins with it.
        """
        question = text.strip()
        if not question:
            raise PromptError("the question is empty")
        decoding = Decoding.of(options, num_beams=BEAMS)
        self._make_room(question, decoding.max_new_tokens)
        features = self.model.heeding(self.features, [question], [1])
        answer = self.model.write(features, [self._prompt(question)], decoding)[0][0].text
        self.turns.append((question, answer))
        return answer

    def _prompt(self, question: str) -> str:
        prompts = self.model.config.prompts
        return "".join(prompts.turn.format(*turn) for turn in self.turns) + prompts.question.format(question)

    def _make_room(self, question: str, new_tokens: int) -> None:
        """Forget the oldest turns until the question fits; nothing is forgotten for one that never can."""
        language, tokenizer = self.model.writer()
        room = language.context - self.features.queries.shape[1] - 1 - new_tokens

        def fits(prompt: str) -> bool:
            return len(tokenizer.encode([prompt])[0]) <= room

        if not fits(self.model.config.prompts.question.format(question)):
            raise PromptError(
                f"the question is too long: it has to leave room in the {language.context} positions of the language "
                "model; shorten it or lower max_new_tokens"
            )
        while not fits(self._prompt(question)):
            self.turns.pop(0)
            self.forgotten += 1
