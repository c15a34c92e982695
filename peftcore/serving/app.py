"""HTTP API: OpenAI's endpoints, vLLM's for loading adapters, health, readiness and metrics."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from peftcore.serving.errors import BadRequestError, NotAllowedError, ServingError
from peftcore.serving.middleware import CLIENT_GONE, AccessMiddleware
from peftcore.serving.own_thread import in_own_thread
from peftcore.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    FeedbackRequest,
    GenerationRequest,
    LoadRequest,
    UnloadRequest,
    refusal,
)
from peftcore.serving.response import ClientGoneError, PendingResponse, unless_disconnected
from peftcore.serving.service import Service

NO_RECORD = "x-no-record"
"""Header of requests that must not be recorded, such as `x-no-record: true`."""


def make_app(service: Service) -> FastAPI:
    """Return the ASGI application; the engine starts and stops with the application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await asyncio.to_thread(service.engine.stop)

    # no generated API documentation: it needs no key, and its page loads scripts from other hosts
    app = FastAPI(title="peftcore", lifespan=lifespan, openapi_url=None)
    app.add_middleware(
        AccessMiddleware,
        engine=service.engine,
        metrics=service.metrics,
        keys=service.keys,
        max_body=service.limits.max_body,
    )
    _add_errors(app)
    _add_models(app, service)
    _add_loading(app, service)
    _add_feedback(app, service)
    _add_health(app, service)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await _answer(service, request, body)

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionRequest) -> Response:
        return await _answer(service, request, body)

    return app


def make_monitoring_app(service: Service) -> FastAPI:
    """Return the ASGI application of a port for monitoring alone: /health, /ready and /metrics, without a key."""
    app = FastAPI(title="peftcore monitoring", openapi_url=None)
    _add_errors(app)
    _add_health(app, service)
    return app


async def _answer(service: Service, request: Request, body: GenerationRequest) -> Response:
    service.catalog.require(body.model)
    request.state.model = body.model
    calling = body.tool_calling(service.tokenizer, service.tool_format)
    prompt = await asyncio.to_thread(body.prompt_tokens, service.tokenizer)
    grammar = await service.grammar(body, calling)
    response = PendingResponse(
        lambda index, sink: service.generation(body, prompt, index, sink, grammar, calling),
        service.limits.timeout,
        body.n or 1,
        None if calling is None else calling.stream,
    )
    request.state.response = response
    record = _record_function(service, request, body, response)
    if not body.stream:
        answer = await unless_disconnected(request, response.complete(body, service.tokenizer))
        if record is not None:
            record(answer["id"])
        return JSONResponse(answer)
    # an error before the first chunk is sent with its own HTTP status
    first = await unless_disconnected(request, response.next())
    return StreamingResponse(response.stream(body, service.tokenizer, first, record), media_type="text/event-stream")


def _record_function(
    service: Service, request: Request, body: GenerationRequest, response: PendingResponse
) -> Callable[[str], None] | None:
    """Return a function of a complete response's id that records it; None if it is not to be recorded."""
    recorder = service.recorder
    if recorder is None or request.headers.get(NO_RECORD, "false").strip().lower() not in ("0", "false", "no"):
        return None

    def record(identity: str) -> None:
        versions = {generation.version or service.catalog.base for generation in response.generations}
        recorder.answer(
            {
                "id": identity,
                "model": body.model,
                "version": "+".join(sorted(versions)),  # several if it was replaced between two completions
                "user": body.user,
                **body.prompt_record(service.tokenizer),
                "choices": response.answers,
            }
        )

    return record


def _add_feedback(app: FastAPI, service: Service) -> None:
    @app.post("/v1/feedback")
    async def rate(body: FeedbackRequest) -> dict[str, Any]:
        if service.recorder is None:
            raise NotAllowedError("this server records no feedback; start it with --record FOLDER")
        rating = {"rating": body.score, "correction": body.correction, "comment": body.comment, "user": body.user}
        written = service.recorder.rating({"id": body.id, "index": body.index, **rating})
        await asyncio.wrap_future(written)
        return {"id": body.id, "index": body.index, "object": "feedback", "recorded": True}


def _add_models(app: FastAPI, service: Service) -> None:
    def described(name: str) -> dict[str, Any]:
        kind = "base" if name == service.catalog.base else "adapter"
        kind = "composition" if name in service.catalog.compositions else kind
        parent = None if kind == "base" else service.catalog.base
        of_vllm = {"root": name, "parent": parent, "max_model_len": service.context}
        return {"id": name, "object": "model", "created": 0, "owned_by": "peftcore", "kind": kind, **of_vllm}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in service.catalog.names()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.catalog.require(name)
        return described(name)


def _add_loading(app: FastAPI, service: Service) -> None:
    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadRequest) -> Response:
        await asyncio.wrap_future(in_own_thread(service.load_adapter, body))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadRequest) -> Response:
        await asyncio.to_thread(service.unload_adapter, body)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        return _status(service.engine.alive, "ok", "the engine has stopped; restart the server")

    @app.get("/ready")
    async def ready() -> Response:
        takes = service.engine.alive and not service.engine.draining
        return _status(takes, "ready", "shutting down", dict(service.warnings))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _status(good: bool, good_status: str, bad_status: str, warnings: dict[str, str] | None = None) -> Response:
    body: dict[str, Any] = {"status": good_status if good else bad_status}
    if warnings:
        body["warnings"] = warnings
    return JSONResponse(body, 200 if good else 503)


def _add_errors(app: FastAPI) -> None:
    """Return every error as an error object of OpenAI's API."""

    @app.exception_handler(ServingError)
    async def refused(_: Request, error: ServingError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return JSONResponse(refusal(error.errors()).body(), BadRequestError.status)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        return JSONResponse(BadRequestError(str(error.detail)).body(), error.status_code, error.headers)

    @app.exception_handler(ClientGoneError)
    async def gone(_: Request, __: ClientGoneError) -> Response:
        return Response(status_code=CLIENT_GONE)
