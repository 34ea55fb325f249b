# SPDX-License-Identifier: Apache-2.0
"""What `trainers/trl_hooks.py` takes for granted of TRL; each test names what to look at when a release moves it."""

import configparser
import inspect
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from distillation_worker import make_teacher, make_trainer
from packaging.specifiers import SpecifierSet
from trl.trainer.base_trainer import _BaseTrainer

from encdec_slm.trainers import trl_hooks


ADAPT = "see trainers/trl_hooks.py and adapt"
OVERRIDDEN = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_set_signature_columns_if_needed": ["self"],
    "_get_train_sampler": ["self", "dataset"],
    "_get_eval_sampler": ["self", "eval_dataset"],
    "_tokenize_prompts": ["self", "prompts"],
    "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "has_tool_images"],
}
CALLED_OR_OVERRIDDEN_BY_THE_TRAINER = {
    "_generate": ["self", "prompts"],
    "_prepare_inputs": ["self", "generation_batch"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "prediction_step": ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"],
    "get_eval_dataloader": ["self", "eval_dataset"],
    "log": ["self", "logs", "start_time"],
}


def parameters_of(function):
    return list(inspect.signature(function).parameters)


@pytest.fixture
def trainer(tmp_path):
    return make_trainer(tmp_path, max_steps=1)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_each_overridden_method_is_trls_own(name):
    method = vars(trl.DistillationTrainer).get(name)
    assert method is not None, f"TRL moved `{name}`: EncoderDecoderHooks overrides it; {ADAPT}"
    found = parameters_of(inspect.unwrap(method))
    assert found == OVERRIDDEN[name], f"TRL's `{name}` takes {found} now: EncoderDecoderHooks overrides it; {ADAPT}"
    ours = parameters_of(vars(trl_hooks.EncoderDecoderHooks)[name])
    assert ours == found, f"EncoderDecoderHooks overrides `{name}` with {ours}, but TRL gives it {found}; {ADAPT}"


@pytest.mark.parametrize("name", CALLED_OR_OVERRIDDEN_BY_THE_TRAINER)
def test_each_method_that_the_trainer_builds_on_is_trls_own(name):
    method = vars(trl.DistillationTrainer).get(name)
    assert method is not None, f"TRL moved `{name}`: Seq2SeqDistillationTrainer builds on it; {ADAPT}"
    found = parameters_of(inspect.unwrap(method))
    wanted = CALLED_OR_OVERRIDDEN_BY_THE_TRAINER[name]
    assert found == wanted, f"TRL's `{name}` takes {found} now: Seq2SeqDistillationTrainer builds on it; {ADAPT}"


def test_the_constructor_takes_what_the_trainer_passes_on():
    found = parameters_of(trl.DistillationTrainer.__init__)
    wanted = {"model", "teacher_model", "args", "train_dataset", "eval_dataset", "processing_class"}
    wanted |= {"callbacks", "optimizers", "quantization_config", "peft_config"}
    assert wanted <= set(found), f"TRL's trainer takes no {', '.join(wanted - set(found))} any more; {ADAPT}"
    teacher = inspect.signature(trl.DistillationTrainer.__init__).parameters["teacher_model"]
    assert teacher.default is None, f"TRL needs `teacher_model` now: the hooks prepare the teacher themselves; {ADAPT}"


def test_generate_asks_the_hooks_for_token_ids_and_returns_them_second(trainer):
    calls = []
    trainer._generate_single_turn = lambda *args, **kwargs: calls.append((args, kwargs)) or [[5, 2], [6, 7, 2]]
    result = trainer._generate([[4, 5], [6]])
    assert calls == [(([[4, 5], [6]], None, {}), {})], (
        f"TRL's `_generate` gives `_generate_single_turn` {calls}: EncoderDecoderHooks overrides it; {ADAPT}"
    )
    assert result[:2] == ([[4, 5], [6]], [[5, 2], [6, 7, 2]]), (
        f"TRL's `_generate` does not return (prompt_ids, completion_ids, ...): `student_texts` unpacks it; {ADAPT}"
    )


def test_generate_counts_tokens_under_the_name_that_the_hooks_use(trainer):
    trainer.model.train()
    trainer._generate_single_turn = lambda *args: [[5, 2], [6, 7, 2]]
    trainer._generate([[4, 5], [6]])
    seen = trainer.state.num_input_tokens_seen
    trainer.count_tokens("train", 10)
    assert (seen, trainer.state.num_input_tokens_seen) == (8, 18), (
        f"TRL counts tokens elsewhere than in `state.num_input_tokens_seen`: `count_tokens` adds to it; {ADAPT}"
    )
    assert trainer._metrics["train"]["num_tokens"] == [18], (
        f"TRL logs tokens under another name than `num_tokens`: `count_tokens` writes it; {ADAPT}"
    )


def test_a_generation_batch_is_made_once_per_optimizer_step_from_a_list_of_rows(tmp_path):
    trainer, given = make_trainer(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=3), []

    def make_batch(rows):
        given.append(rows)
        return {"rows": torch.arange(len(rows)), "count": torch.tensor(7)}

    trainer.make_batch = make_batch
    trainer.model.train()
    parts = []
    for step in range(4):
        trainer._step = step
        parts.append(trainer._prepare_inputs([{"step": step}] * 6))
    assert [rows[0]["step"] for rows in given] == [0, 2] and {len(rows) for rows in given} == {6}, (
        f"TRL's `_prepare_inputs` does not ask for one batch per optimizer step: `make_batch` writes texts; {ADAPT}"
    )
    assert torch.equal(torch.cat([part["rows"] for part in parts[:2]]).sort()[0], torch.arange(6)), (
        f"TRL does not split a generation batch by rows any more: `make_batch` returns rows first; {ADAPT}"
    )
    assert {int(part["count"]) for part in parts} == {7}, (
        f"TRL splits 0-dimensional counts of a batch: `make_batch` returns those of all processes; {ADAPT}"
    )


def test_an_evaluation_batch_is_made_for_itself(trainer):
    batches = []
    trainer.make_batch = lambda rows: batches.append(rows) or {"rows": torch.arange(len(rows))}
    trainer.model.eval()
    rows = [{"row": 0}, {"row": 1}]
    inputs = trainer._prepare_inputs(rows)
    assert batches == [rows] and inputs["rows"].tolist() == [0, 1], (
        f"TRL's `_prepare_inputs` changes batches of evaluation: `prediction_step` reads them; {ADAPT}"
    )


@pytest.mark.parametrize(
    "name", ["_metrics", "_dist", "_buffered_inputs", "_forward_redirection", "_step", "generation_config"]
)
def test_the_trainer_has_the_attribute(name, trainer):
    assert hasattr(trainer, name), f"TRL's trainer has no `{name}` any more, which the hooks use; {ADAPT}"


def test_metrics_are_lists_by_mode_and_name(trainer):
    trainer.log_metric("train", "something", 2.0)
    trainer.log_metric("train", "something", 4.0)
    trainer.model.train()
    logs = {}
    trainer.log(logs)
    assert logs.get("something") == 3.0 and not trainer._metrics["train"], (
        f"TRL does not log the means of `_metrics[mode][name]` any more: `log_metric` adds to it; {ADAPT}"
    )


def test_the_distributed_backend_gathers_sharded_weights(trainer):
    signature = inspect.signature(trainer._dist.summon_full_params)
    try:
        signature.bind(trainer.model, recurse=False)
    except TypeError as error:
        pytest.fail(f"TRL's `_dist.summon_full_params` {error}: `write` gives it a model and `recurse`; {ADAPT}")
    with trainer._dist.summon_full_params(trainer.model, recurse=False):
        pass


def test_forward_redirection_calls_the_method_within_the_wrappers_forward(trainer):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.num_forwards = module, 0

        def forward(self, *args, **kwargs):
            self.num_forwards += 1
            return self.module(*args, **kwargs)

    inner = torch.nn.Linear(2, 2)
    wrapper, seen = Wrapper(inner), []
    result = trainer._forward_redirection(
        wrapper, inner, lambda *args, **kwargs: seen.append((args, kwargs, wrapper.num_forwards)) or 5, inner, 3, key=4
    )
    assert result == 5 and seen == [((inner, 3), {"key": 4}, 1)], (
        "TRL's `_forward_redirection(wrapper, wrapped, method, *args, **kwargs)` does not call the method from within "
        f"the wrapper's forward any more: `routed` relies on it; {ADAPT}"
    )


def test_the_train_sampler_repeats_batches_and_has_the_fields_that_are_copied(tmp_path):
    found = parameters_of(trl_hooks.RepeatSampler.__init__)
    wanted = ["self", "data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed"]
    assert found == wanted, f"TRL's RepeatSampler takes {found}: EpochSampler is built from its fields; {ADAPT}"
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    theirs = trl.DistillationTrainer._get_train_sampler(trainer)
    missing = [name for name in wanted[1:] if not hasattr(theirs, name)]
    assert not missing, f"TRL's RepeatSampler has no {', '.join(missing)} any more: EpochSampler copies it; {ADAPT}"
    assert (theirs.num_samples, theirs.batch_size, theirs.repeat_count) == (16, 8, 2), (
        f"TRL's sampler does not repeat whole generation batches: `_get_train_sampler` checks their size; {ADAPT}"
    )
    ours = trainer._get_train_sampler()
    assert list(ours) == list(theirs), f"EpochSampler orders rows unlike TRL's RepeatSampler in epoch 0; {ADAPT}"


def test_the_order_of_rows_follows_from_the_number_of_the_epoch(trainer):
    sampler = trainer._get_train_sampler()
    orders = []
    for epoch in (0, 1, 0, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[:2] == orders[2:] and orders[0] != orders[1], (
        f"RepeatSampler does not draw from its `generator` and `seed`: EpochSampler seeds it; {ADAPT}"
    )


def test_evaluation_keeps_the_order_of_the_rows(trainer):
    rows = Dataset.from_list([{"row": index} for index in range(9)])
    assert list(trainer._get_eval_sampler(rows)) == list(range(9))


def test_the_chunked_kernel_takes_its_arguments_in_the_order_of_the_call():
    wanted = [
        *("ctx", "student_hidden", "student_weight", "student_bias"),
        *("teacher_hidden", "teacher_weight", "teacher_bias", "beta", "temperature"),
        *("student_logit_scale", "student_final_logit_softcapping"),
        *("teacher_logit_scale", "teacher_final_logit_softcapping"),
    ]
    found = parameters_of(trl_hooks.ChunkedDivergenceFunction.forward)
    assert found == wanted, (
        f"TRL's ChunkedDivergenceFunction takes {', '.join(found)}: `kernel_divergence` gives its arguments by "
        f"position; {ADAPT}"
    )


def test_the_model_for_generation_is_unwrapped_with_the_settings_that_are_passed(trainer):
    found = parameters_of(trl_hooks.unwrap_model_for_generation)
    wanted = {"gather_deepspeed3_params", "gradient_checkpointing_kwargs"}
    assert found[:2] == ["model", "accelerator"] and wanted <= set(found), (
        f"TRL's `unwrap_model_for_generation` takes {found}: `write` calls it; {ADAPT}"
    )
    writers = []
    generate = trainer.model.generate
    trainer.model.generate = lambda *args, **kwargs: writers.append(kwargs) or generate(*args, **kwargs)
    trainer.write(trainer.model_wrapped, [[4, 5]], trainer.generation_config)
    assert len(writers) == 1, f"TRL's `unwrap_model_for_generation` yields another model; {ADAPT}"


def test_completions_are_printed_with_further_columns(capsys):
    found = parameters_of(trl_hooks.print_prompt_completions_sample)
    wanted = ["prompts", "completions", "rewards", "advantages", "step", "num_samples", "extra"]
    assert found == wanted, f"TRL's `print_prompt_completions_sample` takes {found}: `log_texts` calls it; {ADAPT}"
    trl_hooks.print_prompt_completions_sample(
        ["a source"], ["a text"], {}, None, 3, None, extra={"Teacher": ["another"], "Gold": ["a third"]}
    )
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("a source", "a text", "Teacher", "another", "Gold", "a third")), (
        f"TRL's `print_prompt_completions_sample` does not print `extra`: `log_texts` needs it; {ADAPT}"
    )


def test_deepspeed_prepares_a_teacher_given_model_and_accelerator():
    found = parameters_of(trl_hooks.prepare_deepspeed)
    assert found == ["model", "accelerator"], f"TRL's `prepare_deepspeed` takes {found}: see prepared_teacher; {ADAPT}"


def test_a_teacher_under_deepspeed_is_prepared_by_trl(trainer, monkeypatch):
    teacher = make_teacher()
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(trl_hooks, "prepare_deepspeed", lambda model, accelerator: ("engine", model, accelerator))
    assert trainer.prepared_teacher(teacher) == ("engine", teacher, trainer.accelerator)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_columns_of_encoded_rows_are_the_signature(trainer):
    trainer._signature_columns = None
    trainer._set_signature_columns_if_needed()
    assert set(trainer.train_dataset.column_names) <= set(trainer._signature_columns)


def test_trl_writes_the_card_before_a_checkpoint():
    checkpointing = vars(trl.DistillationTrainer).get("_save_checkpoint")
    assert checkpointing is not None and "create_model_card" in checkpointing.__code__.co_names, (
        f"TRL does not write the card with each checkpoint any more: `create_model_card` is overridden; {ADAPT}"
    )
    found = parameters_of(_BaseTrainer.create_model_card)
    wanted = ["self", "model_name", "dataset_name", "tags"]
    assert found == wanted, (
        f"TRL's `create_model_card` takes {found}: Seq2SeqDistillationTrainer overrides it; {ADAPT}"
    )


def test_the_installed_trl_lies_in_the_range_of_setup_cfg():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parent.parent / "setup.cfg")
    (requirement,) = (line for line in setup["options.extras_require"]["train"].splitlines() if line.startswith("trl"))
    supported = SpecifierSet(requirement.removeprefix("trl"))
    assert supported.contains(version("trl")), (
        f"trl {version('trl')} is installed, but setup.cfg supports {supported}. Install one of these, or run this "
        "file's tests with the new one and widen the range."
    )
    assert "1.15" not in supported and "2.0" not in supported
