"""The route that ranks documents for a user by a reward model, in the form of Cohere's, Jina's and vLLM's rerankers."""

from __future__ import annotations

from typing import Literal
from uuid import uuid4

from fastapi import APIRouter

from prlhf_lightning.errors import ConfigurationError
from prlhf_lightning.serving import schemas
from prlhf_lightning.serving.auth import Caller, check_users
from prlhf_lightning.serving.errors import APIError, documented
from prlhf_lightning.serving.services import Prompt, Ranker, Services


def rerank_router(services: Services, ranker: Ranker) -> APIRouter:
    """Return the route."""
    routes = APIRouter(tags=["ranking"])

    @routes.post(
        "/v1/rerank",
        responses=documented(400, 401, 403, 404, 408, 413, 429, 500),
        response_model_exclude_none=True,
    )
    async def rerank(body: schemas.RerankRequest, key: Caller) -> schemas.Reranking:
        """Rank candidate answers to a query for a user, best first."""
        if body.model not in (None, ranker.name):
            message = "There is no such reward model here; /v1/models names the one that there is."
            raise APIError(404, message, "model_not_found", "model")
        whom = [] if body.user is None else [body.user]
        check_users(key, whom, "user")
        user = services.rename(body.user) if body.user is not None else ""
        is_known = ranker.scorer.knows(user)
        if whom and not is_known:
            services.metrics.unknown_users.inc()
        query, texts = _query(services, body), [body.text(number) for number in range(len(body.documents))]
        for text in texts:
            services.check_size("documents", text)
        try:
            scored = await ranker.score(user, query, texts, body.user_text or "", services.limits.max_open)
        except ConfigurationError as error:
            raise APIError(400, str(error), "cannot_rank", "query") from error
        for number, problem in scored.problems.items():
            raise APIError(400, f"documents.{number} has no reward: {problem}.", "cannot_rank", f"documents.{number}")
        services.metrics.ranked_documents.inc(len(texts))
        order = sorted(range(len(texts)), key=lambda number: -float(scored.rewards[number]))
        results = [
            schemas.RankedDocument(
                index=number,
                relevance_score=float(scored.rewards[number]),
                document=schemas.RerankDocument(text=texts[number]) if body.return_documents else None,
            )
            for number in order[: body.top_n]
        ]
        status: Literal["known", "unknown", "none"] = "none" if not whom else "known" if is_known else "unknown"
        return schemas.Reranking(
            id=f"rerank-{uuid4().hex}",
            model=ranker.name,
            results=results,
            usage=schemas.RerankUsage(prompt_tokens=scored.tokens, total_tokens=scored.tokens),
            personalization=schemas.Personalization(status=status, unknown_users=[] if is_known else whom),
        )

    return routes


def _query(services: Services, body: schemas.RerankRequest) -> Prompt:
    """Return the query as a prompt, after checking its form and size."""
    if isinstance(body.query, str):
        services.check_size("query", body.query)
        return body.query
    turns = [message.plain() for message in body.query]
    if turns[-1]["role"] == "assistant":
        message = "The query ends with an answer; give that as a document."
        raise APIError(400, message, "prompt_ends_with_answer", "query")
    services.check_size("query", *(turn["content"] for turn in turns))
    return turns
