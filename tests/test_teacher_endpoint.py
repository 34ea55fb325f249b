# SPDX-License-Identifier: Apache-2.0
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from datasets import Dataset

from conftest import build_byte_tokenizer
from encdec_slm.trainers.teacher_cache import DistributionSpec
from encdec_slm.trainers.teacher_endpoint import OpenAIEngine
from encdec_slm.trainers.teacher_engines import CompletionSettings
from encdec_slm.trainers.teacher_labels import LabelSettings, label_dataset


class Endpoint(ThreadingHTTPServer):
    """Answers "ok" and a number of "!" to each prompt; `failures` are status codes for the first requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures, self.requests, self.keys, self.answer, self.delay = [], [], [], None, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body))
        self.server.keys.append(self.headers["Authorization"])
        time.sleep(self.server.delay)
        if self.server.failures:
            return self._send(self.server.failures.pop(0), {"error": {"message": "not now"}}, {"Retry-After": "0.01"})
        return self._send(200, self.server.answer or _answer(self.path, body))

    def _send(self, status, content, headers=()):
        content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            **dict(headers),
            "Content-Type": "application/json",
            "Content-Length": len(content),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def _answer(path, body):
    if path.endswith("/chat/completions"):
        tokens = ["o", "k", "?"]
        logprobs = [
            {"token": token, "logprob": -0.1, "bytes": None, "top_logprobs": [
                {"token": token, "logprob": -0.1, "bytes": None}, {"token": "z", "logprob": -3.0, "bytes": None},
            ]}
            for token in tokens
        ]  # fmt: skip
        choice = {"message": {"role": "assistant", "content": "ok?"}, "logprobs": {"content": logprobs}}
        kind = "chat.completion"
    else:
        tokens = ["o", "k"]
        logprobs = {"tokens": tokens, "token_logprobs": [-0.2] * 2, "text_offset": [0, 1]}
        logprobs["top_logprobs"] = [{token: -0.2, "z": -2.0} for token in tokens]
        choice, kind = {"text": "ok", "logprobs": logprobs}, "text_completion"
    choices = [{**choice, "index": index, "finish_reason": "stop"} for index in range(body.get("n") or 1)]
    for choice in choices:
        if not body.get("logprobs"):
            choice["logprobs"] = None
    return {"id": "1", "object": kind, "created": 1, "model": body["model"], "choices": choices}


@pytest.fixture
def endpoint():
    server = Endpoint()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def tokenizer():
    return build_byte_tokenizer(ends_sources=False)


def label(endpoint, folder, tokenizer=None, prompts=("a", "b"), distributions=None, completions=None, **options):
    engine = OpenAIEngine("m", tokenizer, endpoint.url, **{"max_retries": 2, **options})
    settings = LabelSettings(distributions, completions or CompletionSettings(max_new_tokens=5))
    rows = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    return label_dataset(rows, engine, folder, settings, teacher="m")


def test_text_prompts_are_completed_for_a_student_with_any_tokenizer(endpoint, tmp_path):
    cache = label(endpoint, tmp_path)
    examples = list(cache.read(0, 2))
    assert [example["completion"] for example in examples] == ["ok", "ok"]
    assert [example["label_target_ids"] for example in examples] == [None, None]
    path, body = endpoint.requests[0]
    assert path == "/v1/completions"
    assert body["max_tokens"] == 5


@pytest.mark.parametrize(
    ("prompt", "text", "values"),
    [("a", "ok", [-0.2, -2.0]), ([{"role": "user", "content": "a"}], "ok?", [-0.1, -3.0])],
)
def test_log_probabilities_are_kept_for_the_tokens_of_the_completion(
    endpoint, tmp_path, tokenizer, prompt, text, values
):
    cache = label(endpoint, tmp_path, tokenizer, [prompt], DistributionSpec("topk", 2))
    example = next(cache.read(0, 1))
    ids = tokenizer(text)["input_ids"]
    assert example["label_target_ids"] == [*ids, tokenizer.eos_token_id]
    assert example["label_num_ids"] == [*[2] * len(ids), 0]  # nobody tells how probable the end is
    assert example["label_ids"][::2] == ids
    np.testing.assert_allclose(example["label_log_probs"], values * len(ids), rtol=1e-3)


def test_several_completions_per_prompt(endpoint, tmp_path):
    settings = CompletionSettings(max_new_tokens=5, num_completions=3, temperature=1.0)
    examples = list(label(endpoint, tmp_path, completions=settings).read(0, 2))
    assert [(example["row"], example["sample"]) for example in examples] == [
        (r, s) for r in range(2) for s in range(3)
    ]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_refused_request_is_repeated(endpoint, tmp_path, status):
    endpoint.failures = [status, status]
    assert label(endpoint, tmp_path, prompts=["a"]).num_rows == 1
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize(
    ("failures", "named"), [([401], "401"), ([404], "404"), ([429] * 9, "429"), ([500] * 9, "500")]
)
def test_an_endpoint_that_refuses_is_named(endpoint, tmp_path, failures, named):
    endpoint.failures = failures
    with pytest.raises(ValueError, match=rf"127\.0\.0\.1.*{named}"):
        label(endpoint, tmp_path, prompts=["a"])


def test_an_endpoint_that_times_out_or_is_not_there_is_named(endpoint, tmp_path):
    endpoint.delay = 0.5
    with pytest.raises(ValueError, match=r"127\.0\.0\.1"):
        label(endpoint, tmp_path, prompts=["a"], timeout=0.05, max_retries=0)
    engine = OpenAIEngine("m", None, "http://127.0.0.1:9/v1", max_retries=0)
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9"):
        engine.generate(["a"], CompletionSettings())


@pytest.mark.parametrize("answer", [{"hello": "world"}, {"choices": None}, {"choices": [{"text": None}]}, [1]])
def test_an_answer_in_another_form_is_named(endpoint, tmp_path, answer):
    endpoint.answer = answer
    with pytest.raises(ValueError, match="another form"):
        label(endpoint, tmp_path, prompts=["a"])


def test_an_endpoint_without_log_probabilities_is_named(endpoint, tmp_path, tokenizer):
    endpoint.answer = {"choices": [{"text": "ok", "finish_reason": "stop", "index": 0, "logprobs": None}]}
    with pytest.raises(ValueError, match="log-probabilities"):
        label(endpoint, tmp_path, tokenizer, ["a"], DistributionSpec("topk", 2))


def test_distributions_that_no_endpoint_returns_are_refused_before_any_request(endpoint, tmp_path, tokenizer):
    for spec, given in ((DistributionSpec("sampled", 2), tokenizer), (DistributionSpec("topk", 21), tokenizer),
                        (DistributionSpec("topk", 2), None)):  # fmt: skip
        with pytest.raises(ValueError, match="topk"):
            label(endpoint, tmp_path, given, ["a"], spec)
    assert endpoint.requests == []


def test_the_key_comes_from_the_environment_and_is_written_nowhere(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    label(endpoint, tmp_path)
    assert endpoint.keys[0] == "Bearer sk-secret"
    assert all(b"sk-secret" not in path.read_bytes() for path in tmp_path.iterdir())
