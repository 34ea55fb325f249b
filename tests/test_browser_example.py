# SPDX-License-Identifier: Apache-2.0
"""The page of examples/browser in a headless Chromium, with the shell model."""

import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_space_browser import ANSWER_MILLISECONDS, browser  # noqa: F401
from test_transformers_js import node_folder  # noqa: F401

from encdec_slm.checkpoints import load_checkpoint
from encdec_slm.export import export_transformers_js


REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / "checkpoints" / "shell"
REQUEST = "find all files larger than 100 MB in /var"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_the_page_answers_while_one_types(browser, node_folder, tmp_path):  # noqa: F811
    model, tokenizer = load_checkpoint(FOLDER, dtype="float32")
    ids = model.generate(**tokenizer(REQUEST, return_tensors="pt"), num_beams=1)
    answer = tokenizer.decode(ids[0], skip_special_tokens=True)
    export_transformers_js(FOLDER, tmp_path / "model")
    shutil.copy(REPOSITORY / "examples" / "browser" / "index.html", tmp_path)
    (tmp_path / "node_modules").symlink_to(node_folder / "node_modules")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.set_default_timeout(ANSWER_MILLISECONDS)
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.locator("#request").press_sequentially(REQUEST)
        page.wait_for_function("text => document.querySelector('#answer').textContent === text", arg=answer)
        assert re.fullmatch(r"\d+ tokens in \d+ ms", page.locator("#status").inner_text())
        page.close()
        server.shutdown()
