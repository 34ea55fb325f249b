# SPDX-License-Identifier: Apache-2.0
"""The loss by its definition, and unmodified training tools on top of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_worker import build, history_of, make_rows, make_tokenizer, make_trainer
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq
from transformers.trainer_utils import get_last_checkpoint

from encdec_slm import EncDecSLMForConditionalGeneration


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# PEFT 0.21 asks for `is_gradient_checkpointing`, a name that transformers 5.23 deprecates.
peft_uses_a_deprecated_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def make_batch(rows=None, **kwargs):
    """Padded source, mask and labels as the collator makes them, without decoder input."""
    return dict(DataCollatorForSeq2Seq(make_tokenizer(), **kwargs)(rows or make_rows(5)))


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def shift_right(labels):
    """The decoder's input for `labels`: start token 1 in front, last label off, padding 0 for what is ignored."""
    shifted = torch.full_like(labels, 1)
    shifted[:, 1:] = labels[:, :-1]
    shifted[shifted == -100] = 0
    return shifted


def summed_cross_entropy(model, batch, label_smoothing=0.0):
    """Summed nats and the number of supervised tokens, from logits of explicitly shifted input."""
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = model(**source, decoder_input_ids=shift_right(batch["labels"])).logits
    supervised = batch["labels"] != -100
    nats = F.cross_entropy(
        logits[supervised], batch["labels"][supervised], reduction="sum", label_smoothing=label_smoothing
    )
    return nats, supervised.sum()


def test_labels_are_shifted_exactly_once():
    model, batch = build(), make_batch()
    outputs = model(**batch)
    nats, count = summed_cross_entropy(model, batch)
    torch.testing.assert_close(outputs.loss, nats / count)
    explicit = model(**batch, decoder_input_ids=shift_right(batch["labels"]))
    torch.testing.assert_close(explicit.loss, outputs.loss)
    torch.testing.assert_close(explicit.logits, outputs.logits)
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(batch["labels"]), shift_right(batch["labels"]))


def test_the_collator_makes_the_decoder_input_that_the_model_makes():
    model = build()
    plain, with_model = make_batch(), make_batch(model=model)
    assert with_model.keys() - plain.keys() == {"decoder_input_ids"}
    torch.testing.assert_close(model(**with_model).loss, model(**plain).loss)


def test_ignored_labels_change_no_loss_and_no_gradient():
    model, batch = build(), make_batch()
    model(**batch).loss.backward()
    expected = gradients_of(model)
    longer = {**batch, "labels": F.pad(batch["labels"], (0, 3), value=-100)}
    model.zero_grad()
    loss = model(**longer).loss
    loss.backward()
    torch.testing.assert_close(loss, model(**batch).loss)
    torch.testing.assert_close(gradients_of(model), expected)


@pytest.mark.parametrize("as_given", [int, float, torch.tensor, lambda count: torch.tensor(float(count))])
def test_the_loss_is_divided_by_the_number_of_items_that_is_given(as_given):
    model, batch = build(), make_batch()
    nats, count = summed_cross_entropy(model, batch)
    loss = model(**batch, num_items_in_batch=as_given(3 * count.item())).loss
    torch.testing.assert_close(loss, nats / (3 * count))


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)], ids=["uncounted", "0", "tensor(0)"])
def test_a_batch_without_supervision_has_loss_0_and_finite_gradients(items):
    model, batch = build(), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch, num_items_in_batch=items).loss
    assert loss.shape == () and loss.item() == 0
    loss.backward()
    for name, gradient in gradients_of(model).items():
        assert torch.equal(gradient, torch.zeros_like(gradient)), name


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_trainers_first_loss_is_the_definition_over_the_whole_batch(label_smoothing, tmp_path):
    rows = make_rows(8)
    trainer = make_trainer(build(), tmp_path, rows, max_steps=1, label_smoothing_factor=label_smoothing)
    trainer.train()
    nats, count = summed_cross_entropy(build().train(), make_batch(rows), label_smoothing)
    # The log keeps the loss in float64, which is computed in float32.
    torch.testing.assert_close(history_of(trainer)[0], (nats / count).item(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_accumulating_4_batches_of_2_equals_one_batch_of_8(label_smoothing, tmp_path):
    runs = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model = build()
        trainer = make_trainer(
            model,
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            label_smoothing_factor=label_smoothing,
        )
        trainer.train()
        runs.append((history_of(trainer), history_of(trainer, "grad_norm"), dict(model.state_dict())))
    # The sum over rows is taken in another order.
    torch.testing.assert_close(runs[0], runs[1], atol=1e-5, rtol=1e-5)
    assert runs[0][0][0] != runs[0][0][-1]


def test_a_step_without_supervision_trains_on(tmp_path):
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in make_rows(8)]
    model = build()
    trainer = make_trainer(model, tmp_path, rows, max_steps=2, gradient_accumulation_steps=2)
    trainer.train()
    assert history_of(trainer) == history_of(trainer, "grad_norm") == [0.0, 0.0]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), build().parameters(), strict=True))


@pytest.mark.parametrize(
    "launcher", [pytest.param([], id="accelerate"), pytest.param(TORCHRUN, id="torchrun", marks=pytest.mark.slow)]
)
def test_two_processes_train_as_one_does_on_the_same_global_batch(launcher, tmp_path):
    model = build()
    trainer = make_trainer(model, tmp_path)
    trainer.train()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, Path(__file__).with_name("ddp_worker.py"), tmp_path, "4"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "result.pt")
    assert result["num_processes"] == 2
    # Gradients are summed over processes in another order.
    tolerance = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(result["losses"], history_of(trainer), **tolerance)
    torch.testing.assert_close(result["gradient_norms"], history_of(trainer, "grad_norm"), **tolerance)
    torch.testing.assert_close(dict(result["weights"]), dict(model.state_dict()), **tolerance)


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path):
    dropout = {"attention_dropout": 0.1, "mlp_dropout": 0.1}
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    model = build(**dropout)
    uninterrupted = make_trainer(model, tmp_path, **settings, learning_rate=1e-3)
    uninterrupted.train()
    again = build(seed=5, **dropout)
    resumed = make_trainer(again, tmp_path, **settings, learning_rate=1e-3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(history_of(resumed)) == 6
    torch.testing.assert_close(history_of(resumed), history_of(uninterrupted))
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()))


@peft_uses_a_deprecated_name
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("with_lora", [False, True])
def test_activation_checkpointing_changes_no_loss_and_no_gradient(with_lora, use_reentrant):
    batch, results = make_batch(), []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            # transformers 5.23 deprecates the name that 5.17 has.
            name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
            enable = getattr(model, f"{name}_checkpointing_enable")
            enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": use_reentrant}})
            assert all(
                layer.gradient_checkpointing for layer in (*model.model.encoder.layers, *model.model.decoder.layers)
            )
        if with_lora:
            # Both factors start away from zero here, else one of them has no gradient.
            model = get_peft_model(model, LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False))
            for index, (name, parameter) in enumerate(model.named_parameters()):
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(index))
            model.train()
        loss = model(**batch).loss
        loss.backward()
        results.append((loss.detach(), gradients_of(model)))
    torch.testing.assert_close(results[0], results[1])
    assert results[0][1] and all(gradient.any() for gradient in results[0][1].values())


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"tie_word_embeddings": False, "lm_head_bias": True},
        {"attention_bias": True, "mlp_bias": True},
        {"qk_norm": True, "gated_mlp": False},
    ],
    ids=str,
)
def test_two_training_steps_change_every_parameter(switches, tmp_path):
    model, before = build(**switches), build(**switches).state_dict()
    make_trainer(model, tmp_path, max_steps=2, optim="adamw_torch", learning_rate=1e-2).train()
    unchanged = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    # A bias on all keys of a cross-attention moves all scores of a query alike, and softmax does not see it.
    unchanged = {name for name in unchanged if not name.endswith("cross_attn.k_proj.bias")}
    assert not unchanged


def test_bfloat16_autocast_trains_float32_weights(tmp_path):
    losses = {}
    for bf16 in (False, True):
        model = build()
        trainer = make_trainer(model, tmp_path, bf16=bf16)
        trainer.train()
        losses[bf16] = history_of(trainer)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert losses[True] != losses[False]
    # bfloat16 keeps 8 bits.
    torch.testing.assert_close(losses[True], losses[False], rtol=2e-2, atol=0.0)


def test_predictions_are_as_long_as_asked_for_and_not_cut_at_20_tokens(tmp_path):
    model = build(max_position_embeddings=40)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [0]  # so that what is padding was not generated

    def lengths(trainer, **kwargs):
        # Several batches: the trainer writes defaults into the generation config after the first one.
        return set((trainer.predict(make_rows(6), **kwargs).predictions != 0).sum(1).tolist())

    trainer = make_trainer(model, tmp_path, predict_with_generate=True, per_device_eval_batch_size=2)
    assert lengths(trainer) == {40}
    assert lengths(trainer, max_length=30) == {30}
    assert lengths(trainer, max_new_tokens=25) == {26}
    settings = {"predict_with_generate": True, "generation_max_length": 35, "generation_num_beams": 2}
    assert lengths(make_trainer(model, tmp_path, **settings)) == {35}


def test_predictions_start_from_the_source_and_not_from_the_labels(tmp_path):
    model, rows = build(), make_rows(6)
    trainer = make_trainer(model, tmp_path, predict_with_generate=True)
    predictions = trainer.predict(rows, max_length=9).predictions
    batch = make_batch(rows)
    expected = model.eval().generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_length=9)
    assert predictions[:, : expected.shape[1]].tolist() == expected.tolist()
    assert not predictions[:, expected.shape[1] :].any()


def test_a_trained_model_writes_what_it_was_taught(tmp_path):
    tokenizer = make_tokenizer()
    pairs = {"w10 w11 w12": "w20 w21", "w13 w14": "w22 w23 w24 w25", "w15": "w26", "w16 w17": "w27 w28 w29"}
    rows = [
        {"input_ids": tokenizer(source)["input_ids"], "labels": tokenizer(f"{target} </s>")["input_ids"]}
        for source, target in pairs.items()
    ]

    def share_right(prediction):
        predicted, labels = (
            tokenizer.batch_decode(ids.clip(min=0), skip_special_tokens=True)
            for ids in (prediction.predictions, prediction.label_ids)
        )
        assert labels == list(pairs.values())
        return {"share_right": sum(map(str.__eq__, predicted, labels)) / len(labels)}

    trainer = make_trainer(
        build(),
        tmp_path,
        rows,
        max_steps=40,
        optim="adamw_torch",
        learning_rate=1e-2,
        label_smoothing_factor=0.05,
        predict_with_generate=True,
        generation_num_beams=2,
    )
    trainer.compute_metrics = share_right
    assert trainer.evaluate(rows, max_new_tokens=8)["eval_share_right"] == 0
    trainer.train()
    assert trainer.evaluate(rows, max_new_tokens=8)["eval_share_right"] == 1


@peft_uses_a_deprecated_name
def test_lora_adapters_train_alone_save_load_and_merge(tmp_path):
    batch = make_batch()
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=PROJECTIONS)
    model = get_peft_model(build(), config)
    # Two encoder layers of 7 projections, two decoder layers of 11, two factors each.
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * (2 * 7 + 2 * 11) and all("lora_" in name for name in trainable)
    before = {name: model.get_parameter(name).detach().clone() for name in trainable}
    make_trainer(model, tmp_path, max_steps=2, optim="adamw_torch", learning_rate=1e-2).train()
    assert not [name for name in trainable if torch.equal(model.get_parameter(name), before[name])]
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        adapted = model(**batch).logits
        with model.disable_adapter():
            torch.testing.assert_close(model(**batch).logits, build().eval()(**batch).logits)
        loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter").eval()
        torch.testing.assert_close(loaded(**batch).logits, adapted)
        merged = loaded.merge_and_unload()
        assert type(merged) is EncDecSLMForConditionalGeneration
        merged.save_pretrained(tmp_path / "merged")
        again = EncDecSLMForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
        # Merging adds B A to W once instead of adding B A x to W x.
        torch.testing.assert_close(again(**batch).logits, adapted, atol=1e-4, rtol=1e-4)


@peft_uses_a_deprecated_name
def test_lora_runs_resume_with_the_losses_of_an_uninterrupted_one(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    histories = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = get_peft_model(build(), LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=PROJECTIONS))
        trainer = make_trainer(model, tmp_path, learning_rate=1e-2, **settings)
        trainer.train(resume_from_checkpoint=resume)
        histories.append(history_of(trainer))
    assert get_last_checkpoint(tmp_path).endswith("checkpoint-4")
    torch.testing.assert_close(histories[0], histories[1])
