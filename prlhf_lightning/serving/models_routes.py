"""Routes for the model, its users, health and the demo page."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import FileResponse, PlainTextResponse, Response

from prlhf_lightning.data.feedback_log import FeedbackLogError
from prlhf_lightning.serving import schemas
from prlhf_lightning.serving.auth import APIKey, Caller
from prlhf_lightning.serving.errors import APIError, documented
from prlhf_lightning.serving.metrics import CONTENT_TYPE
from prlhf_lightning.serving.services import Services


class UserDirectory:
    """The sorted ids of users, for prefix search."""

    def __init__(self) -> None:
        self._given, self._sorted = tuple[str, ...](), list[str]()

    def find(self, ids: tuple[str, ...], prefix: str, key: APIKey) -> Iterator[str]:
        """Yield the ids with a prefix that the key may act for, without a scan of all ids."""
        if ids is not self._given:  # first call, or a new user was learned
            self._sorted, self._given = sorted(ids), ids
        found, begins = self._sorted, max(prefix, key.prefix, key=len)
        for place in range(bisect_left(found, begins), len(found)):
            user = found[place]
            if not user.startswith(begins):
                return
            if user.startswith(prefix) and key.may_act_for(user):
                yield user


def models_router(services: Services) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["catalog"])
    directory = UserDirectory()
    names = [services.writer.name, *([services.ranker.name] if services.ranker is not None else [])]
    served = [schemas.Model(id=name, created=services.started) for name in names]

    @routes.get("/v1/models", responses=documented(401, 429, 500))
    async def models(key: Caller) -> schemas.ModelList:
        """List the served model, and the reward model if there is one."""
        return schemas.ModelList(data=served)

    @routes.get("/v1/models/{name:path}", responses=documented(401, 404, 429, 500))
    async def one_model(name: str, key: Caller) -> schemas.Model:
        """Describe a model."""
        for model in served:
            if name == model.id:
                return model
        raise APIError(404, "There is no such model here.", "model_not_found", "name")

    @routes.get("/v1/users", responses=documented(400, 401, 429, 500))
    def users(  # not async: a thread sorts what may be a million ids
        key: Caller, asked: Annotated[schemas.UserQuery, Query()]
    ) -> schemas.UserList:
        """List known users that the caller may act for, sorted by id.

        The list is empty if the model knows users by pseudonyms, which do not reveal the ids.
        """
        known = services.writer.vocabulary.ids if services.rename is str else ()
        found = directory.find(known, asked.prefix, key)
        listed = list(islice(found, asked.limit + 1))
        data = [schemas.User(id=user) for user in listed[: asked.limit]]
        return schemas.UserList(data=data, has_more=len(listed) > asked.limit)

    return routes


def operations_router(services: Services) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["operations"])

    @routes.get("/healthz", responses=documented(500))
    async def health() -> schemas.Health:
        """Report that the process responds."""
        return schemas.Health()

    @routes.get("/readyz", responses=documented(500, 503))
    async def ready() -> schemas.Health:
        """Report whether the model can generate and feedback can be stored."""
        if not services.scheduler.well:
            raise APIError(503, "The model can't write now.", "engine_unwell", retry_after=5)
        if services.log is not None:
            try:
                await services.check_log(services.log)
            except FeedbackLogError as error:
                raise APIError(503, "The feedback log can't be used now.", "log_unavailable", retry_after=5) from error
        return schemas.Health()

    @routes.get(
        "/metrics",
        response_class=PlainTextResponse,
        responses={200: {"description": "Prometheus' text format."}, **documented(500)},
    )
    async def metrics() -> Response:
        """Return counts and times for Prometheus."""
        return Response(services.metrics.render(), headers={"content-type": CONTENT_TYPE})

    return routes


FOLDER = Path(__file__).parent / "static"
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def demo_router() -> APIRouter:
    """Return the route of the page; its script and style are static files."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    async def page() -> FileResponse:
        return FileResponse(FOLDER / "index.html", headers=_HEADERS)

    return routes
