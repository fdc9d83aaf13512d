"""The routes: an OpenAI-compatible API over one Generator, and the chat page."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from puna import __version__
from puna.engine.generator import Completion, Generator
from puna.engine.row import Delta
from puna.errors import UserError
from puna.llama.dialog import REFERENCE, Style, render
from puna.serve.api.answers import Answers, ChatAnswers, Object, TextAnswers
from puna.serve.api.errors import ApiError, Json
from puna.serve.api.hosts import LOOPBACK, HostGuard
from puna.serve.api.page import chat_page
from puna.serve.api.requests import ChatRequest, CompletionRequest, Sampling, json_body
from puna.serve.api.worker import Worker

log = logging.getLogger("puna.serve")


def create_app(
    generator: Generator, model_name: str, hosts: Collection[str] | None = LOOPBACK, style: Style = REFERENCE
) -> FastAPI:
    """The application. hosts: names that requests may use for this server; None: any. style: of chats."""
    service = Service(generator, model_name, style)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.worker.close()

    app = FastAPI(title="Puna", version=__version__, lifespan=lifespan, openapi_url=None)
    app.get("/")(chat_page)
    app.get("/health")(service.health)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{name:path}")(service.model)
    app.post("/v1/completions")(service.completions)
    app.post("/v1/chat/completions")(service.chat)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _server_error)
    if hosts is not None:
        app.add_middleware(HostGuard, names=hosts)
    return app


class Service:
    """What the routes call."""

    def __init__(self, generator: Generator, model_name: str, style: Style) -> None:
        self.generator, self.tokenizer, self.model_name = generator, generator.tokenizer, model_name
        self.style = style
        self.worker = Worker(generator)
        self._card = {
            "id": model_name, "object": "model", "created": int(time.time()), "owned_by": "puna",
            "max_model_len": generator.model.config.max_seq_len,
        }  # fmt: skip

    async def health(self) -> Response:
        """GET /health: up and loaded."""
        return Json({"status": "ok"})

    async def models(self) -> Response:
        """GET /v1/models: the one model; `max_model_len` is its context in tokens."""
        return Json({"object": "list", "data": [self._card]})

    async def model(self, name: str) -> Response:
        """GET /v1/models/NAME."""
        self._check_model(name)
        return Json(self._card)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions: continues text."""
        ask = CompletionRequest.read(await json_body(request))
        ask.check()
        self._check_model(ask.model)
        prompts = [self.tokenizer.encode(one, bos=True) if isinstance(one, str) else one for one in ask.prompts]
        echoes = [self._echo(one) if ask.echo else "" for one in ask.prompts]
        return await self._answer(request, ask, prompts, TextAnswers(self.tokenizer, ask.num_top, ask.n, echoes))

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions: answers a conversation in the chat format of the tokenizer."""
        ask = ChatRequest.read(await json_body(request))
        ask.check()
        self._check_model(ask.model)
        with _blaming("messages", "invalid_value"):
            prompt = render(self.tokenizer, ask.dialog, replace(self.style, tools=ask.functions)).ids
        answers = ChatAnswers(self.tokenizer, ask.num_top, reads_calls=bool(ask.functions))
        return await self._answer(request, ask, [prompt], answers)

    def _check_model(self, name: str) -> None:
        if name != self.model_name:
            message = f"The model {name!r} is not here; this server has {self.model_name!r}"
            raise ApiError(message, "model", "model_not_found", status=404)

    def _echo(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    async def _answer(self, request: Request, ask: Sampling, prompts: list[list[int]], answers: Answers) -> Response:
        with _blaming(answers.input_field, "invalid_value"):
            self.generator.check_ids(prompts)
        with _blaming(answers.input_field, "context_length_exceeded"):
            self.generator.check_room(prompts, ask.params())
        reply = Reply(self.model_name, self.worker, ask, prompts, answers)
        if ask.stream:
            headers = {"Cache-Control": "no-cache"}
            return StreamingResponse(reply.events(), media_type="text/event-stream", headers=headers)
        return await _unless_gone(request, reply.whole())


class Reply:
    """One request on its way to its answer."""

    def __init__(
        self, model_name: str, worker: Worker, ask: Sampling, prompts: list[list[int]], answers: Answers
    ) -> None:
        self.worker, self.ask, self.prompts, self.answers = worker, ask, prompts, answers
        self.num_drawn = 0
        self.head = {
            "id": f"{answers.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name,
            "system_fingerprint": f"puna-{__version__}",
        }  # fmt: skip

    @property
    def num_choices(self) -> int:
        """Choices of the answer; choice i is sample i % n of prompt i // n."""
        return len(self.prompts) * self.ask.n

    def usage(self) -> Object:
        """Token counts so far; stop tokens are counted."""
        num_prompt = sum(map(len, self.prompts))
        total = num_prompt + self.num_drawn
        return {"prompt_tokens": num_prompt, "completion_tokens": self.num_drawn, "total_tokens": total}

    async def whole(self) -> Response:
        """The complete answer."""
        done = [Completion(index // self.ask.n, index % self.ask.n) for index in range(self.num_choices)]
        try:
            async with aclosing(self._drawn()) as drawn:
                async for index, delta in drawn:
                    done[index].push(delta)
        except Exception as error:
            log.exception("a request failed")
            return _broken(error).response()
        choices = [self.answers.whole(index, one) for index, one in enumerate(done)]
        return Json({"object": self.answers.whole_kind, **self.head, "choices": choices, "usage": self.usage()})

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        try:
            for index in range(self.num_choices):
                for choice in self.answers.opening(index):
                    yield self._event([choice])
            async with aclosing(self._drawn()) as drawn:
                async for index, delta in drawn:
                    for choice in self.answers.pieces(index, delta):
                        yield self._event([choice])
            if self.ask.include_usage:
                yield self._event([], self.usage())
            yield "data: [DONE]\n\n"
        except Exception as error:
            log.exception("a stream broke off")
            yield f"data: {json.dumps(_broken(error).body())}\n\n"

    def _event(self, choices: list[Object], usage: Object | None = None) -> str:
        chunk = {"object": self.answers.chunk_kind, **self.head, "choices": choices}
        if self.ask.include_usage:
            chunk["usage"] = usage
        return f"data: {json.dumps(chunk)}\n\n"

    async def _drawn(self) -> AsyncGenerator[tuple[int, Delta], None]:
        asked = time.monotonic()
        first, outcome = asked, "given up"
        try:
            async with aclosing(self.worker.stream(self.prompts, self.ask.n, self.ask.params())) as deltas:
                async for delta in deltas:
                    first = first if self.num_drawn else time.monotonic()
                    self.num_drawn += 1
                    yield delta.prompt * self.ask.n + delta.sample, delta
            outcome = "done"
        finally:
            counts = f"{sum(map(len, self.prompts))} + {self.num_drawn} tokens"
            times = f"first after {first - asked:.2f} s, {outcome} after {time.monotonic() - asked:.2f} s"
            log.info("%s: %s, %s", self.answers.whole_kind, counts, times)


@contextmanager
def _blaming(param: str, code: str) -> Iterator[None]:
    """Turns a UserError into an answer about one field."""
    try:
        yield
    except UserError as error:
        raise ApiError(str(error), param, code) from None


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The result of `work`, which is cancelled when the client leaves before it is there."""
    working, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=499)
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _broken(error: Exception) -> ApiError:
    """What a client is told about a failure that is not its own."""
    return ApiError(f"The server failed: {type(error).__name__}; its log says more", code="internal_error", status=500)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{HTTPStatus(error.status_code).phrase}: {request.method} {request.url.path}"
    return ApiError(message, code="unknown_url", status=error.status_code).response()


async def _server_error(_: Request, error: Exception) -> Response:
    return _broken(error).response()
