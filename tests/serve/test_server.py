"""The address, the models, the queue and the page."""

import asyncio
import base64
import hashlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from puna.engine.generator import Generator
from puna.engine.params import SamplingParams
from puna.errors import DeviceError
from puna.llama import hub
from puna.serve.api.server import bind, serve
from puna.serve.api.worker import Worker


def test_the_models(client):
    (card,) = client.models.list().data
    assert (card.id, card.object, card.owned_by) == ("tiny", "model", "puna")
    assert card == client.models.retrieve("tiny")
    assert card.model_extra["max_model_len"] == 96


def test_a_busy_port_is_named_before_anything_is_loaded(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(DeviceError) as caught:
            serve(tmp_path / "nothing here", port=port)
    sentence = rf"Port {port} of 127\.0\.0\.1 is in use\. Choose another, such as (\d+), which is free now\."
    words = re.fullmatch(sentence, str(caught.value))
    bind("127.0.0.1", int(words[1])).close()


def test_an_unknown_host():
    with pytest.raises(DeviceError, match=r"The host nowhere\.invalid is not known\. Use 127\.0\.0\.1"):
        bind("nowhere.invalid", 0)


def test_an_address_of_another_machine():
    with pytest.raises(DeviceError, match=r"Cannot listen on 192\.0\.2\.1: .* an address of this machine\."):
        bind("192.0.2.1", 0)


def test_a_hugging_face_folder_is_served_until_interrupted(tmp_path, generator):
    folder = tmp_path / "my-model"
    generator.tokenizer.save(tmp_path / "tokenizer")
    hub.save(generator.model.state_dict(), generator.model.config, folder, tokenizer_dir=tmp_path / "tokenizer")
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    code = f"from puna.serve.api.server import serve; serve({str(folder)!r}, port={port})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        line = process.stderr.readline()
        assert line.startswith(f"Serving my-model at http://127.0.0.1:{port} (chat page) and ")
        models = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=20).json()
        assert models["data"][0]["id"] == "my-model"
        ask = {"model": "my-model", "prompt": "x", "max_tokens": 2}
        assert httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=ask, timeout=20).status_code == 200
        told = process.stderr.readline()
        assert re.search(r" text_completion: 2 \+ [12] tokens, first after \d+\.\d\d s, done", told)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr.read().endswith("Stopped.\n")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


class Gate(Generator):
    """A generator that draws a token each time it is let, without end, and counts what it drew."""

    def __init__(self, model, tokenizer):
        super().__init__(model, tokenizer)
        self.begun, self.drawn, self.ended, self.let = 0, 0, 0, threading.Semaphore(0)

    def stream(self, prompts, n=1, params=None):
        self.begun += 1
        (first,) = list(super().stream(prompts, 1, params))[:1]
        try:
            while True:
                assert self.let.acquire(timeout=30)
                self.drawn += 1
                yield type(first)(0, 0, first.token, first.logprob, [], "x", None)
        finally:
            self.ended += 1


def wait_for(holds):
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def let_until_ended(gate):
    """Lets one token after another be drawn until the request that draws them ends."""
    wait_for(lambda: gate.let.release() or gate.ended == 1)


@pytest.fixture
def gate(generator):
    return Gate(generator.model, generator.tokenizer)


ASK = {"model": "tiny", "prompt": "x", "max_tokens": 1, "temperature": 0}


def post(url, stream=True) -> socket.socket:
    """A connection that has sent a request and not read anything."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({**ASK, "stream": stream})
    connection = socket.create_connection((host, int(port)), timeout=20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_work(serve, gate, stream):
    with serve(gate) as url:
        with post(url, stream):
            gate.let.release(3)
            wait_for(lambda: gate.drawn == 3)
        let_until_ended(gate)


def test_tokens_arrive_as_they_are_drawn_and_the_server_goes_on_answering(serve, gate):
    with serve(gate) as url, httpx.Client(timeout=20) as client:
        with client.stream("POST", f"{url}/v1/completions", json={**ASK, "stream": True}) as response:
            lines = response.iter_lines()
            for count in range(1, 4):
                gate.let.release()
                assert '"text": "x"' in next(lines)
                assert next(lines) == ""
                assert gate.drawn == count
                assert httpx.get(f"{url}/health", timeout=20).json() == {"status": "ok"}
        let_until_ended(gate)


def test_a_client_that_leaves_the_queue_is_forgotten(serve, gate):
    with serve(gate) as url, post(url) as first:
        gate.let.release(1)
        wait_for(lambda: gate.drawn == 1)
        with post(url):
            time.sleep(0.3)
        time.sleep(0.3)
        first.close()
        let_until_ended(gate)
        time.sleep(0.3)
        assert gate.begun == 1


def test_requests_wait_for_their_turn(serve, gate):
    with serve(gate) as url, post(url) as first, post(url) as second:
        gate.let.release(1)
        wait_for(lambda: gate.drawn == 1)
        assert gate.begun == 1
        first.close()
        second.settimeout(20)
        wait_for(lambda: gate.let.release() or gate.begun == 2)
        assert gate.ended == 1
        assert b"text/event-stream" in second.recv(4096)
        second.close()
        wait_for(lambda: gate.let.release() or gate.ended == 2)


def test_a_worker_that_closes_ends_the_work_in_hand(gate):
    async def close_while_drawing() -> None:
        worker = Worker(gate)
        stream = worker.stream([[5]], 1, SamplingParams(1))
        gate.let.release(1)
        await anext(stream)
        closing = asyncio.create_task(asyncio.to_thread(worker.close))
        while not closing.done():
            gate.let.release(1)
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(close_while_drawing(), 20))
    assert gate.ended == 1


def test_the_page_allows_nothing_but_itself(http):
    response = http.get("/")
    html, policy = response.text, response.headers["content-security-policy"]
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert rules["frame-ancestors"] == "'none'"
    assert rules["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in policy


def test_the_page_is_one_file_that_never_writes_markup(http):
    html = http.get("/").text
    assert not re.findall(r"(?:src|href)=\"(?!data:)|@import|url\(", html)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=\"|\sstyle=\"", html)
