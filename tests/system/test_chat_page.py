"""The chat page in a real browser, over a real server with a tiny model."""

import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import uvicorn

from puna.engine.generator import Generator
from puna.engine.row import Delta
from puna.serve.api.app import create_app
from puna.serve.api.server import bind

sys.path.append(str(Path(__file__).parents[1]))
from tiny_llama import tiny_model, tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.browser]

MARKUP = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script><b>bold</b> & done"


class Scripted(Generator):
    """The tiny model; but where `text` is set, that is drawn instead, a character at a time, with `pause` between."""

    text: str | None = None
    pause = 0.0
    asked = 0

    def stream(self, prompts, n=1, params=None):
        self.asked += 1
        if self.text is None:
            yield from super().stream(prompts, n, params)
            return
        for place, char in enumerate(self.text, 1):
            time.sleep(self.pause)
            yield Delta(0, 0, 5, -1.0, [], char, "stop" if place == len(self.text) else None)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Scripted(tiny_model(tokenizer), tokenizer)


@pytest.fixture(scope="module")
def url(generator):
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(generator, "tiny"), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture
def page(browser, url, generator):
    """The page, loaded; a script error or a broken policy fails the test."""
    generator.text, generator.pause, generator.asked = None, 0.0, 0
    context = browser.new_context(viewport={"width": 1000, "height": 700})
    page = context.new_page()
    page.set_default_timeout(20_000)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if "Policy" in message.text else None)
    page.goto(url)
    page.locator("#model", has_text="tiny").wait_for()
    yield page
    context.close()
    assert wrong == []


def send(page, text):
    page.fill("#input", text)
    page.keyboard.press("Enter")


def answer(page, number=0) -> str:
    """The text of an answer, once it is complete."""
    turn = page.locator(".turn.assistant, .turn.passage").nth(number)
    turn.locator(".acts").wait_for()
    return turn.locator(".text").inner_text()


def test_a_prompt_is_answered_by_the_model(page):
    assert page.locator("#send").is_disabled()
    send(page, "Who eats grass?")
    assert page.locator(".turn.user .text").inner_text() == "Who eats grass?"
    answer(page)
    assert "tokens" in page.locator(".facts").inner_text()
    assert page.locator(".empty").first.is_hidden()
    assert page.title() == "tiny · Puna"


@pytest.mark.parametrize("mode", ["chat", "continue"])
def test_markup_from_the_model_is_text(page, generator, mode):
    generator.text = MARKUP
    page.click(f"#mode-{mode}")
    send(page, "<b>x</b>")
    assert answer(page).endswith(MARKUP)
    assert page.locator("main img, main script, main b").count() == 0
    assert page.title() == "tiny · Puna"


def test_script_that_gets_into_the_page_does_not_run(browser, url):
    context = browser.new_context()
    page = context.new_page()
    page.goto(url)
    page.locator("#model", has_text="tiny").wait_for()
    for code in ("document.body.innerHTML = '<b>x</b>'", "document.body.setAttribute('onclick', 'alert(1)')"):
        assert page.evaluate(f"() => {{ try {{ {code}; return false }} catch {{ return true }} }}")
    told = []
    page.on("console", lambda message: told.append(message.text))
    page.evaluate("() => { const image = new Image(); image.src = '/health'; document.body.append(image) }")
    page.wait_for_timeout(200)
    assert any("Content Security Policy" in text for text in told)
    context.close()


def test_fenced_code_is_a_block_of_text(page, generator):
    generator.text = "Look:\n\n```python\ndef add(a, b):\n    return a + b\n```\nThat is it."
    send(page, "code")
    answer(page)
    assert page.locator(".turn.assistant pre").inner_text() == "def add(a, b):\n    return a + b"
    assert page.locator(".turn.assistant p").all_inner_texts() == ["Look:", "That is it."]


def test_stop_keeps_what_was_written(page, generator):
    generator.text, generator.pause = "a" * 500, 0.02
    send(page, "go on")
    page.locator(".assistant .text", has_text="aaaa").wait_for()
    page.click("#stop")
    text = answer(page)
    assert 3 < len(text) < 400
    assert set(text) == {"a"}
    assert page.locator(".facts").inner_text() == "stopped by you"
    assert page.locator("#send").is_visible()


def test_the_conversation_goes_along_and_can_be_cleared(page):
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    page.click("#toggle-settings")
    page.fill("#system", "Be brief.")
    page.fill("#max_tokens", "4")
    page.locator("#temperature").fill("0")
    send(page, "one")
    first = answer(page)
    send(page, "two")
    answer(page, 1)
    assert bodies[1]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [message["content"] for message in bodies[1]["messages"][1::2]] == ["one", "two"]
    assert bodies[1]["messages"][2]["content"].strip() == first.strip()
    assert (bodies[1]["max_tokens"], bodies[1]["temperature"]) == (4, 0)
    page.click("#clear")
    assert page.locator(".turn").count() == 0
    send(page, "three")
    answer(page)
    assert [message["content"] for message in bodies[2]["messages"]] == ["Be brief.", "three"]


def test_try_again_asks_the_same(page, generator):
    generator.text = "first"
    send(page, "one")
    answer(page)
    generator.text = "second"
    page.click("text=Try again")
    page.locator(".assistant .text", has_text="second").wait_for()
    assert answer(page) == "second"
    assert page.locator(".turn").count() == 2


def test_text_is_continued_where_it_ends(page, generator):
    generator.text = " and more"
    page.click("#mode-continue")
    send(page, "import os ")
    assert answer(page) == "import os  and more"
    assert page.locator(".given").inner_text() == "import os "
    page.click("text=Continue further")
    page.locator(".given", has_text="and more").wait_for()
    assert answer(page) == "import os  and more and more"


def test_enter_with_shift_begins_a_line(page, generator):
    page.fill("#input", "one")
    page.press("#input", "Shift+Enter")
    page.type("#input", "two")
    assert page.input_value("#input") == "one\ntwo"
    assert generator.asked == 0


def test_an_error_is_shown_and_the_next_message_takes_its_place(page):
    page.evaluate("document.getElementById('max_tokens').removeAttribute('max')")
    page.evaluate("document.getElementById('max_tokens').value = 5000")
    send(page, "too much")
    page.wait_for_selector(".fault")
    assert "5000 more were asked for, but this model's context is 96 tokens." in page.inner_text(".fault")
    page.evaluate("document.getElementById('max_tokens').value = 4")
    send(page, "less")
    answer(page)
    assert page.locator(".turn.user .text").all_inner_texts() == ["less"]


def test_settings_are_kept(page, url):
    page.click("#toggle-settings")
    page.fill("#max_tokens", "7")
    page.reload()
    assert page.input_value("#max_tokens") == "7"


def test_every_control_has_a_name_and_the_phone_layout_fits(page):
    page.click("#toggle-settings")
    page.set_viewport_size({"width": 360, "height": 640})
    page.click("#close-settings")
    send(page, "a" * 60)
    answer(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea")].filter((one) => !(
            one.textContent.trim() || one.getAttribute("aria-label") || one.labels?.length)).map((one) => one.id)"""
    )
    assert nameless == []
