"""Generation routes: chat completions and completions, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar
from uuid import uuid4

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from prlhf_lightning.errors import PRLHFError, PromptTooLongError
from prlhf_lightning.inference import Chunk, GenerationRequest
from prlhf_lightning.serving import schemas
from prlhf_lightning.serving.auth import APIKey, Caller, caller_of, check_users
from prlhf_lightning.serving.errors import APIError, documented
from prlhf_lightning.serving.scheduler import Closing, EngineFailed, Overloaded, PendingRequest
from prlhf_lightning.serving.services import Prompt, Services

T = TypeVar("T")
Body: TypeAlias = schemas.ChatRequest | schemas.CompletionRequest

_HEADER = "x-personalization"
_headers = {_HEADER: {"schema": {"type": "string"}, "description": "`personalization.status` of the answer."}}


def completions_router(services: Services) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["generation"])

    def answers(whole: type[BaseModel], piece: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
        found = {"model": whole, "content": schemas.event_stream(piece), "headers": _headers}
        return {200: found, **documented(400, 401, 403, 404, 408, 413, 429, 500, 503)}

    @routes.post("/v1/chat/completions", responses=answers(schemas.ChatCompletion, schemas.ChatCompletionChunk))
    async def chat_completions(body: schemas.ChatRequest, request: Request, key: Caller) -> Response:
        """Generate the next turn of a conversation for a user."""
        _check_last_message(body)
        prompt = services.prompt([message.plain() for message in body.messages])
        answer = await _begin(services, body, prompt, request, key, "chatcmpl")
        if body.stream:
            return _EventStream(
                answer, body, "chat.completion.chunk", _delta, opening={"role": "assistant", "content": ""}
            )
        text, finish, usage = await _whole(request, answer)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None}
        return answer.response({"object": "chat.completion", "choices": [choice | {"finish_reason": finish}]}, usage)

    @routes.post("/v1/completions", responses=answers(schemas.Completion, schemas.Completion))
    async def completions(body: schemas.CompletionRequest, request: Request, key: Caller) -> Response:
        """Continue a text for a user."""
        answer = await _begin(services, body, services.prompt(body.text()), request, key, "cmpl")
        if body.stream:
            return _EventStream(answer, body, "text_completion", _text)
        text, finish, usage = await _whole(request, answer)
        return answer.response({"object": "text_completion", "choices": [_text(text, finish)]}, usage)

    return routes


@dataclass
class _Usage:
    """Token counts of prompt and answer."""

    read: int = 0
    written: int = 0

    def add(self, piece: Chunk) -> None:
        self.read, self.written = piece.prompt_tokens, self.written + piece.tokens

    def told(self) -> dict[str, int]:
        total = self.read + self.written
        return {"prompt_tokens": self.read, "completion_tokens": self.written, "total_tokens": total}


@dataclass
class _Answer:
    """A running answer.

    Attributes:
        ticket: Where its pieces come from.
        base: Common fields of all response objects.
        on_first: Called at the first chunk.
    """

    ticket: PendingRequest
    base: dict[str, Any]
    on_first: Callable[[], None]

    @property
    def headers(self) -> dict[str, str]:
        return {_HEADER: self.base["personalization"]["status"]}

    def response(self, content: dict[str, Any], usage: dict[str, int]) -> Response:
        text = json.dumps(self.base | content | {"usage": usage}, ensure_ascii=False)
        return Response(text, media_type="application/json", headers=self.headers)

    async def whole(self) -> tuple[str, str | None, dict[str, int]]:
        texts: list[str] = []
        usage, finish = _Usage(), None
        async for piece in self.ticket:
            if not texts:
                self.on_first()
            texts.append(piece.text)
            usage.add(piece)
            finish = piece.finish_reason
        return "".join(texts), finish, usage.told()


async def _begin(services: Services, body: Body, prompt: Prompt, request: Request, key: APIKey, kind: str) -> _Answer:
    """Return the answer once the engine has accepted the request, or raise an error."""
    if body.model != services.writer.name:
        message = "There is no such model here; /v1/models names the one that there is."
        raise APIError(404, message, "model_not_found", "model")
    if body.stream_options is not None and not body.stream:
        message = "stream_options: it is for streams; leave it out, or set stream to true."
        raise APIError(400, message, "contradictory_parameters", "stream_options")
    services.check_conversation(prompt, "messages")
    whom = list(body.blend or ([] if body.user is None else [body.user]))
    check_users(key, whom, "blend" if body.blend else "user")
    unknown = [user for user in whom if services.rename(user) not in services.writer.vocabulary]
    if unknown:
        services.metrics.unknown_users.inc(len(unknown))
    status = "blend" if body.blend else "none" if not whom else "unknown" if unknown else "known"
    started, most = time.monotonic(), services.limits.max_tokens
    try:
        generation = GenerationRequest(
            prompt=prompt,
            user=_named(body, services.rename),
            user_text=body.user_text or "",
            strength=body.strength,
            max_new_tokens=min([most, *body.limits()]),
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            stop=body.stops(),
            chat_template=body.chat_template if isinstance(body, schemas.CompletionRequest) else None,
            continue_final_message=isinstance(body, schemas.ChatRequest) and bool(body.continue_final_message),
        )
        ticket = await _unless_gone(request, services.scheduler.submit(generation, caller_of(request)))
    except Overloaded:
        raise APIError(429, "The server is busy; try again later.", "overloaded", retry_after=2) from None
    except (Closing, EngineFailed) as error:
        raise _cut_off(error) from None
    except PromptTooLongError as error:
        param = "messages" if isinstance(body, schemas.ChatRequest) else "prompt"
        raise APIError(400, str(error), "context_length_exceeded", param) from error
    except PRLHFError as error:
        named = error.field if error.field in type(body).model_fields else None
        raise APIError(400, str(error), "refused", named) from error
    base = {
        "id": f"{kind}-{uuid4().hex}",
        "created": int(time.time()),
        "model": body.model,
        "personalization": {"status": status, "unknown_users": unknown},
    }
    metrics = services.metrics
    return _Answer(ticket, base, lambda: metrics.first_token_seconds.observe(time.monotonic() - started))


def _check_last_message(body: schemas.ChatRequest) -> None:
    """Refuse to generate a second consecutive assistant turn."""
    ends_with_answer = body.messages[-1].role == "assistant"
    goes_on = bool(body.continue_final_message)
    if goes_on and body.add_generation_prompt:
        message = "add_generation_prompt: it must be false, or left out, where continue_final_message is true."
        raise APIError(400, message, "contradictory_parameters", "add_generation_prompt")
    if body.add_generation_prompt is False and not goes_on:
        message = "add_generation_prompt: false is for continue_final_message: true, which goes on with an answer."
        raise APIError(400, message, "contradictory_parameters", "add_generation_prompt")
    if ends_with_answer and not goes_on:
        message = (
            "messages: the last message is the assistant's; end with a message of the user, or set "
            "continue_final_message to true to go on with it."
        )
        raise APIError(400, message, "prompt_ends_with_answer", "messages")
    if goes_on and not ends_with_answer:
        message = "continue_final_message: the last message must be the assistant's, which it goes on with."
        raise APIError(400, message, "contradictory_parameters", "continue_final_message")


def _named(body: Body, rename: Callable[[str], str]) -> str | dict[str, float] | None:
    """Return a request's user under the model's id, or its blend with shares that sum to 1."""
    if not body.blend:
        return None if body.user is None else rename(body.user)
    total = math.fsum(body.blend.values())
    return {rename(user): share / total for user, share in body.blend.items()}


async def _whole(request: Request, answer: _Answer) -> tuple[str, str | None, dict[str, int]]:
    """Return the whole answer; stop generating if the client disconnects."""
    try:
        return await _unless_gone(request, answer.whole())
    except (Closing, EngineFailed) as error:
        raise _cut_off(error) from None
    finally:
        answer.ticket.cancel()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine, or cancel it if the client disconnects."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise APIError(400, "The client has left.", "client_left")  # nobody reads this
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _cut_off(error: Closing | EngineFailed) -> APIError:
    if isinstance(error, Closing):
        return APIError(503, "The server is shutting down.", "closing", retry_after=5)
    return APIError(500, "The model failed while it wrote this answer; try again.", "engine_failed")


def _delta(text: str, finish: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}


def _text(text: str, finish: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}


class _EventStream(StreamingResponse):
    """An answer as server-sent events. Generation stops when the client disconnects."""

    def __init__(
        self,
        answer: _Answer,
        body: Body,
        kind: str,
        choice: Callable[[str, str | None], dict[str, Any]],
        opening: dict[str, str] | None = None,
    ) -> None:
        headers = answer.headers | {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(self._events(), media_type="text/event-stream", headers=headers)
        self._answer, self._choice, self._opening = answer, choice, opening
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._base = answer.base | {"object": kind} | ({"usage": None} if self._with_usage else {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.ticket.cancel()

    async def _events(self) -> AsyncIterator[str]:
        usage, first = _Usage(), True
        if self._opening:
            yield self._event(choices=[self._choice("", None) | {"delta": self._opening}])
        try:
            async for piece in self._answer.ticket:
                if first:
                    self._answer.on_first()
                first = False
                usage.add(piece)
                if piece.text or piece.finish_reason:
                    yield self._event(choices=[self._choice(piece.text, piece.finish_reason)])
        except (Closing, EngineFailed) as error:
            yield f"data: {_cut_off(error).body.model_dump_json()}\n\n"
            return
        if self._with_usage:
            yield self._event(choices=[], usage=usage.told())
        yield "data: [DONE]\n\n"

    def _event(self, **content: Any) -> str:
        return f"data: {json.dumps(self._base | content, ensure_ascii=False)}\n\n"
