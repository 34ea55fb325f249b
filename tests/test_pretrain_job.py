# SPDX-License-Identifier: Apache-2.0
"""Pre-training of tiny models in a few optimizer steps."""

import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import torch
from ddp_worker import build
from torch._dynamo.utils import counters
from transformers import Seq2SeqTrainingArguments

from encdec_slm.checkpoints import load_checkpoint
from encdec_slm.trainers.muon import MuonWithAdamW
from encdec_slm.trainers.pretrain_job import PretrainArguments, pretrain


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.parquet"
    texts = [f"The number {number} is followed by {number + 1}." for number in range(400)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    return str(path)


def run(folder, corpus, training=None, **fields):
    args = {"preset": "tiny", "vocab_size": 300, "max_length": 32, **fields}
    defaults = {"max_steps": 4, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "use_cpu": True}
    defaults |= {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "disable_tqdm": True, "report_to": "none"}
    settings = Seq2SeqTrainingArguments(str(folder), **{**defaults, **(training or {})})
    return pretrain(PretrainArguments([corpus], **args), settings)


def losses(checkpoint):
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_continues_at_the_next_row(corpus, tmp_path, optimizer):
    # The second step is in the second epoch.
    training = {"per_device_train_batch_size": 240, "lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 1}
    training |= {"lr_scheduler_kwargs": {"num_decay_steps": 2}}
    results = run(tmp_path / "whole", corpus, training, optimizer=optimizer)
    before, after = results["before training"].metrics["loss"], results.saved.metrics["loss"]
    assert after.value < before.value and results.train_steps == 4
    model, tokenizer = load_checkpoint(tmp_path / "whole")
    assert len(tokenizer) == model.config.vocab_size > tokenizer.convert_tokens_to_ids("<extra_id_99>") > 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    # The same rows by two times as many smaller batches, as of two processes.
    training |= {"per_device_train_batch_size": 120, "gradient_accumulation_steps": 2}
    run(tmp_path / "parts", corpus, {**training, "resume_from_checkpoint": "true"}, optimizer=optimizer)
    whole, parts = (losses(tmp_path / name / "checkpoint-4") for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-3)


def test_another_corpus_or_model_cannot_continue_a_run(corpus, tmp_path):
    run(tmp_path / "run", corpus, {"max_steps": 2})
    for source, fields, name in (
        ("python", {}, "sources"),
        (corpus, {"objective": "prefix"}, "objective"),
        (corpus, {"preset": "1m"}, "preset"),
    ):
        with pytest.raises(ValueError, match=name):
            run(tmp_path / "run", source, {"resume_from_checkpoint": "true"}, **fields)


def test_a_run_whose_corpus_is_damaged_is_saved_and_continued(tmp_path, monkeypatch):
    monkeypatch.setattr("encdec_slm.trainers.pretrain_job.TOKENIZER_ROWS", 500)
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [f"The number {number} is followed by {number + 1}." for number in range(1800)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "a.parquet")
    last = folder / "z.txt"
    last.write_bytes(b"\xff" * 40)
    training = {"max_steps": 8, "save_steps": 7, "per_device_train_batch_size": 100}
    with pytest.raises(ValueError, match=r"z\.txt.*checkpoint-6\b"):  # 1000 documents are read ahead
        run(tmp_path / "run", str(folder), training, max_eval_samples=1)
    last.write_bytes(b"mended  " * 5)
    training["resume_from_checkpoint"] = "true"
    assert run(tmp_path / "run", str(folder), training, max_eval_samples=1).train_steps == 8


def test_arguments_that_do_not_fit_are_refused(corpus, tmp_path, monkeypatch):
    for fields, name in (
        ({"objective": "mask"}, "objective"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"max_length": 1}, "max_length"),
        ({"sources": []}, "sources"),
    ):
        with pytest.raises(ValueError, match=f"`{name}`"):
            PretrainArguments(**fields)
    with pytest.raises(ValueError, match="`max_steps`"):
        run(tmp_path, corpus, {"max_steps": -1})
    with pytest.raises(ValueError, match="FSDP"), monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        run(tmp_path, corpus, optimizer="muon")
    (tmp_path / "small.txt").write_text("one document")
    with pytest.raises(ValueError, match="held-out"):
        run(tmp_path / "run", str(tmp_path / "small.txt"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_batches_of_all_shapes_share_one_compiled_graph(corpus, tmp_path, monkeypatch):
    for name in ("BACKEND", "USE_DYNAMIC"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no")  # restored after the run, which sets them
    monkeypatch.delenv("ACCELERATE_DYNAMO_USE_DYNAMIC")
    torch.compiler.reset()
    counters["stats"].clear()
    run(tmp_path, corpus, {"torch_compile": True, "torch_compile_backend": "eager"})
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("tied", [True, False])
def test_muon_updates_matrices_and_adamw_all_other_weights(tied):
    model = build(tie_word_embeddings=tied, attention_bias=True)
    optimizer = MuonWithAdamW(model, lr=0.1, weight_decay=0.1)
    muon, adamw = ({id(w) for group in part.param_groups for w in group["params"]} for part in optimizer.parts)
    for name, weight in model.named_parameters():
        is_matrix = weight.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name
        assert (id(weight) in muon, id(weight) in adamw) == (is_matrix, not is_matrix), name
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert all(group["lr"] == 0.05 for part in optimizer.parts for group in part.param_groups)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[8, 9, 2]])).loss.backward()
    optimizer.step()
    scheduler.step()
    assert all((weight != before[name]).any() for name, weight in model.named_parameters())
