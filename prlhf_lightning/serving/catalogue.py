"""Routes that tell what there is: the model, and the users whom it knows."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Query

from prlhf_lightning.serving import schemas
from prlhf_lightning.serving.access import Caller
from prlhf_lightning.serving.api_errors import APIError, documented
from prlhf_lightning.serving.services import Services


def router(services: Services) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["catalogue"])
    model = schemas.Model(id=services.writer.name, created=services.started)

    @routes.get("/v1/models", responses=documented(401, 429, 500))
    async def models(key: Caller) -> schemas.ModelList:
        """List the model that is served."""
        return schemas.ModelList(data=[model])

    @routes.get("/v1/models/{name:path}", responses=documented(401, 404, 429, 500))
    async def one_model(name: str, key: Caller) -> schemas.Model:
        """Describe the model."""
        if name != model.id:
            raise APIError(404, "There is no such model here.", "model_not_found", "name")
        return model

    @routes.get("/v1/users", responses=documented(400, 401, 429, 500))
    def users(  # not async: a thread looks through what may be a million ids
        key: Caller, asked: Annotated[schemas.UserQuery, Query()]
    ) -> schemas.UserList:
        """List users whom the model knows and the caller may write for."""
        found = (
            user for user in services.writer.vocabulary.ids if user.startswith(asked.prefix) and key.may_act_for(user)
        )
        listed = list(islice(found, asked.limit + 1))
        data = [schemas.User(id=user) for user in listed[: asked.limit]]
        return schemas.UserList(data=data, has_more=len(listed) > asked.limit)

    return routes
