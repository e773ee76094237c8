"""The limits of a server."""

from __future__ import annotations

from dataclasses import dataclass, fields

from prlhf_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class Limits:
    """Limits on requests, answers and learned users.

    Attributes:
        max_tokens: Maximum number of tokens of an answer.
        max_open: Maximum number of waiting and running requests for text; further ones get 429. At the limit, a new
            request replaces a waiting request of the caller with the most.
        max_batch: Maximum number of texts generated at once.
        max_batch_tokens: Maximum number of positions in the KV cache: running texts times the longest, including its
            answer.
        max_prompt: Maximum characters of a prompt; a longer one gets 413.
        max_body: Maximum bytes of a request; a larger one gets 413.
        max_learned: Maximum number of users that a running server learns.
        read_seconds: Time limit in seconds for the headers of a request, and again for its body.
        requests_per_minute: Long-run rate limit of one API key (without keys: of one address); more get 429.
        burst: Number of requests of one key at once under the rate limit.
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
