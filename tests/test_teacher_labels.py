# SPDX-License-Identifier: Apache-2.0
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import build_tokenizer
from encdec_slm.trainers.teacher_cache import DistributionSpec, TeacherCache
from encdec_slm.trainers.teacher_engines import (
    CompletionSettings,
    CTranslate2Engine,
    TransformersEngine,
    batch_by_length,
)
from encdec_slm.trainers.teacher_labels import LabelSettings, label_dataset


ROWS = [
    {"prompt": f"w{number % 40 + 5} w7 " * (1 + number % 3), "completion": f"w{number % 9 + 9} w4"}
    for number in range(11)
]


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.4, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return TransformersEngine(LlamaForCausalLM(config), build_tokenizer(ends_sources=False), batch_tokens=64)


@pytest.fixture(scope="module")
def ctranslate2_engine(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    engine.model.save_pretrained(folder)
    engine.tokenizer.save_pretrained(folder)
    return CTranslate2Engine(folder, engine.tokenizer, batch_tokens=64, quantization="float32")


def log_probs_of(engine, prompt_ids, target_ids):
    with torch.no_grad():
        logits = engine.model(torch.tensor([[*prompt_ids, *target_ids]])).logits[0]
    return logits[len(prompt_ids) - 1 : -1].log_softmax(-1)


def label(engine, folder, dataset=ROWS, rows=None, **settings):
    settings = {"distributions": DistributionSpec("topk", 97), "rows_per_shard": 4, **settings}
    dataset = Dataset.from_list(dataset) if isinstance(dataset, list) else dataset
    return label_dataset(dataset, engine, folder, LabelSettings(**settings), teacher="t", rows=rows)


@pytest.mark.parametrize("streams", [False, True])
def test_distributions_are_those_of_the_teacher_row_by_row(engine, tmp_path, streams):
    dataset = Dataset.from_list(ROWS)
    dataset = dataset.to_iterable_dataset() if streams else dataset
    cache = label(engine, tmp_path, dataset)
    assert cache.num_rows == len(ROWS)
    for row, example in zip(ROWS, cache.read(0, len(ROWS)), strict=True):
        prompt_ids = engine.tokenizer(row["prompt"])["input_ids"]
        target_ids = [*engine.tokenizer(row["completion"], add_special_tokens=False)["input_ids"], 2]
        assert example["label_target_ids"] == target_ids
        expected = log_probs_of(engine, prompt_ids, target_ids)
        ids = torch.tensor(example["label_ids"]).view(len(target_ids), 97)
        found = torch.tensor(example["label_log_probs"]).view(len(target_ids), 97)
        torch.testing.assert_close(found, expected.gather(1, ids), rtol=1e-3, atol=2e-3)
        assert max(example["label_tail"]) < 1e-5


def test_the_top_k_are_the_most_probable_and_the_tail_is_the_rest(engine, tmp_path):
    cache = label(engine, tmp_path, distributions=DistributionSpec("topk", 5))
    example = next(cache.read(0, 1))
    prompt_ids = engine.tokenizer(ROWS[0]["prompt"])["input_ids"]
    expected = log_probs_of(engine, prompt_ids, example["label_target_ids"])
    assert torch.tensor(example["label_ids"]).view(-1, 5).equal(expected.topk(5).indices)
    mass = 1 - expected.topk(5).values.exp().sum(-1)
    torch.testing.assert_close(torch.tensor(example["label_tail"]), mass, atol=2e-3, rtol=0)


def test_draws_are_unbiased(engine, tmp_path):
    num_draws, num_rows = 60, 200
    rows = [ROWS[1]] * num_rows
    cache = label(engine, tmp_path, rows, distributions=DistributionSpec("sampled", num_draws), rows_per_shard=100)
    target_ids = next(cache.read(0, 1))["label_target_ids"]
    shares = torch.zeros(len(target_ids), 97)
    for example in cache.read(0, num_rows):
        start = 0
        for position, number in enumerate(example["label_num_ids"]):
            ids = example["label_ids"][start : start + number]
            counts = example["label_counts"][start : start + number]
            assert sum(counts) == num_draws
            shares[position, ids] += torch.tensor(counts, dtype=torch.float) / (num_draws * num_rows)
            start += number
    expected = log_probs_of(engine, engine.tokenizer(ROWS[1]["prompt"])["input_ids"], target_ids).exp()
    # Five standard errors of a share of 12,000 draws.
    assert ((shares - expected).abs() < 5 * (expected / (num_draws * num_rows)).sqrt() + 1e-3).all()


def test_completions_are_what_the_model_generates(engine, tmp_path):
    settings = CompletionSettings(max_new_tokens=6)
    cache = label(engine, tmp_path, completions=settings, distributions=DistributionSpec("topk", 5))
    for row, example in zip(ROWS, cache.read(0, len(ROWS)), strict=True):
        inputs = engine.tokenizer(row["prompt"], return_tensors="pt")
        ids = engine.model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)[0]
        new_ids = ids[inputs["input_ids"].shape[1] :].tolist()
        is_complete = 2 in new_ids
        new_ids = new_ids[: new_ids.index(2)] if is_complete else new_ids
        text = engine.tokenizer.decode(new_ids, skip_special_tokens=True)
        assert example["completion"] == text
        assert (example["label_target_ids"][-1:] == [2]) == is_complete
        assert len(example["label_num_ids"]) == len(example["label_target_ids"])


def test_ctranslate2_predicts_and_generates_as_transformers(engine, ctranslate2_engine):
    prompts = [engine.tokenizer(row["prompt"])["input_ids"] for row in ROWS]
    targets = [[*engine.tokenizer(row["completion"])["input_ids"], 2] for row in ROWS]
    spec, seeds = DistributionSpec("topk", 97), [0] * len(ROWS)
    pairs = [one.predict(prompts, targets, spec, seeds) for one in (engine, ctranslate2_engine)]
    for expected, found in zip(*pairs, strict=True):
        for ids, values, other_ids, other_values in zip(*expected[:2], *found[:2], strict=True):
            order, other_order = np.argsort(ids), np.argsort(other_ids)
            np.testing.assert_allclose(other_values[other_order], values[order], atol=1e-4)
    settings = CompletionSettings(max_new_tokens=6)
    assert ctranslate2_engine.generate(prompts, settings) == engine.generate(prompts, settings)


def test_a_beginning_that_all_prompts_share_changes_nothing(engine):
    shared = [5, 6, 7, 8]
    prompts = [[*shared, *engine.tokenizer(row["prompt"])["input_ids"]] for row in ROWS]
    targets = [[*engine.tokenizer(row["completion"])["input_ids"], 2] for row in ROWS]
    spec, drawn = DistributionSpec("topk", 97), CompletionSettings(max_new_tokens=6)
    found = engine.predict(prompts, targets, spec, [0] * len(ROWS)), engine.generate(prompts, drawn)
    for index, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        expected = log_probs_of(engine, prompt, target)
        values = expected.gather(1, torch.tensor(np.array(found[0][index].ids)))
        np.testing.assert_allclose(np.array(found[0][index].log_probs), values, atol=1e-4)
        assert engine.generate([prompt], drawn)[0] == found[1][index]


def test_several_completions_are_drawn_for_each_prompt(engine, tmp_path):
    settings = CompletionSettings(max_new_tokens=6, num_completions=3, temperature=1.0)
    examples = list(label(engine, tmp_path, completions=settings, distributions=None).read(0, len(ROWS)))
    assert [(example["row"], example["sample"]) for example in examples] == [
        (r, s) for r in range(11) for s in range(3)
    ]
    assert len({example["completion"] for example in examples if example["row"] == 0}) > 1


def test_ranges_of_rows_together_are_the_whole_cache(engine, tmp_path):
    whole = label(engine, tmp_path / "whole")
    for rows in ((4, 11), (0, 4)):
        assert label(engine, tmp_path / "parts", rows=rows) is None
    parts = TeacherCache(tmp_path / "parts")
    for one, other in zip(whole.read(0, 11), parts.read(0, 11), strict=True):
        assert one["label_ids"][:3] == other["label_ids"][:3]
        np.testing.assert_allclose(one["label_log_probs"], other["label_log_probs"], atol=5e-3)


def test_a_second_run_labels_nothing_again_and_refuses_changed_rows(engine, tmp_path):
    label(engine, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    label(engine, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    changed = [dict(row) for row in ROWS]
    changed[6]["prompt"] = "w9"
    with pytest.raises(ValueError, match="Row 6"):
        label(engine, tmp_path, changed)


def test_another_teacher_or_other_settings_are_refused_by_name(engine, tmp_path):
    label(engine, tmp_path)
    torch.manual_seed(1)
    other = TransformersEngine(LlamaForCausalLM(engine.model.config), engine.tokenizer)
    with pytest.raises(ValueError, match=r"labels-0000000000.*teacher_fingerprint"):
        label(other, tmp_path)
    with pytest.raises(ValueError, match="distributions"):
        label(engine, tmp_path, distributions=DistributionSpec("topk", 3))


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "w5 " * 70, "completion": "w6"}, "64"),
        ({"prompt": "", "completion": "w6"}, "empty"),
        ({"prompt": "w5", "completion": None}, "completion"),
        ({"source": "w5", "target": "w6"}, "prompt"),
    ],
)
def test_a_row_that_the_teacher_cannot_read_is_named(engine, tmp_path, row, named):
    with pytest.raises(ValueError, match=named):
        label(engine, tmp_path, [row])


def test_predictions_that_are_not_numbers_are_refused(engine, tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(engine.model.config)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="nan"):
        label(TransformersEngine(model, engine.tokenizer), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_batches_hold_similar_lengths_within_their_budget():
    lengths = [5, 90, 7, 6, 88, 200]
    batches = list(batch_by_length(lengths, 180))
    assert sorted(index for batch in batches for index in batch) == list(range(6))
    assert batches[0] == [5]
    assert all(len(batch) * max(lengths[index] for index in batch) <= 180 for batch in batches[1:])


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_resumes_without_a_lost_or_doubled_row(engine, tmp_path):
    engine.model.save_pretrained(tmp_path / "model")
    engine.tokenizer.save_pretrained(tmp_path / "model")
    code = textwrap.dedent("""
        import sys
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from encdec_slm.trainers.teacher_cache import DistributionSpec
        from encdec_slm.trainers.teacher_engines import TransformersEngine
        from encdec_slm.trainers.teacher_labels import LabelSettings, label_dataset

        engine = TransformersEngine(
            AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
        )
        rows = Dataset.from_list([{"prompt": f"w{n % 40 + 5} w7", "completion": "w9 w4"} for n in range(400)])
        settings = LabelSettings(distributions=DistributionSpec("topk", 97), rows_per_shard=2)
        print("ready", flush=True)
        label_dataset(rows, engine, sys.argv[2], settings, teacher="t")
    """)
    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "cache")]
    generator = random.Random(0)
    for _ in range(10):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        process.stdout.readline()
        time.sleep(generator.uniform(0, 0.4))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    subprocess.run(command, check=True, capture_output=True)
    cache = TeacherCache(tmp_path / "cache")
    assert [example["row"] for example in cache.read(0, 400)] == list(range(400))
