# SPDX-License-Identifier: Apache-2.0
"""The page served by another process: its API, and correct and wrong input in a headless Chromium."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from urllib.request import urlopen

import pytest
from PIL import Image

from conftest import save_text_folder, save_vision_folder
from encdec_slm.hub_cards.space import app


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.slow
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
# For a busy machine.
START_SECONDS, ANSWER_MILLISECONDS = 300, 120_000
# As in a Space: the file alone, without the package.
ALONE = "import runpy, sys; sys.modules['encdec_slm'] = None; runpy.run_path({!r}, run_name='__main__')"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


class Server:
    """A server of the page in its own process."""

    def __init__(self, command, log, **variables):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}/", log
        own = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(log.parent / "home"), **variables}
        with log.open("w", encoding="utf-8") as opened:
            self.process = subprocess.Popen(
                [sys.executable, *command, "--port", str(port)],
                cwd=log.parent,
                env={**os.environ, **own},
                stdout=opened,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self):
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urlopen(self.url, timeout=10).close()
                return self
            except OSError:
                time.sleep(0.5)
        self.__exit__()
        raise RuntimeError(self.log.read_text(encoding="utf-8"))

    def __exit__(self, *exception):
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def text_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    save_text_folder(folder / "scribe")
    command = [app.__file__, "--model", str(folder / "scribe"), "--compare"]
    with Server(command, folder / "server.log") as server:
        yield server


@pytest.fixture(scope="module")
def vision_server(tmp_path_factory):
    """The model is named by the variables of a Space, and the package is not installed."""
    folder = tmp_path_factory.mktemp("vision")
    save_vision_folder(folder / "viewer")
    shutil.copy(app.__file__, folder / "app.py")
    command = ["-c", ALONE.format(str(folder / "app.py")), "--compare"]
    with Server(command, folder / "server.log", MODEL_ID=str(folder / "viewer"), PYTHONPATH="") as server:
        yield server


@pytest.fixture
def visit(browser):
    """Open the page of a server; afterwards check that it made no requests to other servers."""
    pages, asked = [], []

    def opened(server):
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(ANSWER_MILLISECONDS)
        page.on("request", lambda request: asked.append((server.url, request.url)))
        page.goto(server.url)
        page.wait_for_selector("#generate")
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert asked
    assert [url for own, url in asked if not url.startswith((own, "data:", "blob:"))] == []


def fill(page, text):
    page.locator("#source textarea, #source input").first.fill(text)


def wait_for(page, part, pattern):
    """Wait until a part of the page matches a pattern; returns its text."""
    from playwright.sync_api import expect

    locator = page.locator(f"#{part}")
    expect(locator).to_contain_text(re.compile(pattern), timeout=ANSWER_MILLISECONDS)
    return locator.inner_text()


def upload(page, file):
    page.locator("#picture input[type=file]").first.set_input_files(file)


def value_of(page, part="answer"):
    return page.locator(f"#{part} textarea").input_value()


def test_type_submit_read_and_compare(visit, text_server):
    page = visit(text_server)
    assert "scribe" in page.locator("h1").inner_text() and page.title() == "scribe"
    fill(page, "def area(width, height):\n    return width * height")
    page.click("#generate")
    message = wait_for(page, "message", r"\d+ tokens in [\d.]+ s")
    assert value_of(page) or "empty text" in message
    speeds = wait_for(page, "speeds", "median of 3")
    numbers = re.findall(r"([\d.,]+) ms\s+([\d.,]+)", speeds)
    assert len(numbers) == 2 and all(float(n.replace(",", "")) > 0 for pair in numbers for n in pair)
    assert "random weights" in page.locator("#baseline_text").inner_text()
    assert value_of(page, "baseline_text")


def test_the_command_serves_the_shell_model(visit, tmp_path):
    with Server(["-m", "encdec_slm_cli", "demo"], tmp_path / "server.log") as server:
        page = visit(server)
        assert page.title() == "shell"
        page.get_by_text("find all files").first.click()
        page.wait_for_function("document.querySelector('#source textarea').value.startsWith('find all')")
        page.click("#generate")
        wait_for(page, "message", r"\d+ tokens in [\d.]+ s")
        assert value_of(page).startswith("find /var")


def test_empty_and_very_long_inputs_are_explained(visit, text_server):
    page = visit(text_server)
    page.click("#generate")
    wait_for(page, "message", "Enter a text")
    fill(page, "word " * 40_000)
    page.click("#generate")
    wait_for(page, "message", r"The text has [\d,]+ tokens, but this model reads at most 512")
    page.get_by_text("find all files").first.click()  # an example
    page.wait_for_function("document.querySelector('#source textarea').value.startsWith('find all')")
    page.click("#generate")
    wait_for(page, "message", r"\d+ tokens in [\d.]+ s")


def test_an_image_is_uploaded_and_asked_about(visit, vision_server, tmp_path):
    file = tmp_path / "picture.png"
    Image.effect_noise((60, 40), 90).convert("RGB").save(file)
    page = visit(vision_server)
    wait_for(page, "message", "requires the package `?encdec_slm`?, which is not installed")
    upload(page, file)
    page.wait_for_selector("#picture img")
    fill(page, "what is this?")
    page.locator("#source textarea, #source input").first.press("Enter")
    message = wait_for(page, "message", r"\d+ tokens in [\d.]+ s")
    assert value_of(page) or "empty text" in message


def test_wrong_files_are_explained(visit, vision_server, tmp_path):
    page = visit(vision_server)
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    upload(page, tmp_path / "notes.txt")
    page.get_by_text("Invalid file type: notes.txt. Only image/* allowed.").wait_for()
    (tmp_path / "renamed.png").write_text("hello", encoding="utf-8")
    upload(page, tmp_path / "renamed.png")
    wait_for(page, "message", "This file cannot be read as an image")
    page.wait_for_selector("#picture input[type=file]", state="attached")
    fill(page, "what is this?")
    page.click("#generate")
    wait_for(page, "message", "Upload an image first")
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    upload(page, tmp_path / "red.png")
    page.wait_for_selector("#picture img")
    page.click("#generate")
    wait_for(page, "message", r"\d+ tokens in [\d.]+ s")


def test_the_api_explains_arguments_of_other_types(text_server, vision_server, tmp_path):
    client = pytest.importorskip("gradio_client", reason="gradio_client is not installed")
    text_page = client.Client(text_server.url, verbose=False)
    for arguments in (("x", "abc"), ("x", None), (5, 4), (None, 4), ({"a": 1}, [3])):
        _, message, *_ = text_page.predict(*arguments, api_name="/write")
        assert "must be" in message or "Enter a text" in message
    assert "tokens in" in text_page.predict("x", 4, api_name="/write")[1]
    Image.new("RGB", (20, 20), "red").save(tmp_path / "red.png")
    picture = client.handle_file(str(tmp_path / "red.png"))
    page = client.Client(vision_server.url, verbose=False)
    assert "must be" in page.predict("x", "abc", picture, api_name="/write")[1]
    assert "Upload" in page.predict("x", 4, None, api_name="/write")[1]
    assert "tokens in" in page.predict("x", 4, picture, api_name="/write")[1]
