"""The HTTP interface: OpenAI's paths, health and metrics."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from peftcore.serving.call import Call, ClientGoneError, unless_gone
from peftcore.serving.errors import BadRequestError, ServingError
from peftcore.serving.guard import CLIENT_GONE, Guard
from peftcore.serving.protocol import ChatRequest, CompletionRequest, GenerationRequest, refusal
from peftcore.serving.service import Service


def make_app(service: Service) -> FastAPI:
    """The application; the engine runs as long as it does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await asyncio.to_thread(service.engine.stop)

    # no generated documentation: it would be open to anybody, and its page loads scripts from other hosts
    app = FastAPI(title="peftcore", lifespan=lifespan, openapi_url=None)
    app.add_middleware(
        Guard,
        engine=service.engine,
        metrics=service.metrics,
        keys=service.keys,
        max_body=service.limits.max_body,
    )
    _add_errors(app)
    _add_models(app, service)
    _add_health(app, service)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, given: ChatRequest) -> Response:
        return await _answer(service, request, given)

    @app.post("/v1/completions")
    async def complete(request: Request, given: CompletionRequest) -> Response:
        return await _answer(service, request, given)

    return app


async def _answer(service: Service, request: Request, given: GenerationRequest) -> Response:
    service.catalog.require(given.model)
    request.state.model = given.model
    prompt = await asyncio.to_thread(given.prompt_tokens, service.tokenizer)
    call = Call(lambda sink: service.generation(given, prompt, sink), service.limits.timeout)
    request.state.call = call
    if not given.stream:
        return JSONResponse(await unless_gone(request, call.whole(given)))
    first = await unless_gone(request, call.next())  # an error that comes before it has a status of its own
    return StreamingResponse(call.stream(given, first), media_type="text/event-stream")


def _add_models(app: FastAPI, service: Service) -> None:
    def described(name: str) -> dict[str, Any]:
        kind = "base" if name == service.catalog.base else "adapter"
        kind = "composition" if name in service.catalog.compositions else kind
        return {"id": name, "object": "model", "created": 0, "owned_by": "peftcore", "kind": kind}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in service.catalog.names()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.catalog.require(name)
        return described(name)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        return _status(service.engine.alive, "the engine runs", "the engine has ended; start the server anew")

    @app.get("/ready")
    async def ready() -> Response:
        takes = service.engine.alive and not service.engine.draining
        return _status(takes, "ready", "shutting down", dict(service.warnings))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _status(good: bool, said: str, otherwise: str, warnings: dict[str, str] | None = None) -> Response:
    body: dict[str, Any] = {"status": said if good else otherwise}
    if warnings:
        body["warnings"] = warnings
    return JSONResponse(body, 200 if good else 503)


def _add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(ServingError)
    async def refused(_: Request, error: ServingError) -> Response:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return JSONResponse(refusal(error.errors()).body(), BadRequestError.status)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        return JSONResponse(BadRequestError(str(error.detail)).body(), error.status_code)

    @app.exception_handler(ClientGoneError)
    async def gone(_: Request, __: ClientGoneError) -> Response:
        return Response(status_code=CLIENT_GONE)
