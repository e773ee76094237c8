"""API keys, their users, and rate limits."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from prlhf_lightning.errors import CheckpointWriteError, ConfigurationError
from prlhf_lightning.serving.errors import APIError
from prlhf_lightning.utils.io import append_whole

_log = logging.getLogger("prlhf_lightning.serving")
_GUESSABLE = 16  # characters; wrong keys are not slowed, since those that are made here can't be guessed at any speed
_MOST_CALLERS = 10_000  # callers that a limiter remembers


@dataclass(frozen=True)
class APIKey:
    """An API key, stored as a hash.

    SHA-256 without salt or stretching, because keys are long and random, not chosen by people.

    Attributes:
        name: Name of the key in logs.
        sha256: Hexadecimal hash of the key.
        users: Pattern of the users that the key may act for, such as `team-a-*`.
    """

    name: str
    sha256: str
    users: str = "*"

    @property
    def prefix(self) -> str:
        """Common prefix of the ids of its users."""
        return re.split(r"[*?\[]", self.users, maxsplit=1)[0]

    def may_act_for(self, user: str) -> bool:
        """Return whether the key may act for this user."""
        return fnmatchcase(user, self.users)


ANYONE = APIKey("", "")


class KeyRing:
    """The keys of a server. Without any, everyone may use it.

    Args:
        keys: The keys.
    """

    def __init__(self, keys: Iterable[APIKey] = ()) -> None:
        self._keys = tuple(keys)
        if len({key.name for key in self._keys}) != len(self._keys):
            raise ConfigurationError("keys: two API keys have the same name; each needs its own.")

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, presented: str) -> APIKey | None:
        """Return the presented key or None, in constant time."""
        digest = sha256(presented.encode()).hexdigest()
        found = None
        for key in self._keys:
            if compare_digest(digest, key.sha256):
                found = key
        return found

    @classmethod
    def load(cls, path: Path | None, environment: Mapping[str, str]) -> KeyRing:
        """Return the keys of a TOML file and the one in `$PRLHF_API_KEY`, which gets the name `environment`.

        A file has a table for each key: `[NAME]`, `sha256 = "…"`, and optionally `users = "team-a-*"`.

        Raises:
            ConfigurationError: The file cannot be read or is malformed.
        """
        keys = [] if path is None else list(_read(path))
        if secret := environment.get("PRLHF_API_KEY"):
            if len(secret) < _GUESSABLE:
                _log.warning("PRLHF_API_KEY is so short that it could be guessed; make one with the command api-key.")
            keys.append(APIKey("environment", sha256(secret.encode()).hexdigest()))
        return cls(keys)


def new_key(name: str, users: str = "*") -> tuple[str, str]:
    """Return a new key, and its entry for the key file."""
    key = "sk-" + secrets.token_urlsafe(32)
    digest = sha256(key.encode()).hexdigest()
    return key, f'[{_toml(name)}]\nsha256 = "{digest}"\nusers = {_toml(users)}\n'


def _toml(text: str) -> str:
    """Return a TOML string: as in JSON, except for surrogate pairs and DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def add_entry(path: Path, entry: str) -> None:
    """Append a new key's entry to a key file; a new file is readable only by its owner.

    Raises:
        ConfigurationError: The file cannot be written, or already has a key of this name.
    """
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if set(tomllib.loads(before)) & set(tomllib.loads(entry)):
            raise ConfigurationError(f"name: {path} has a key of this name already; give the new one another.")
        append_whole(path, (f"\n{entry}" if before else entry).encode())
    except CheckpointWriteError:
        raise
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"keys: {path} can't be added to ({error}); it must be a TOML file.") from error


def _read(path: Path) -> Iterable[APIKey]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        if path.stat().st_mode & 0o022:
            _log.warning("Others than its owner may write to %s, and so let themselves in: chmod 600 it.", path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"keys: {path} can't be read ({error}); it must be a TOML file.") from error
    if not tables:
        raise ConfigurationError(f"keys: {path} has no keys; make one with the command api-key.")
    for name, table in tables.items():
        yield _key(path, name, table)


def _key(path: Path, name: str, table: Any) -> APIKey:
    known = table if isinstance(table, dict) else {}
    digest, users = known.get("sha256"), known.get("users", "*")
    if set(known) <= {"sha256", "users"} and _is_hash(digest) and isinstance(users, str):
        return APIKey(name, str(digest), users)
    raise ConfigurationError(
        f'keys: {path}: table [{name}] must have sha256 = "64 hexadecimal digits", may have users = "pattern", and '
        "nothing else."
    )


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


class RateLimiter:
    """Token-bucket rate limiter, with one bucket per caller.

    Args:
        per_minute: Long-run rate in requests per minute; None for no limit.
        burst: Number of requests at once after a pause.
    """

    def __init__(self, per_minute: float | None = None, burst: int = 20) -> None:
        self._rate, self._burst = per_minute and per_minute / 60, burst
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens, and the time of that count

    def wait(self, caller: str, now: float | None = None) -> float:
        """Take a token and return 0, or return the seconds until one is available."""
        if not self._rate:
            return 0.0
        now = time.monotonic() if now is None else now
        tokens, then = self._buckets.pop(caller, (float(self._burst), now))
        tokens = min(float(self._burst), tokens + (now - then) * self._rate)
        taken = tokens >= 1
        self._buckets[caller] = (tokens - taken, now)
        if len(self._buckets) > _MOST_CALLERS:  # drop the least recent caller
            del self._buckets[next(iter(self._buckets))]
        return 0.0 if taken else (1 - tokens) / self._rate


_documented = HTTPBearer(auto_error=False, description="An API key, where the server asks for one.")


async def _caller(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_documented)]) -> APIKey:
    # From the gate, which has checked it. Not a plain function, which the framework would run in a thread.
    key: APIKey = request.scope["prlhf.key"]
    return key


def caller_of(request: Request) -> str:
    """Return the caller for rate limits and scheduling: a key, or without keys an address."""
    return str(request.scope["prlhf.caller"])


Caller: TypeAlias = Annotated[APIKey, Depends(_caller)]


def check_users(key: APIKey, users: Iterable[str], param: str) -> None:
    """Refuse a key that may not act for all of these users."""
    if not all(key.may_act_for(user) for user in users):
        raise APIError(403, "This API key is not for this user.", "user_not_allowed", param)
