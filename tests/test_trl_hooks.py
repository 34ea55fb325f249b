# SPDX-License-Identifier: Apache-2.0
"""Private behavior of TRL that `Seq2SeqDistillationTrainer` relies on; a failure names what to adapt."""

import configparser
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from distillation_worker import make_trainer
from packaging.specifiers import SpecifierSet
from trl import DistillationTrainer


@pytest.fixture
def trainer(tmp_path):
    return make_trainer(tmp_path, max_steps=1)


def test_a_batch_is_made_once_per_optimizer_step_and_split_by_rows(tmp_path):
    trainer, calls = make_trainer(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=3), []

    def make_batch(rows):
        calls.append(rows)
        return {"rows": torch.arange(len(rows)), "names": list(range(len(rows))), "count": torch.tensor(7)}

    trainer._generate_and_score_completions = make_batch
    trainer.model.train()
    parts = []
    for step in range(4):
        trainer._step = step
        parts.append(trainer._prepare_inputs([{"step": step}] * 6))
    assert [(rows[0]["step"], len(rows)) for rows in calls] == [(0, 6), (2, 6)]
    assert torch.equal(torch.cat([part["rows"] for part in parts[:2]]).sort()[0], torch.arange(6))
    assert [part["rows"].tolist() for part in parts] == [part["names"] for part in parts]
    assert {int(part["count"]) for part in parts} == {7}
    trainer.model.eval()
    rows = [{"row": 0}, {"row": 1}]
    assert trainer._prepare_inputs(rows)["rows"].tolist() == [0, 1] and calls[-1] == rows


def test_metrics_are_averaged_when_they_are_logged(trainer):
    trainer._metrics["train"]["something"] += [2.0, 4.0]
    trainer.model.train()
    logs = {}
    trainer.log(logs)
    assert logs["something"] == 3.0 and not trainer._metrics["train"]


def test_sharded_weights_are_gathered_without_recursion(trainer):
    with trainer._dist.summon_full_params(trainer.model, recurse=False):
        pass


def test_a_function_is_called_inside_the_forward_of_the_wrapper(trainer):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.num_forwards = module, 0

        def forward(self, *args, **kwargs):
            self.num_forwards += 1
            return self.module(*args, **kwargs)

    inner = torch.nn.Linear(2, 2)
    wrapper, seen = Wrapper(inner), []
    function = lambda *args, **kwargs: seen.append((args, kwargs, wrapper.num_forwards)) or 5  # noqa: E731
    assert trainer._forward_redirection(wrapper, inner, function, inner, 3, key=4) == 5
    assert seen == [((inner, 3), {"key": 4}, 1)]


def test_the_order_of_rows_is_trls_in_the_first_epoch_and_depends_on_the_epoch(tmp_path):
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    sampler, orders = trainer._get_train_sampler(), []
    assert list(sampler) == list(DistillationTrainer._get_train_sampler(trainer))
    for epoch in (0, 1, 0, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[:2] == orders[2:] and orders[0] != orders[1]
    other = make_trainer(tmp_path, data_seed=7)._get_train_sampler()
    assert list(other) != list(make_trainer(tmp_path)._get_train_sampler())


def test_evaluation_keeps_the_order_of_the_rows(trainer):
    rows = Dataset.from_list([{"row": index} for index in range(9)])
    assert list(trainer._get_eval_sampler(rows)) == list(range(9))


def test_columns_of_encoded_rows_are_not_removed(trainer):
    trainer._set_signature_columns_if_needed()
    assert set(trainer.train_dataset.column_names) <= set(trainer._signature_columns)


def test_the_installed_trl_is_in_the_range_of_setup_cfg():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parent.parent / "setup.cfg")
    (requirement,) = (line for line in setup["options.extras_require"]["train"].splitlines() if line.startswith("trl"))
    supported = SpecifierSet(requirement.removeprefix("trl"))
    assert supported.contains(version("trl"))
    assert "1.15" not in supported and "2.0" not in supported
