# SPDX-License-Identifier: Apache-2.0
"""EleutherAI's lm-evaluation-harness runs a checkpoint with its own encoder-decoder backend, without our package."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer


ROWS = [
    {"question": f"how many legs have {number} birds?", "choices": ["a few", f"{2 * number}"], "gold": number % 2}
    for number in range(5)
]
MULTIPLE_CHOICE = """
task: tiny_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
metadata:
  version: 1
"""
GENERATION = """
task: tiny_answers
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs:
  until: ["\\n\\n"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
metadata:
  version: 1
"""
# The harness, without `encdec_slm`: it runs the code of the checkpoint.
HARNESS = """
import sys
sys.modules["encdec_slm"] = None
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.fixture(scope="module")
def harness(text_folder, tmp_path_factory):
    """Results, and samples by task, of the command in its manual."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (folder / "choices.yaml").write_text(MULTIPLE_CHOICE.format(data=data))
    (folder / "answers.yaml").write_text(GENERATION.format(data=data))
    model_args = f"pretrained={text_folder},trust_remote_code=True,backend=seq2seq,dtype=float32"
    command = ["run", "--model", "hf", "--model_args", model_args, "--tasks", "tiny_choices,tiny_answers"]
    command += ["--include_path", str(folder), "--device", "cpu", "--batch_size", "2", "--log_samples"]
    command += ["--output_path", str(folder / "out")]
    caches = {name: str(folder / name) for name in ("HF_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE")}
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    environment = {**os.environ, **caches, **offline, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", HARNESS, *command], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-4000:]
    (results,) = (folder / "out").rglob("results_*.json")
    samples = {}
    for path in (folder / "out").rglob("samples_*.jsonl"):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        samples["choices" if "choices" in path.name else "answers"] = sorted(rows, key=lambda row: row["doc_id"])
    return json.loads(results.read_text("utf-8"))["results"], samples


@pytest.fixture(scope="module")
def loaded(text_folder):
    options = {"trust_remote_code": False}
    model = AutoModelForSeq2SeqLM.from_pretrained(text_folder, dtype=torch.float32, **options).eval()
    return model, AutoTokenizer.from_pretrained(text_folder, **options)


@pytest.mark.slow
def test_choices_are_scored_with_the_likelihoods_of_the_model(harness, loaded):
    results, samples = harness
    model, tokenizer = loaded
    num_right = 0
    for row, sample in zip(ROWS, samples["choices"], strict=True):
        found = [float(pair[0][0] if isinstance(pair[0], list) else pair[0]) for pair in sample["resps"]]
        expected = [log_likelihood(model, tokenizer, row["question"], choice) for choice in row["choices"]]
        assert found == pytest.approx(expected, rel=1e-4)
        num_right += max(range(2), key=expected.__getitem__) == row["gold"]
    assert results["tiny_choices"]["acc,none"] == pytest.approx(num_right / len(ROWS))


@pytest.mark.slow
def test_answers_are_those_that_the_model_generates(harness, loaded):
    results, samples = harness
    model, tokenizer = loaded
    for row, sample in zip(ROWS, samples["answers"], strict=True):
        inputs = tokenizer(row["question"], return_tensors="pt")
        # The harness limits the target to the length of the source plus `max_gen_toks`.
        limit = inputs["input_ids"].shape[1] + 12
        ids = model.generate(**inputs, do_sample=False, max_length=limit)[0]
        text = tokenizer.decode(ids, skip_special_tokens=True).split("\n\n")[0]
        # In a batch the limit is that of the longest source.
        assert sample["resps"][0][0].startswith(text)
    assert "exact_match,none" in results["tiny_answers"]


def log_likelihood(model, tokenizer, source, target):
    """Sum the log-probabilities of the target tokens."""
    inputs = tokenizer(source, return_tensors="pt")
    target_ids = tokenizer(target, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = torch.full((1, 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=torch.cat([start, target_ids[:, :-1]], dim=1)).logits
    return logits.log_softmax(-1).gather(2, target_ids[..., None]).sum().item()
