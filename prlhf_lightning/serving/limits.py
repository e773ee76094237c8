"""The limits of a server."""

from __future__ import annotations

from dataclasses import dataclass, fields

from prlhf_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class Limits:
    """How much is taken in.

    Attributes:
        max_tokens: Most tokens of an answer.
        max_open: Most requests for text that are waiting or being written at once; the next ones get 429. When there
            are so many, a newcomer takes the place of a waiting request of whoever has the most.
        max_batch: Most texts that are written at once.
        max_batch_tokens: Most positions for which the model keeps keys and values: texts written at once by the length
            of the longest, its answer included.
        max_prompt: Most characters of a prompt; a longer one gets 413.
        max_body: Most bytes of a request; a larger one gets 413.
        max_learned: Most users that the server learns while it runs.
        read_seconds: Seconds within which the head of a request, and then its body, must be there.
        requests_per_minute: Requests of one API key (without keys: of one address) in the long run; more get 429.
        burst: Requests of one key at once, where they are limited.
    """

    max_tokens: int = 512
    max_open: int = 256
    max_batch: int = 64
    max_batch_tokens: int = 131_072
    max_prompt: int = 65_536
    max_body: int = 1_048_576
    max_learned: int = 1000
    read_seconds: float = 30
    requests_per_minute: float | None = None
    burst: int = 20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value <= 0:
                raise ConfigurationError(f"{field.name} is {value}; it must be above 0.")
