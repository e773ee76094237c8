"""The web application: routes, middleware, and lifespan."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

import prlhf_lightning
from prlhf_lightning.serving import errors
from prlhf_lightning.serving.auth import RateLimiter
from prlhf_lightning.serving.completions import completions_router
from prlhf_lightning.serving.feedback_routes import adapt_router, feedback_router
from prlhf_lightning.serving.middleware import AccessLog, AuthMiddleware, BodyLimit, HostCheck
from prlhf_lightning.serving.models_routes import FOLDER, demo_router, models_router, operations_router
from prlhf_lightning.serving.rerank_routes import rerank_router
from prlhf_lightning.serving.services import Services


def create_app(services: Services) -> FastAPI:
    """Return the application of a server; the engine runs during its lifespan."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        services.scheduler.start()
        yield
        await services.scheduler.drain()
        if services.log is not None:
            services.log.close()

    app = _App(
        title="prlhf-lightning",
        version=prlhf_lightning.__version__,
        description="Writes for each user as that user likes it. Compatible with OpenAI's API.",
        lifespan=life,
        docs_url=None,  # those pages load scripts from other hosts
        redoc_url=None,
    )
    app.services = services
    errors.install(app)
    for make in (completions_router, models_router, operations_router):
        app.include_router(make(services))
    if services.log is not None:
        app.include_router(feedback_router(services, services.log))
        if services.learner is not None:
            app.include_router(adapt_router(services, services.log, services.learner))
    if services.ranker is not None:
        app.include_router(rerank_router(services, services.ranker))
    app.include_router(demo_router())
    app.mount("/static", StaticFiles(directory=FOLDER))
    # The last one sees a request first.
    app.add_middleware(BodyLimit, most=services.limits.max_body, seconds=services.limits.read_seconds)
    limiter = RateLimiter(services.limits.requests_per_minute, services.limits.burst)
    app.add_middleware(AuthMiddleware, keys=services.keys, limiter=limiter)
    app.add_middleware(HostCheck, names=services.hosts)
    app.add_middleware(AccessLog, metrics=services.metrics)
    return app


class _App(FastAPI):
    """A FastAPI application with an exact OpenAPI document."""

    services: Services

    def openapi(self) -> dict[str, Any]:
        """Return the document, with the model's name, keys if any, and without errors that are never sent."""
        document = super().openapi()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
                if not self.services.keys:
                    operation.pop("security", None)
        schemas = document["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for name in ("ChatRequest", "CompletionRequest"):
            schemas[name]["properties"]["model"]["enum"] = [self.services.writer.name]
        return document
