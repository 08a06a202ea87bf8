"""The web application: OpenAI's endpoints over a scheduler, and a chat page."""

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from model.errors import InputError
from runtime.serving.embeddings import embeddings_reply, read_embeddings
from runtime.serving.jobs import RESTARTED, Jobs
from runtime.serving.metrics import CONTENT_TYPE, metrics
from runtime.serving.openai_reply import Reply
from runtime.serving.openai_request import CompletionRequest, read_chat, read_completion
from runtime.serving.page import FILES, page_routes
from runtime.serving.request_body import RequestError
from runtime.serving.responses import ResponseReply, read_response
from runtime.serving.scheduler import ClosedError, Scheduler
from runtime.serving.served_model import Access, Model
from runtime.serving.tokens import detokenized, tokenized
from runtime.text.generation import Step

AnyRequest = TypeVar("AnyRequest", bound=CompletionRequest)

RETRY_AFTER = "1"
"""Value of the Retry-After header, in seconds, if the queue is full."""

OPEN = frozenset({"/health", *FILES})
"""Paths that need no key."""

_PAGES: dict[str, Any] = {
    "allow_origin_regex": r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?",
    "allow_methods": ["GET", "POST"],
    "allow_headers": ["*"],
}
"""CORS settings: in a browser only pages from this machine may send requests, so that no website can use the server
unless it was allowed by its origin.
"""


def create_app(model: Model, scheduler: Scheduler, access: Access) -> Starlette:
    """Returns the application. The caller must close the scheduler."""
    service = _Service(model, scheduler, access)
    routes = [
        *page_routes(),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
        Route("/tokenize", service.tokenize, methods=["POST"]),
        Route("/detokenize", service.detokenize, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.model),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/responses", service.responses, methods=["POST"]),
        Route("/v1/embeddings", service.embeddings, methods=["POST"]),
    ]
    handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
        RequestError: _refused,
        HTTPException: _no_such_endpoint,
        ClientDisconnect: _nobody_listens,
        Exception: _failed,
    }
    cors = Middleware(CORSMiddleware, allow_origins=access.origins, **_PAGES)
    return Starlette(
        routes=routes, exception_handlers=handlers, middleware=[cors, Middleware(_KeyCheck, access.api_key)]
    )


class _EventStream(StreamingResponse):
    """A stream of server-sent events; its jobs are cancelled when it ends for any reason."""

    def __init__(self, events: AsyncIterator[str], jobs: Jobs) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._jobs.cancel()


class _Service:
    """The endpoints."""

    def __init__(self, model: Model, scheduler: Scheduler, access: Access) -> None:
        self._model, self._scheduler, self._access = model, scheduler, access

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", **self._scheduler.counts})

    async def metrics(self, request: Request) -> Response:
        return Response(metrics(self._scheduler), media_type=CONTENT_TYPE)

    async def tokenize(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(tokenized, await self._body(request), self._model))

    async def detokenize(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(detokenized, await self._body(request), self._model))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        if (name := request.path_params["name"]) != self._model.name:
            raise RequestError(
                404, f"the model {name!r} is not served; give {self._model.name!r}", "model", "model_not_found"
            )
        return JSONResponse(self._described())

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, read_completion, Reply)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, read_chat, Reply)

    async def responses(self, request: Request) -> Response:
        return await self._answer(request, read_response, ResponseReply)

    async def embeddings(self, request: Request) -> Response:
        embeddings, body = await run_in_threadpool(read_embeddings, await self._body(request), self._model)
        jobs = Jobs(embeddings, self._scheduler)
        await _run(request, jobs, lambda number, step: None)
        return JSONResponse(embeddings_reply(embeddings, body, self._model, jobs))

    def _described(self) -> dict[str, Any]:
        model = self._model
        described = {"id": model.name, "object": "model", "created": model.created, "owned_by": "llama-pte"}
        return described | {"sampling": model.sampling, "max_model_len": model.metadata.max_seq_len}

    async def _answer(
        self,
        request: Request,
        read: Callable[[bytes, Model], AnyRequest],
        start: Callable[[AnyRequest, Model, Jobs], Reply | ResponseReply],
    ) -> Response:
        completion_request = await run_in_threadpool(read, await self._body(request), self._model)
        jobs = Jobs(completion_request, self._scheduler)
        reply = start(completion_request, self._model, jobs)
        if completion_request.stream:
            return _EventStream(_events(jobs, reply), jobs)
        await _run(request, jobs, reply.take)
        return JSONResponse(reply.whole())

    async def _body(self, request: Request) -> bytes:
        """Reads the request's body.

        Raises:
            RequestError: the body is too large.
        """
        limit, body = self._access.max_body, bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > limit:
                raise RequestError(413, f"the request has more than {limit} bytes; shorten it", code="body_too_large")
        return bytes(body)


async def _run(request: Request, jobs: Jobs, take: Callable[[int, Step], None]) -> None:
    """Passes the jobs' steps on until they have ended.

    Raises:
        RequestError: the jobs have failed.
    """
    watch = asyncio.create_task(_watch(request, jobs))
    try:
        async for number, step in jobs:
            take(number, step)
    except (InputError, ClosedError) as error:
        raise _client_error(error) from error
    finally:
        watch.cancel()
        jobs.cancel()


async def _watch(request: Request, jobs: Jobs) -> None:
    """Ends the jobs' steps when the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    jobs.fail(ClientDisconnect())


async def _events(jobs: Jobs, reply: Reply | ResponseReply) -> AsyncIterator[str]:
    try:
        for chunk in reply.opening():
            yield _event(chunk)
        async for number, step in jobs:
            for chunk in reply.chunks(number, step):
                yield _event(chunk)
    except Exception as error:  # the HTTP status was already sent
        if not isinstance(error, InputError | ClosedError):
            logging.getLogger(__name__).error("a request failed", exc_info=error)
        yield _event(_client_error(error).content)
        return
    for chunk in reply.closing():
        yield _event(chunk)
    if reply.ending:
        yield reply.ending


def _event(content: dict[str, Any]) -> str:
    name = f"event: {content['type']}\n" if "type" in content else ""
    return f"{name}data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _client_error(error: Exception) -> RequestError:
    """Returns the error to send to a client. It has no details of an internal error."""
    if isinstance(error, InputError):
        return RequestError(400, str(error))
    if isinstance(error, ClosedError):
        return RequestError(503, RESTARTED)
    return RequestError(500, "the server failed; see its log")


async def _refused(request: Request, error: RequestError) -> Response:
    headers = {429: {"Retry-After": RETRY_AFTER}, 413: {"Connection": "close"}}.get(error.status)
    return JSONResponse(error.content, error.status, headers)


async def _no_such_endpoint(request: Request, error: HTTPException) -> Response:
    message = (
        f"{request.method} {request.url.path} is not an endpoint; see /v1/models, /v1/completions, "
        "/v1/chat/completions, /v1/responses, /v1/embeddings, /tokenize, /detokenize, /metrics, /health"
    )
    return JSONResponse(RequestError(error.status_code, message).content, error.status_code, error.headers)


async def _nobody_listens(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=400)


async def _failed(request: Request, error: Exception) -> Response:
    refusal = _client_error(error)
    return JSONResponse(refusal.content, refusal.status)


class _KeyCheck:
    """Middleware that requires the key, but for OPEN paths: a browser cannot send it before it has the page."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._expected is not None and scope["path"] not in OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                content = RequestError(
                    401, "the API key is missing or wrong; send the server's key", code="invalid_api_key"
                )
                response = JSONResponse(content.content, content.status, {"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)
