"""The route that takes feedback."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Response

from prlhf_lightning.feedback_log import ConflictError, Feedback, FeedbackLog, FeedbackLogError
from prlhf_lightning.serving import schemas
from prlhf_lightning.serving.access import Caller, check_users
from prlhf_lightning.serving.api_errors import APIError, documented
from prlhf_lightning.serving.services import Services


def router(services: Services, log: FeedbackLog) -> APIRouter:
    """Return the route."""
    routes = APIRouter(tags=["feedback"])
    repeated: dict[str, Any] = {"model": schemas.FeedbackReceipt, "description": "It had been written down before."}

    @routes.post(
        "/v1/feedback",
        status_code=201,
        responses={200: repeated, **documented(400, 401, 403, 408, 409, 413, 429, 500, 503)},
    )
    async def give_feedback(body: schemas.AnyFeedback, response: Response, key: Caller) -> schemas.FeedbackReceipt:
        """Write down which of two answers a user found better, or whether one was good.

        Once this is answered, the feedback is on disk.
        """
        check_users(key, [body.user], "user")
        given = body.prompt if isinstance(body.prompt, str) else [message.plain() for message in body.prompt]
        if not isinstance(given, str) and given[-1]["role"] == "assistant":
            message = "The prompt ends with an answer; give that as chosen, rejected or completion."
            raise APIError(400, message, "prompt_ends_with_answer", "prompt")
        prompt = services.prompt(given)
        services.check_conversation(prompt, "prompt")  # training would stop at it
        judgement = _judgement(body)
        for name, text in judgement.items():
            if isinstance(text, str):
                services.check_size(name, text)
        feedback = Feedback(
            source=key.name,
            id=body.id or uuid4().hex,
            received=time.time(),
            user_id=body.user,
            prompt=prompt,
            user_text=body.user_text,
            **judgement,
        )
        try:
            new = await services.use_log(log.append, feedback)
        except ConflictError as error:
            raise APIError(409, str(error), "id_in_use", "id") from error
        except FeedbackLogError as error:
            message = "Feedback can't be written down now; try again later."
            raise APIError(503, message, "log_unavailable", retry_after=5) from error
        if new:
            services.metrics.count("prlhf_feedback_total", kind="pair" if feedback.chosen else "thumb")
        response.status_code = 201 if new else 200
        return schemas.FeedbackReceipt(id=feedback.id, duplicate=not new)

    return routes


def _judgement(body: schemas.AnyFeedback) -> dict[str, Any]:
    if isinstance(body, schemas.PairFeedback):
        return {"chosen": body.chosen, "rejected": body.rejected}
    return {"completion": body.completion, "liked": body.label in ("up", True)}
