"""A server in this process, with an engine whose every word is known."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from conftest import make_tokenizer

from prlhf_lightning.data.conversations import message_text
from prlhf_lightning.data.records import FeedbackRecord
from prlhf_lightning.data.tokenization import TokenizationSettings, TokenizedRecord
from prlhf_lightning.data.users import UserVocabulary
from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.inference import Chunk, GenerationRequest
from prlhf_lightning.serving.server import make_server
from prlhf_lightning.serving.services import Ranker, Services
from prlhf_lightning.training.scorer import Scored, Scorer

USERS = ("ann", "bob", "team-a-1", "zoë 李")
CHAT = {"model": "echo", "messages": [{"role": "user", "content": "one two three"}]}


def writer(chat_template: str | None = None) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template
    return SimpleNamespace(name="echo", vocabulary=UserVocabulary(USERS), tokenizer=tokenizer, max_positions=None)


def echo(generation: GenerationRequest) -> str:
    """What the engine answers: the user, then the prompt."""
    prompt = generation.prompt
    text = prompt if isinstance(prompt, str) else " ".join(message["content"] for message in prompt)
    return f"{generation.user}: {text}"


class EchoEngine:
    """Says each prompt back, a word a step, to so many at once. It breaks at the word `break`, and refuses `refuse`."""

    def __init__(self, seconds: float = 0.0, room: int = 1000) -> None:
        self.seconds, self.room, self.texts, self.count = seconds, room, dict[int, list[str]](), 0

    def add(self, generation: GenerationRequest) -> int:
        if "refuse" in echo(generation):
            raise ConfigurationError("no: refuse")
        self.count += 1
        words = echo(generation).split(" ")
        kept = words[: generation.max_new_tokens]
        finish = "stop" if kept == words else "length"
        self.texts[self.count] = [word + " " for word in kept[:-1]] + [kept[-1] + "\0" + finish]
        return self.count

    def cancel(self, number: int) -> None:
        self.texts.pop(number, None)

    def step(self) -> list[Chunk]:
        time.sleep(self.seconds)
        pieces = []
        for number, words in list(self.texts.items())[: self.room]:
            text, _, finish = words.pop(0).partition("\0")
            if text.strip() == "break":
                raise RuntimeError(f"broken by {text}")
            pieces.append(Chunk(number, text, 1, finish or None, prompt_tokens=7))
            if finish:
                del self.texts[number]
        return pieces

    @property
    def idle(self) -> bool:
        return not self.texts

    @property
    def waiting(self) -> int:
        return max(len(self.texts) - self.room, 0)


class LengthScorer(Scorer):
    """Rewards long answers for `ann` and short ones for others; refuses the word `refuse`."""

    def __init__(self) -> None:
        super().__init__(make_tokenizer(), TokenizationSettings(), UserVocabulary(USERS))

    def scored_records(self, records: Sequence[FeedbackRecord], wheres: Sequence[str]) -> Scored:
        texts = [message_text(one.chosen[0]) if isinstance(one.chosen, list) else one.chosen for one in records]
        signs = [1 if one.user_id == "ann" else -1 for one in records]
        rewards = torch.tensor([sign * float(len(text)) for sign, text in zip(signs, texts, strict=True)])
        return Scored(rewards, {n: "refused" for n, text in enumerate(texts) if "refuse" in text}, 7 * len(texts))

    def _rewards(self, user_ids: Sequence[str], texts: Sequence[TokenizedRecord]) -> torch.Tensor:
        raise NotImplementedError


def ranker() -> Ranker:
    return Ranker("echo-reward", LengthScorer())


@contextmanager
def serving(services: Services, drain_seconds: float = 5) -> Iterator[str]:
    """Serve until the block ends; give the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = make_server(services, drain_seconds)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
