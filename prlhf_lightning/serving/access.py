"""What routes ask about who calls them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, TypeAlias

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from prlhf_lightning.serving.api_errors import APIError
from prlhf_lightning.serving.keys import APIKey

_documented = HTTPBearer(auto_error=False, description="An API key, where the server asks for one.")


async def _caller(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Depends(_documented)]) -> APIKey:
    # From the gate, which has checked it. Not a plain function, which the framework would run in a thread.
    key: APIKey = request.scope["prlhf.key"]
    return key


def caller_of(request: Request) -> str:
    """Return who asks, as far as rates and turns go: a key, or without keys an address."""
    return str(request.scope["prlhf.caller"])


Caller: TypeAlias = Annotated[APIKey, Depends(_caller)]


def check_users(key: APIKey, users: Iterable[str], param: str) -> None:
    """Refuse a key that is not for all of these users."""
    if not all(key.may_act_for(user) for user in users):
        raise APIError(403, "This API key is not for this user.", "user_not_allowed", param)
