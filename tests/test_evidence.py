# SPDX-License-Identifier: Apache-2.0
"""The study of encoder-decoders and decoder-only models, with tiny models, and its published tables."""

import collections
import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_outputs import CausalLMOutput

from encdec_slm.configuration.sizes import build_model, num_parameters
from encdec_slm.trainers.new_models import train_tokenizer


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import evidence  # noqa: E402
import evidence_measures  # noqa: E402
import evidence_statistics  # noqa: E402
import evidence_vision  # noqa: E402
import shell_results  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["list all files", "ls -a"], 300, 64)


@pytest.mark.parametrize("page", evidence.PAGES, ids=lambda page: page.name)
def test_docs_state_what_the_results_file_says(page):
    text = page.read_text(encoding="utf-8")
    assert shell_results.update_blocks(text, evidence.PAGES[page], evidence.load_results()) == text


@pytest.mark.parametrize("vocab_size", [300, 2048])
def test_all_models_have_equal_numbers_of_parameters(tokenizer, vocab_size, monkeypatch):
    fields = {**evidence.SHAPE, "vocab_size": vocab_size}
    monkeypatch.setattr(evidence, "SHAPE", fields)
    counts = [num_parameters(evidence.build_config(model, tokenizer)) for model in evidence.MODELS]
    assert max(counts) <= 1.01 * min(counts)


@pytest.mark.parametrize("supervise_source", [False, True])
def test_decoder_only_models_learn_the_source_only_if_asked(tokenizer, supervise_source):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = evidence.CHAT_TEMPLATE
    dataset = Dataset.from_list([{"source": "list", "target": "ls -a"}])
    row = evidence.encode_joined_rows(dataset, tokenizer, 10, 10, supervise_source)[0]
    source, target = (tokenizer(text)["input_ids"][:-1] for text in ("list", "ls -a"))
    assert row["input_ids"] == [*source, tokenizer.bos_token_id, *target, tokenizer.eos_token_id]
    length = len(source) + 1
    assert row["labels"][length:] == row["input_ids"][length:]
    assert row["labels"][:length] == (row["input_ids"][:length] if supervise_source else [-100] * length)


@pytest.mark.parametrize("model", evidence.MODELS)
def test_training_flops_are_those_that_torch_counts(tokenizer, model, monkeypatch):
    monkeypatch.setattr(evidence, "PRESET", "tiny")
    config = evidence.build_config(model, tokenizer)
    rows, source_length, target_length = 3, 11, 5
    network = build_model(config, attn_implementation="eager")
    source, target = torch.ones(rows, source_length, dtype=torch.int), torch.ones(rows, target_length).long()
    inputs = {"input_ids": source.long(), "labels": target}
    if not config.is_encoder_decoder:
        inputs = {"input_ids": torch.cat((source.long(), target), 1)}
        inputs["labels"] = inputs["input_ids"]
    with FlopCounterMode(display=False) as counter:
        network(**inputs).loss.backward()
    counted = evidence_measures.count_training_flops(config, [(source_length, target_length)] * rows)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.fixture(scope="module")
def visual_task():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence_vision, "NUM_ROWS", 8)
        patch.setattr(evidence_vision, "NUM_HELD_OUT_ROWS", 2)
        return evidence_vision.load_rows(evidence.TASKS[evidence.VISUAL], evidence.LAYERS)


@pytest.mark.parametrize("model", [evidence.OURS, evidence.DECODER_ONLY])
def test_visual_models_learn_the_same_targets(visual_task, model):
    splits, images = visual_task
    config = evidence.build_config(model, images)
    assert num_parameters(config) == pytest.approx(num_parameters(images.config), rel=0.01)
    network = build_model(config, attn_implementation="eager").eval()
    rows = splits["test"]
    losses, num_tokens = evidence_vision.row_losses(network, images, rows)
    assert num_tokens == [row["lengths"][1] for row in rows]
    alone = [evidence_vision.row_losses(network, images, [row])[0][0] for row in rows]
    assert alone == pytest.approx(losses, rel=1e-4)
    assert set(evidence_vision.score_answers(network, images, rows, 4)) <= {0.0, 1.0}
    # One row has no padding, so torch counts what is counted here.
    with FlopCounterMode(display=False) as counter:
        network(**evidence_vision.RowCollator(images.encoder, model == evidence.OURS)(rows[:1])).loss.backward()
    counted = evidence_measures.count_training_flops(config, [rows[0]["lengths"]])
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Run tiny models of one task, two steps each; returns the lines of the results file."""
    rows = [{"source": f"list folder {n}", "target": f"ls -l {n}", "origin": "nl2bash"} for n in range(20)]
    long = {"source": "list " * 60, "target": "ls", "origin": "nl2bash"}
    for name in ("train", "validation", "test_random"):
        lines = [json.dumps(row) + "\n" for row in [*rows, long, {**long, "origin": "fig"}]]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    sizes = {"num_rows": 30, "batch_size": 16, "vocab_size": 300, "max_source_length": 40, "max_test_rows": 10}
    changed = {
        "TASKS": {"shell": dataclasses.replace(evidence.TASKS["shell"], **sizes)},
        "ARMS": [arm for arm in evidence.ARMS if arm.task == "shell" and arm.budget == "equal-rows"],
        **{"PRESET": "tiny", "LEARNING_RATES": (1e-3, 2e-3), "LEARNING_RATE_LIMITS": (1e-3, 2e-3)},
        **{"TEACHER_WIDTH": {}, "RESULTS": tmp_path / "results.jsonl"},
    }
    for name, value in changed.items():
        monkeypatch.setattr(evidence, name, value)

    def study(*options):
        evidence.main(["--data", f"shell={tmp_path}", "--output_dir", str(tmp_path / "out"), *options])
        return list(map(json.loads, evidence.RESULTS.read_text().splitlines()))

    return study


@pytest.mark.slow
def test_a_study_runs_what_is_missing_and_can_repeat_a_run(study):
    only = ("--only", "* 2/3-1/3 cross-entropy *")
    study("--seeds", "0", "--only", "* 2/3-1/3 cross-entropy * 0.001 *")
    lines = study("--seeds", "0", "1", *only)
    assert [line["settings"]["seed"] for line in lines] == [0, 0, 1]
    before = evidence.RESULTS.stat().st_mtime_ns
    study("--seeds", "0", "1", *only)
    assert evidence.RESULTS.stat().st_mtime_ns == before
    study("--seeds", "0", *only, "--rerun")
    lines = study("--seeds", "0", "--only", "* decoder-only cross-entropy * 0.001 0")
    assert len(lines) == 4 and len({json.dumps(line["settings"]) for line in lines}) == 4
    first, last = lines[0], lines[-1]
    assert (first["settings"]["model"], last["settings"]["model"]) == (evidence.OURS, evidence.DECODER_ONLY)
    assert first["num_rows_left_out"] == {"train": 1, "validation": 2, "test": 2}
    # All models are trained and measured on the same tokens.
    for name in ("num_source_tokens", "num_target_tokens", "num_train_rows"):
        assert first[name] == last[name]
    assert first["rows"]["num_tokens"] == last["rows"]["num_tokens"] and len(first["rows"]["nlc2cmd"]) == 10
    assert 2 < first["validation_loss"] < 7 and 2 < last["validation_loss"] < 7


@pytest.mark.slow
def test_students_learn_from_a_teacher_of_the_study(study, monkeypatch):
    models = (evidence.OURS, evidence.DECODER_ONLY, evidence.TEACHER)
    monkeypatch.setattr(evidence, "ARMS", [arm for arm in evidence.ARMS if arm.model in models])
    with pytest.raises(SystemExit, match="teacher"):
        study("--seeds", "0", "--only", "* adapted *")
    lines = {(line["settings"]["model"], line["settings"]["training"]): line for line in study("--seeds", "0")}
    assert set(lines) == {(arm.model, arm.training) for arm in evidence.ARMS}
    teacher = lines.pop((evidence.TEACHER, "cross-entropy"))
    assert {line["num_train_rows"] for line in lines.values()} == {teacher["num_train_rows"] / 3}
    for name in ("num_source_tokens", "num_target_tokens"):
        assert len({line[name] for line in lines.values()}) == 1


def test_both_kinds_of_students_have_the_same_distillation_loss():
    torch.manual_seed(0)
    logits, teacher_logits = torch.randn(2, 4, 9), torch.randn(2, 4, 9)
    labels = torch.tensor([[-100, -100, 3, 4], [-100, 5, 2, -100]])
    models = [
        lambda *args, _logits=logits, **kwargs: CausalLMOutput(logits=_logits) for logits in (logits, teacher_logits)
    ]
    trainer = object.__new__(evidence.CausalDistillationTrainer)
    trainer.teacher, trainer.beta = models[1], 0.0
    inputs = {"input_ids": None, "attention_mask": None, "labels": labels}
    chosen = labels[:, 1:] >= 0
    pairs = logits[:, :-1][chosen], teacher_logits[:, :-1][chosen]
    expected = evidence.KD_RATIO * torch.nn.functional.kl_div(
        pairs[0].log_softmax(-1), pairs[1].log_softmax(-1), reduction="batchmean", log_target=True
    ) + (1 - evidence.KD_RATIO) * torch.nn.functional.cross_entropy(pairs[0], labels[:, 1:][chosen])
    torch.testing.assert_close(trainer.compute_loss(models[0], inputs), expected)


def test_the_grid_is_extended_while_the_best_learning_rate_is_at_its_edge():
    arm = evidence.Arm("shell", evidence.OURS)

    def list_rates(losses):
        results = {
            json.dumps(run.settings(), sort_keys=True): {"validation_loss": loss}
            for run, loss in ((evidence.Run(arm, rate, 0), loss) for rate, loss in losses.items())
        }
        return evidence.list_learning_rates(arm, results), evidence.choose_learning_rate(arm, results)

    assert list_rates({}) == ([1.5e-3, 3e-3, 6e-3], None)
    losses = {1.5e-3: 3.0, 3e-3: 2.0, 6e-3: 1.0}
    assert list_rates(losses) == ([1.5e-3, 3e-3, 6e-3, 1.2e-2], None)
    assert list_rates(losses | {1.2e-2: 4.0})[1] == 6e-3
    assert list_rates({**losses, 1.2e-2: 0.5}) == ([1.5e-3, 3e-3, 6e-3, 1.2e-2], 1.2e-2)
    assert list_rates({1.5e-3: 1.0, 3e-3: 2.0, 6e-3: 3.0}) == ([7.5e-4, 1.5e-3, 3e-3, 6e-3], None)


def test_the_order_of_rows_depends_on_the_seed_alone():
    rows = [{"number": number, "lengths": (number % 4, 1)} for number in range(10)]
    drawn = evidence.draw_rows(rows, 25, batch_size=4, seed=1)
    assert drawn == evidence.draw_rows(rows, 25, 4, seed=1) != evidence.draw_rows(rows, 25, 4, seed=2)
    counts = collections.Counter(row["number"] for row in drawn)
    assert len(drawn) == 25 and set(counts) == set(range(10)) and max(counts.values()) == 3


# Report


def build_results(shift):
    """Results of two arms; `shift` is what the second loses on each row, by seed."""
    arms = [evidence.Arm("shell", model) for model in (evidence.OURS, evidence.DECODER_ONLY)]
    results = {}
    for arm in arms:
        for run in [evidence.Run(arm, rate, seed) for rate in evidence.LEARNING_RATES for seed in range(3)]:
            worse = shift[run.seed] if arm.model == evidence.DECODER_ONLY else 0
            rows = {
                "num_tokens": [2] * 50,
                "loss": [number % 5 + 2 * worse for number in range(50)],
                "nlc2cmd": [number % 7 - 10 * worse for number in range(50)],
            }
            numbers = {"num_parameters": 2_000_000, "num_train_rows": 64, "training_flops": 10**12}
            numbers |= {"num_source_tokens": 9, "num_target_tokens": 9, "training_cpu_seconds": 1}
            line = {
                "settings": run.settings(),
                "rows": rows,
                "validation_loss": abs(run.learning_rate - 3e-3),
                **numbers,
            }
            results[json.dumps(run.settings(), sort_keys=True)] = line
    return results, arms


@pytest.mark.parametrize(
    ("shift", "verdict"),
    [
        ((0.5, 0.51, 0.49), evidence_statistics.HOLDS),
        ((-0.5, -0.51, -0.49), evidence_statistics.FAILS),
        ((0.0, 0.5, 1.0), evidence_statistics.UNKNOWN),
        ((0.0, 0.0, 0.0), evidence_statistics.UNKNOWN),
    ],
)
def test_claims_are_judged_by_both_intervals(shift, verdict):
    results, arms = build_results(shift)
    found = [evidence.collect(arm, results) for arm in arms]
    for measure, sign in (("loss", -1), ("nlc2cmd", 10)):
        result = evidence_statistics.compare(*found, measure)
        assert result["verdict"] == verdict
        assert result["difference"] == pytest.approx(sign * sum(shift) / 3)


def test_what_is_not_finished_is_shown_as_missing():
    results, arms = build_results((0.5, 0.5, 0.5))
    assert evidence_statistics.compare(*(evidence.collect(arm, {}) for arm in arms), "loss") is None
    run = evidence.Run(arms[0], evidence.LEARNING_RATES[1], 1)
    del results[json.dumps(run.settings(), sort_keys=True)]
    table = evidence.quality_table(results).splitlines()
    assert "| 2 of 5 |" in table[2] and "| 0.003 |" in table[2] and evidence_statistics.MISSING in table[4]
    assert evidence_statistics.HOLDS not in evidence.claim_table(results)
    assert len(evidence.draw_plot(results).axes) == 2 and evidence.draw_plot({}) is None
