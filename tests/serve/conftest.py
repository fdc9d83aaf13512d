"""A server in this process, on a free port, over a tiny Llama; and the official client."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import torch
import uvicorn

from puna.engine.generator import Generator
from puna.llama.dialog import REFERENCE, Style
from puna.serve.api.app import create_app
from puna.serve.api.server import bind

sys.path.append(str(Path(__file__).parents[1]))
from tiny_llama import tiny_model, tiny_tokenizer


@contextmanager
def running(generator: Generator, style: Style = REFERENCE) -> Iterator[str]:
    """The address of a server over `generator`."""
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(generator, "tiny", style=style), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="session")
def generator(tmp_path_factory) -> Generator:
    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Generator(tiny_model(tokenizer), tokenizer)


@pytest.fixture(scope="session")
def url(generator) -> Iterator[str]:
    with running(generator) as address:
        yield address


@pytest.fixture(scope="session")
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def http(url) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def serve():
    """The context manager that serves a Generator."""
    return running
