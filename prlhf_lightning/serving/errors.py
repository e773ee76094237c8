"""Errors in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# Errors of the web framework itself; 400 is an unreadable body.
_CODES = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed", 408: "too_slow", 413: "too_large"}
_MEANING = {
    400: "The request is not what it should be.",
    401: "The API key is missing or wrong.",
    403: "The API key is not for this user.",
    404: "There is no such thing.",
    408: "The request's body came too slowly.",
    409: "The id stands for other feedback, or the user can't be learned.",
    413: "The request, or the prompt in it, is too large.",
    429: "Too many requests; see Retry-After.",
    500: "The server failed.",
    503: "Not ready.",
}


class ErrorDetail(BaseModel):
    """Description of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetail


class APIError(Exception):
    """An error response.

    Args:
        status: HTTP status.
        message: The problem and the fix.
        code: Short name of the error, for programs.
        param: The invalid field of the request.
        retry_after: Seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = {} if retry_after is None else {"retry-after": str(max(1, round(retry_after)))}
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"
        kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))

    def response(self) -> JSONResponse:
        """Return the response to send."""
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the possible errors of a route, in the format of FastAPI's `responses`."""
    answers: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        answers[status] = {"model": ErrorBody, "description": _MEANING[status]}
        if status in (429, 503):
            answers[status]["headers"] = {"Retry-After": {"schema": {"type": "string"}, "description": "Seconds."}}
    return answers


def install(app: FastAPI) -> None:
    """Make an app answer all errors in this form."""

    @app.exception_handler(APIError)
    async def _(request: Request, error: APIError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        return _of_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        answer = APIError(error.status_code, str(error.detail), _CODES.get(error.status_code)).response()
        answer.headers.update(error.headers or {})
        return answer


def _of_validation(errors: Any) -> APIError:
    """Return an error that names the invalid field without repeating the request.

    If a field has several forms, the closest one counts: the deepest error that is not about the type.
    """
    worst = max(errors, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
    if worst["type"] == "json_invalid":
        return APIError(400, "The body is not valid JSON.", "invalid_json")
    param = ".".join(str(part) for part in worst["loc"][1:] if not _is_label(part)) or None
    if worst["type"] == "extra_forbidden":
        return APIError(
            400, f"The parameter {param!r} is not supported here; leave it out.", "unknown_parameter", param
        )
    if worst["type"] == "missing" and param is None:
        return APIError(400, "The request needs a body: a JSON object.", "missing_body")
    fault = (
        "It needs a visible character, and must hold no NUL"
        if worst["type"].startswith("string_pattern")
        else worst["msg"]
    )
    return APIError(400, f"{param or 'The body'}: {fault}.", "invalid_value", param)


def _is_label(part: int | str) -> bool:
    """Return whether a part of an error's location is pydantic's label of a form, not a field."""
    return isinstance(part, str) and not re.fullmatch(r"(?!(str|list|int|float|pair|thumb)$)[a-z_]+", part)
