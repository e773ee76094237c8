"""Routes for those who run the server: is it alive, is it ready, what has it done."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from prlhf_lightning.feedback_log import FeedbackLogError
from prlhf_lightning.serving import schemas
from prlhf_lightning.serving.api_errors import APIError, documented
from prlhf_lightning.serving.metrics import CONTENT_TYPE
from prlhf_lightning.serving.services import Services


def router(services: Services) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["operations"])

    @routes.get("/healthz", responses=documented(500))
    async def health() -> schemas.Health:
        """Say that the process answers."""
        return schemas.Health()

    @routes.get("/readyz", responses=documented(500, 503))
    async def ready() -> schemas.Health:
        """Say whether the model can write and feedback can be written down."""
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
