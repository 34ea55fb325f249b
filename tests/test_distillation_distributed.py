# SPDX-License-Identifier: Apache-2.0
"""Distillation over two processes, and of a student whose code is loaded from its own folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from ddp_worker import build, make_tokenizer, result_of
from distillation_worker import (
    EVALUATED,
    OTHER_ORDER,
    make_teacher,
    make_texts,
    make_trainer,
    metrics_of,
    save_folder,
)
from safetensors.torch import load_file
from sharded_on_cpu import FSDP2

from encdec_slm.trainers.teacher_cache import DistributionSpec
from encdec_slm.trainers.teacher_engines import TransformersEngine
from encdec_slm.trainers.teacher_labels import LabelSettings, label_dataset


TESTS = Path(__file__).parent
RUNS = {
    "off_policy": {"lmbda": 0.0, "kd_ratio": 0.5, "kd_temperature": 2.0, "max_steps": 3},
    "accumulated": {"lmbda": 0.0, "kd_ratio": 0.5, "gradient_accumulation_steps": 2},
    # Sampling this cold is greedy search, and the same in each process.
    "on_policy": {"lmbda": 1.0, "kd_ratio": 0.5, "temperature": 1e-4, "beta": 0.5},
    # Each process has its own random numbers, but all choose the same origin for a batch.
    "mixed": {"lmbda": 0.5, "kd_ratio": 0.5, "temperature": 1e-4, "max_steps": 6},
    # With labels of the teacher in its place.
    "topk": {"beta": 0.5, "kd_ratio": 0.5, "max_steps": 3},
    "sampled": {"beta": 0.0, "kd_ratio": 0.5, "gradient_accumulation_steps": 2},
}
LABELS = {"topk": DistributionSpec("topk", 8), "sampled": DistributionSpec("sampled", 4)}
STUDENT_FROM_ITS_FOLDER = """
import sys
import torch
from transformers import AutoModelForSeq2SeqLM

folder, output_dir = sys.argv[1:]
student = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
assert "encdec_slm" not in sys.modules and type(student).__module__.startswith("transformers_modules."), student

from distillation_worker import history_of, make_trainer

before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
trainer = make_trainer(output_dir, student, lmbda=0.5, kd_ratio=0.5, optim="adamw_torch", learning_rate=1e-2)
assert trainer.model is student
trainer.train()
assert not [name for name, parameter in student.named_parameters() if torch.equal(parameter, before[name])]
trainer.save_model()
torch.save(history_of(trainer), output_dir + "/losses.pt")
"""
SHARDED = """
import json
import sys

from sharded_on_cpu import shard_on_cpu

shard_on_cpu()

from distillation_worker import history_of, make_trainer
from torch.distributed.tensor import DTensor

results = {}
for name, settings in json.loads(sys.argv[2]).items():
    trainer = make_trainer(sys.argv[1] + "/" + name, **settings)
    trainer.train()
    assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    results[name] = {"losses": history_of(trainer), "gradient_norms": history_of(trainer, "grad_norm")}
    trainer.save_model()
if trainer.is_world_process_zero():
    json.dump(results, open(sys.argv[1] + "/result.json", "w"))
trainer.accelerator.end_training()
"""


def run(*command, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), **variables}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Settings of each run, with the folder of its labels."""
    engine, runs = TransformersEngine(make_teacher(), make_tokenizer()), dict(RUNS)
    for name, spec in LABELS.items():
        folder = str(tmp_path_factory.mktemp(name))
        label_dataset(Dataset.from_list(make_texts()), engine, folder, LabelSettings(spec), teacher="tiny")
        runs[name] = {**RUNS[name], "teacher_cache": folder}
    return runs


@pytest.fixture(scope="module")
def shared_out(runs, tmp_path_factory):
    """Results of two processes that share each batch."""
    folder = tmp_path_factory.mktemp("shared_out")
    runs = {name: {**settings, "per_device_train_batch_size": 2} for name, settings in runs.items()}
    run(TESTS / "distillation_worker.py", folder, json.dumps(runs))
    return torch.load(folder / "result.pt")


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one_on_the_same_global_batch(name, runs, shared_out, tmp_path):
    trainer = make_trainer(tmp_path, **runs[name], per_device_train_batch_size=4)
    trainer.train()
    expected = {**result_of(trainer), "metrics": metrics_of(trainer, EVALUATED)}
    assert (expected.pop("num_processes"), shared_out[name].pop("num_processes")) == (1, 2)
    weights = shared_out[name].pop("weights"), expected.pop("weights")
    torch.testing.assert_close(shared_out[name], expected, **OTHER_ORDER)
    torch.testing.assert_close(*weights, **OTHER_ORDER)
    assert len(expected["losses"]) == RUNS[name].get("max_steps", 2) and len(set(expected["losses"])) > 1


@pytest.mark.slow
def test_shards_of_fsdp2_equal_one_process(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    names = ("off_policy", "on_policy")
    runs = {name: {**RUNS[name], "per_device_train_batch_size": 2} for name in names}
    run("-m", "torch.distributed.run", "--nproc_per_node", "2", script, tmp_path, json.dumps(runs), **FSDP2)
    sharded = json.loads((tmp_path / "result.json").read_text())
    for name in names:
        trainer = make_trainer(tmp_path / "one", **RUNS[name], per_device_train_batch_size=4)
        trainer.train()
        expected = result_of(trainer)
        for key in ("losses", "gradient_norms"):
            assert sharded[name][key] == pytest.approx(expected[key], rel=1e-4)
        saved = load_file(tmp_path / name / "model.safetensors")
        torch.testing.assert_close(saved, {key: expected["weights"][key] for key in saved}, **OTHER_ORDER)


def test_a_student_with_code_from_its_folder_equals_one_of_the_package(tmp_path):
    folder, output_dir = tmp_path / "student", tmp_path / "out"
    save_folder(folder, build(), make_tokenizer())
    run("-c", STUDENT_FROM_ITS_FOLDER, folder, output_dir, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert {"modeling_encdec_slm.py", "configuration_encdec_slm.py", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in output_dir.iterdir()
    }
    config = json.loads((output_dir / "config.json").read_text())
    assert config["auto_map"]["AutoModelForSeq2SeqLM"] == "modeling_encdec_slm.EncDecSLMForConditionalGeneration"
    # The same run as that of the installed class.
    student = build()
    settings = {"lmbda": 0.5, "kd_ratio": 0.5, "optim": "adamw_torch", "learning_rate": 1e-2}
    trainer = make_trainer(tmp_path, student, **settings)
    trainer.train()
    assert torch.load(output_dir / "losses.pt") == pytest.approx(result_of(trainer)["losses"])
    # Tied weights are saved once.
    saved = load_file(output_dir / "model.safetensors")
    torch.testing.assert_close(saved, {name: student.state_dict()[name] for name in saved})
