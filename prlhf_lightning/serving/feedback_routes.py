"""Routes for feedback and for learning new users."""

from __future__ import annotations

import json
import time
from functools import partial
from itertools import accumulate, takewhile
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from prlhf_lightning.data.feedback_log import ConflictError, Feedback, FeedbackLog, FeedbackLogError
from prlhf_lightning.errors import ConfigurationError, PRLHFError
from prlhf_lightning.serving import schemas
from prlhf_lightning.serving.auth import Caller, caller_of, check_users
from prlhf_lightning.serving.errors import APIError, documented
from prlhf_lightning.serving.scheduler import Closing, EngineFailed, Overloaded
from prlhf_lightning.serving.services import Learner, Services


def feedback_router(services: Services, log: FeedbackLog) -> APIRouter:
    """Return the route."""
    routes = APIRouter(tags=["feedback"])
    repeated: dict[str, Any] = {"model": schemas.FeedbackReceipt, "description": "It had been written down before."}

    @routes.post(
        "/v1/feedback",
        status_code=201,
        responses={200: repeated, **documented(400, 401, 403, 408, 409, 413, 429, 500, 503)},
    )
    async def give_feedback(body: schemas.AnyFeedback, response: Response, key: Caller) -> schemas.FeedbackReceipt:
        """Store which of two answers a user preferred, or whether one was good.

        When the response arrives, the feedback is on disk.
        """
        check_users(key, [body.user], "user")
        given = body.prompt if isinstance(body.prompt, str) else [message.plain() for message in body.prompt]
        if not isinstance(given, str) and given[-1]["role"] == "assistant":
            message = "The prompt ends with an answer; give that as chosen, rejected or completion."
            raise APIError(400, message, "prompt_ends_with_answer", "prompt")
        prompt = services.prompt(given)
        services.check_conversation(prompt, "prompt")  # training would stop at it
        judgment = _judgement(body)
        for name, text in judgment.items():
            if isinstance(text, str):
                services.check_size(name, text)
        feedback = Feedback(
            source=key.name,
            id=body.id or uuid4().hex,
            received=time.time(),
            user_id=body.user,
            prompt=prompt,
            user_text=body.user_text,
            **judgment,
        )
        try:
            new = await services.use_log(log.append, feedback)
        except ConflictError as error:
            raise APIError(409, str(error), "id_in_use", "id") from error
        except FeedbackLogError as error:
            message = "Feedback can't be written down now; try again later."
            raise APIError(503, message, "log_unavailable", retry_after=5) from error
        if new:
            services.metrics.feedback.labels("pair" if feedback.chosen else "thumb").inc()
        response.status_code = 201 if new else 200
        return schemas.FeedbackReceipt(id=feedback.id, duplicate=not new)

    return routes


def _judgement(body: schemas.AnyFeedback) -> dict[str, Any]:
    if isinstance(body, schemas.PairFeedback):
        return {"chosen": body.chosen, "rejected": body.rejected}
    return {"completion": body.completion, "liked": body.label in ("up", True)}


# Of the newest pairs; writing goes on between the passes in which a user is learned, and slower than else.
_MOST_PAIRS, _MOST_CHARACTERS = 200, 500_000


def adapt_router(services: Services, log: FeedbackLog, learner: Learner) -> APIRouter:
    """Return the route."""
    routes = APIRouter(tags=["feedback"])
    trained = len(services.writer.vocabulary)

    def learn(user: str, rows: list[dict[str, Any]]) -> None:
        """Learn a user, in the engine's thread, where nobody else is learned meanwhile."""
        known, most = services.writer.vocabulary, services.limits.max_learned
        if user not in known and len(known) - trained >= most:
            raise ConfigurationError(
                f"This server has learned as many users as it keeps (max_learned is {most}); add users to the model "
                "itself with the command adapt."
            )
        learner(user, rows, services.scheduler.go_on)

    @routes.post("/v1/adapt", responses=documented(400, 401, 403, 408, 409, 413, 429, 500, 503))
    async def adapt(body: schemas.LearnRequest, request: Request, key: Caller) -> schemas.Learned:
        """Learn a user who was not in training from the pairs in the feedback log; each call learns again."""
        check_users(key, [body.user], "user")
        try:
            rows = await services.use_log(lambda: _newest(log.newest_pairs(body.user, _MOST_PAIRS)))
            if not rows:
                raise APIError(409, "There are no pairs of this user yet.", "no_pairs", "user")
            learning = partial(learn, services.rename(body.user), rows)
            await services.scheduler.call(learning, caller_of(request))
        except FeedbackLogError as error:
            raise APIError(503, "The feedback log can't be read now.", "log_unavailable", retry_after=5) from error
        except PRLHFError as error:
            raise APIError(409, str(error), "cannot_learn", "user") from error
        except Overloaded:
            raise APIError(429, "Others are being learned; try again later.", "overloaded", retry_after=2) from None
        except Closing:
            raise APIError(503, "The server is shutting down.", "closing", retry_after=5) from None
        except EngineFailed:
            raise APIError(500, "Learning failed; the log says where.", "engine_failed") from None
        return schemas.Learned(user=body.user, pairs=len(rows))

    return routes


def _newest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last rows up to a total number of characters, at least one."""
    sizes = accumulate(len(json.dumps(row, ensure_ascii=False)) for row in reversed(rows))
    kept = sum(1 for _ in takewhile(lambda size: size <= _MOST_CHARACTERS, sizes))
    return rows[-max(1, kept) :] if rows else []
