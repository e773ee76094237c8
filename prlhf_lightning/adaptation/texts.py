"""The distinct texts among pairs, laid out so that each is scored once, whoever judged it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prlhf_lightning.types import PreferenceBatch, Tokens


@dataclass(frozen=True)
class DistinctTexts:
    """The P distinct prompts and D distinct completions of N pairs.

    A prompt is told by its own text and by the text about the user where the user model reads it, a completion by its
    text and its prompt.

    Attributes:
        prompt: `[P, L]` tokens of the prompts.
        user_text: `[P, L]` tokens of the texts about users; without any where the user model does not read them.
        completion: `[D, L]` tokens of the completions.
        prompt_of: `[D]` prompt of each completion.
        chosen: `[N]` the completion that each pair's user preferred.
        rejected: `[N]` the other one.
    """

    prompt: Tokens
    user_text: Tokens
    completion: Tokens
    prompt_of: Tensor
    chosen: Tensor
    rejected: Tensor

    @classmethod
    def of(cls, pairs: PreferenceBatch, uses_text: bool) -> DistinctTexts:
        """Find those of N pairs, told apart by the text about the user as well if `uses_text`."""
        text = pairs.user_text if uses_text else Tokens(pairs.user_text.ids[:, :0], pairs.user_text.mask[:, :0])
        prompts, prompt_of_pair = _distinct(_contents(text), _contents(pairs.prompt))
        both = Tokens.concat([pairs.chosen, pairs.rejected])
        completions, number = _distinct(prompt_of_pair * 2, _contents(both))

        def index(places: Sequence[int]) -> Tensor:
            return torch.tensor(places, dtype=torch.long, device=both.ids.device)

        return cls(
            pairs.prompt.select(index(prompts)),
            text.select(index(prompts)),
            both.select(index(completions)),
            index([(prompt_of_pair * 2)[place] for place in completions]),
            *(index(half) for half in (number[: len(pairs)], number[len(pairs) :])),
        )

    def groups(self, wanted: Tensor, most: int) -> Iterator[Tensor]:
        """Divide completions by their prompts, those of prompts with like completions together.

        Args:
            wanted: `[D]` bool, the completions to divide.
            most: Most prompts in a group.

        Yields:
            `[n]` completions: all of those that are wanted of up to `most` prompts.
        """
        places = wanted.nonzero().flatten()
        longest = torch.zeros(len(self.prompt), dtype=torch.long, device=wanted.device)
        longest = longest.scatter_reduce(0, self.prompt_of[places], self.completion.mask.sum(1)[places], "amax")
        rank = longest.argsort(stable=True).argsort()  # prompts of which nothing is wanted come first
        rank = (rank - (longest == 0).sum())[self.prompt_of[places]] // most
        order = rank.argsort(stable=True)
        yield from torch.split(places[order], torch.bincount(rank).tolist())


def _contents(tokens: Tokens) -> list[bytes]:
    return [ids.numpy().tobytes() for ids in tokens.to("cpu").unpadded()]


def _distinct(*parts: Sequence[bytes | int]) -> tuple[list[int], list[int]]:
    """Return the first row of each distinct content, and for each row the number of its content."""
    first: dict[tuple[bytes | int, ...], int] = {}
    for row, content in enumerate(zip(*parts, strict=True)):
        first.setdefault(content, row)
    number = {content: place for place, content in enumerate(first)}
    return list(first.values()), [number[content] for content in zip(*parts, strict=True)]
