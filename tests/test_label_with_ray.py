# SPDX-License-Identifier: Apache-2.0
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import build_byte_tokenizer, build_model
from encdec_slm.trainers.teacher_cache import TeacherCache


pytest.importorskip("ray")
SCRIPT = Path(__file__).parent.parent / "examples" / "label_with_ray.py"
NUM_ROWS = 600


@pytest.mark.slow
def test_two_workers_label_all_rows_although_one_is_killed(tmp_path):
    tokenizer = build_byte_tokenizer(ends_sources=False)
    tokenizer.save_pretrained(tmp_path / "teacher")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    rows = [json.dumps({"source": f"question {number}", "target": f"answer {number}"}) for number in range(NUM_ROWS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    paths = [str(tmp_path / name) for name in ("teacher", "rows.jsonl", "out")]
    options = ["--distributions", "topk:32", "--rows_per_shard", "6", "--workers", "2", "--cpus_per_worker", "0.5"]
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *paths, *options]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "RAY_AUTH_MODE": "disabled"})
        try:
            assert _wait_for(lambda: len(list((tmp_path / "out").glob("*.parquet"))) >= 3, process)
            worker = next(one for one in _children(process) if "MapWorker" in " ".join(one.cmdline()))
            worker.kill()
            assert process.wait(timeout=600) == 0, (tmp_path / "log").read_text()
        finally:
            process.kill()
            process.wait()
    cache = TeacherCache(tmp_path / "out")
    assert [example["row"] for example in cache.read(0, NUM_ROWS)] == list(range(NUM_ROWS))


@pytest.mark.slow
def test_evaluation_of_the_docs_scores_all_rows(tmp_path):
    tokenizer = build_byte_tokenizer()
    build_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "outputs" / "finetune_docstrings")
    tokenizer.save_pretrained(tmp_path / "outputs" / "finetune_docstrings")
    rows = [json.dumps({"source": f"question {number}", "target": f"answer {number}"}) for number in range(50)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    page = (SCRIPT.parent.parent / "docs" / "scale.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python not run: needs Ray\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    start = "import ray\nray.init(num_cpus=4, include_dashboard=False)\n"
    command = [sys.executable, "-W", "ignore", "-c", f"{start}{snippet}\nprint(scored.count())"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert run.stdout.split()[1:] == ["50"] and 0.0 <= float(run.stdout.split()[0]) <= 1.0, run.stderr[-3000:]


def _children(process):
    return psutil.Process(process.pid).children(recursive=True)


def _wait_for(is_done, process, seconds=600):
    end = time.monotonic() + seconds
    while not is_done() and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    return is_done()
