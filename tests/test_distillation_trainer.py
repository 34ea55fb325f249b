# SPDX-License-Identifier: Apache-2.0
"""A decoder-only teacher, an encoder-decoder student, and the loss between them written out again."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from ddp_worker import build, history_of, make_tokenizer
from distillation_worker import (
    BOS,
    CHECKPOINTING,
    EOS,
    OFF_POLICY,
    OTHER_ORDER,
    capture,
    frozen_texts,
    gold_pairs,
    greedy_text,
    ids_of,
    make_teacher,
    make_texts,
    make_trainer,
    metrics_of,
    plain_numbers,
    same_function_pair,
    weights_of,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from encdec_slm.trainers import distillation_losses, distillation_trainer


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# PEFT 0.21 asks for `is_gradient_checkpointing`, a name that transformers 5.23 deprecates.
peft_uses_a_deprecated_name = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TEMPLATE = "{% for m in messages %}w90 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w91{% endif %}"


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_two_steps_change_every_student_parameter_and_no_teacher_byte(lmbda, tmp_path):
    student, teacher = build(), make_teacher()
    before, teacher_before = weights_of(student), weights_of(teacher)
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, student, teacher, lmbda=lmbda, kd_ratio=0.5, **settings)
    trainer.train()
    trainer.save_model()
    assert not [name for name, parameter in student.named_parameters() if torch.equal(parameter, before[name])]
    assert all(torch.equal(tensor, teacher_before[name]) for name, tensor in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters()) and not teacher.training
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    assert {path.name for path in files} == {
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
    }
    teacher_bytes = {bytes(tensor.numpy().tobytes()) for tensor in teacher.state_dict().values()}
    for path in tmp_path.rglob("model.safetensors"):
        saved = load_file(path)
        assert saved.keys() <= before.keys()
        assert not [name for name, tensor in saved.items() if tensor.numpy().tobytes() in teacher_bytes]
    moments = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt")["state"]
    assert len(moments) == len(list(student.parameters()))


# The loss


@pytest.mark.parametrize(
    ("beta", "kd_temperature", "kd_ratio", "smoothing"),
    [
        (0.0, 1.0, 1.0, 0.0),
        (1.0, 1.0, 0.9, 0.0),
        (0.0, 2.0, 0.5, 0.0),
        (1.0, 0.7, 0.3, 0.2),
        (0.5, 2.0, 1.0, 0.0),
        (0.1, 3.0, 0.5, 0.1),
        (0.5, 1.0, 0.0, 0.1),
    ],
)
def test_an_off_policy_step_follows_the_definition(beta, kd_temperature, kd_ratio, smoothing, tmp_path):
    rows = make_texts(8)
    settings = {"beta": beta, "kd_temperature": kd_temperature, "kd_ratio": kd_ratio}
    student = build()
    trainer = make_trainer(
        tmp_path, student, rows=rows, lmbda=0.0, max_steps=1, label_smoothing_factor=smoothing, **settings
    )
    trainer.train()
    reference = build()
    expected = plain_numbers(reference, make_teacher(), gold_pairs(rows), smoothing=smoothing, **settings)
    expected["loss"].backward()
    torch.testing.assert_close(history_of(trainer)[0], expected["loss"].item(), **OTHER_ORDER)
    stepped = {name: (p - 0.05 * p.grad).detach() for name, p in reference.named_parameters()}
    torch.testing.assert_close(dict(student.named_parameters()), stepped, **OTHER_ORDER)
    if kd_ratio:
        for name in ("kd_loss", "entropy", "teacher_agreement"):
            torch.testing.assert_close(history_of(trainer, name)[0], expected[name].item(), **OTHER_ORDER)


@pytest.mark.parametrize(("beta", "kd_temperature", "kd_ratio"), [(0.0, 1.0, 0.9), (1.0, 2.0, 1.0), (0.4, 1.5, 0.5)])
def test_an_on_policy_step_follows_the_definition_on_the_texts_of_the_student(
    beta, kd_temperature, kd_ratio, tmp_path
):
    rows, student, texts = make_texts(8), build(), []
    settings = {"beta": beta, "kd_temperature": kd_temperature, "kd_ratio": kd_ratio}
    trainer = make_trainer(tmp_path, student, rows=rows, lmbda=1.0, max_steps=1, **settings)
    capture(trainer, "student_texts", texts)
    trainer.train()
    ((sources,), _, written), *others = texts
    assert not others and sorted(sources) == sorted(source for source, _ in gold_pairs(rows))
    assert all(1 <= len(ids) <= 10 and EOS not in ids[:-1] for ids in written)
    assert len({len(ids) for ids in written}) > 1
    reference, pairs = build(), list(zip(sources, written, strict=True))
    expected = plain_numbers(reference, make_teacher(), pairs, gold_pairs(rows), **settings)
    expected["loss"].backward()
    torch.testing.assert_close(history_of(trainer)[0], expected["loss"].item(), **OTHER_ORDER)
    stepped = {name: (p - 0.05 * p.grad).detach() for name, p in reference.named_parameters()}
    torch.testing.assert_close(dict(student.named_parameters()), stepped, **OTHER_ORDER)


def test_label_smoothing_changes_the_cross_entropy_part_alone(tmp_path):
    losses = {}
    for kd_ratio in (1.0, 0.5):
        for smoothing in (0.0, 0.3):
            trainer = make_trainer(
                tmp_path, lmbda=0.0, kd_ratio=kd_ratio, label_smoothing_factor=smoothing, max_steps=1
            )
            trainer.train()
            losses[kd_ratio, smoothing] = history_of(trainer)[0]
    assert losses[1.0, 0.0] == losses[1.0, 0.3]
    assert losses[0.5, 0.0] != losses[0.5, 0.3]


class PointingConfig(PreTrainedConfig):
    model_type = "pointing"
    vocab_size: int = 97


class PointingTeacher(PreTrainedModel, GenerationMixin):
    """A model without an output head that is sure of one next token, which the last token and its index decide."""

    config_class = PointingConfig

    def __init__(self, config):
        super().__init__(config)
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.post_init()

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        positions = attention_mask.cumsum(-1) - 1
        pointed = (7 * input_ids + 11 * positions) % 97
        return CausalLMOutputWithPast(logits=100.0 * torch.nn.functional.one_hot(pointed, 97).float())


def test_positions_are_aligned_token_by_token(tmp_path, monkeypatch):
    rows, student, calls = make_texts(8), build(), []
    trainer = make_trainer(
        tmp_path, student, PointingTeacher(PointingConfig()), rows=rows, lmbda=0.0, beta=0.0, max_steps=1
    )
    capture_target = distillation_trainer.distillation_objective
    monkeypatch.setattr(
        distillation_trainer,
        "distillation_objective",
        lambda *args: calls.append((args[4], capture_target(*args))) or capture_target(*args),
    )
    trainer.train()
    ((labels, objective),) = calls
    divergences = dict.fromkeys(range(8))
    expected = {}
    for source, target in gold_pairs(rows):
        decoder_input = torch.tensor([[BOS, *target[:-1]]])
        logits = build()(input_ids=torch.tensor([source]), decoder_input_ids=decoder_input).logits[0]
        read = [source[-1], *target[:-1]]
        pointed = [(7 * token + 11 * (len(source) - 1 + t)) % 97 for t, token in enumerate(read)]
        # All of the teacher's probability is on one token, so the divergence is that token's surprise.
        expected[tuple(target)] = -logits.log_softmax(-1)[range(len(target)), pointed].detach()
    # Rows are shuffled, but each one's tokens come one after another and end with the end-of-text token.
    ends = (labels == EOS).nonzero()[:, 0] + 1
    assert len(ends) == len(divergences)
    lengths = torch.diff(ends, prepend=torch.tensor([0])).tolist()
    for ids, divergence in zip(labels.split(lengths), objective.divergence.split(lengths), strict=True):
        torch.testing.assert_close(divergence, expected.pop(tuple(ids.tolist())), **OTHER_ORDER)
    assert not expected


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_student_that_is_the_teachers_function_has_divergence_0(beta, lmbda, tmp_path):
    # The decoder begins with <s> where the teacher has the last token of the source.
    rows = [{**row, "prompt": f"{row['prompt']} <s>"} for row in make_texts(8)]
    student, teacher = same_function_pair()
    trainer = make_trainer(tmp_path, student, teacher, rows=rows, lmbda=lmbda, beta=beta, max_steps=1)
    trainer.train()
    torch.testing.assert_close(history_of(trainer), [0.0], atol=1e-5, rtol=0.0)
    torch.testing.assert_close(history_of(trainer, "grad_norm"), [0.0], atol=1e-4, rtol=0.0)
    assert history_of(trainer, "teacher_agreement") == [1.0]
    student, teacher = same_function_pair()
    shifted = make_trainer(tmp_path, student, teacher, lmbda=0.0, beta=beta, max_steps=1)
    shifted.train()
    assert history_of(shifted)[0] > 1e-3


# Padding and accumulation


@pytest.mark.parametrize("texts", ["data", "student"])
@pytest.mark.parametrize("change", ["padding_side", "pad_to_multiple_of"])
def test_padding_changes_no_loss_and_no_weight(change, texts, tmp_path):
    runs = []
    for value in {"padding_side": ("right", "left"), "pad_to_multiple_of": (None, 16)}[change]:
        tokenizer, student = make_tokenizer(), build()
        settings = {"lmbda": float(texts == "student"), "kd_ratio": 0.5}
        if change == "padding_side":
            tokenizer.padding_side = value
        else:
            settings["pad_to_multiple_of"] = value
        trainer = make_trainer(tmp_path, student, arguments={"processing_class": tokenizer}, **settings)
        trainer.student_texts = frozen_texts
        batches = []
        capture(trainer, "make_batch", batches)
        trainer.train()
        if change == "pad_to_multiple_of" and value:
            assert {batches[0][2][f"{name}_ids"].shape[1] % 16 for name in ("source", "target", "teacher")} == {0}
        runs.append((history_of(trainer), history_of(trainer, "grad_norm"), weights_of(student)))
    torch.testing.assert_close(runs[0], runs[1], **OTHER_ORDER)


def test_a_row_alone_has_the_numbers_that_it_has_beside_longer_ones(tmp_path):
    rows = make_texts(6)
    trainer = make_trainer(tmp_path, rows=rows, kd_ratio=0.5, per_device_train_batch_size=1)
    alone = [metrics_of(trainer, Dataset.from_list([row])) for row in rows]
    counts = torch.tensor([float(len(target)) for _, target in gold_pairs(rows)], dtype=torch.float64)
    together = metrics_of(trainer, Dataset.from_list(rows))
    assert together.keys() == {"loss", "kd_loss", "ce_loss", "teacher_agreement", "entropy"}
    for name, value in together.items():
        mean = (counts * torch.tensor([numbers[name] for numbers in alone])).sum() / counts.sum()
        torch.testing.assert_close(value, mean.item(), **OTHER_ORDER)


def test_texts_are_written_alike_alone_and_beside_longer_ones(tmp_path):
    trainer = make_trainer(tmp_path)
    sources = [source for source, _ in gold_pairs(make_texts(8))]
    assert len({len(source) for source in sources}) > 2
    for model, config in (
        (trainer.model, trainer._greedy_config),
        (trainer.teacher_model, trainer._teacher_greedy_config),
    ):
        together = trainer.write(model, sources, config)
        assert together == [trainer.write(model, [source], config)[0] for source in sources]
        begins = [len(source) if model is trainer.teacher_model else 1 for source in sources]
        plain = [greedy_text(model, source, begin) for source, begin in zip(sources, begins, strict=True)]
        assert together == plain


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_accumulating_4_batches_of_2_equals_one_batch_of_8(lmbda, tmp_path):
    runs = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        student = build()
        trainer = make_trainer(
            tmp_path,
            student,
            lmbda=lmbda,
            kd_ratio=0.5,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.student_texts = frozen_texts
        trainer.train()
        runs.append((history_of(trainer), history_of(trainer, "grad_norm"), weights_of(student)))
    torch.testing.assert_close(runs[0], runs[1], **OTHER_ORDER)
    assert runs[0][0][0] != runs[0][0][1]


# Where targets come from


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
def test_the_student_writes_the_targets_of_a_share_lmbda_of_the_batches(lmbda, tmp_path):
    calls, steps = [], 60 if lmbda == 0.3 else 6
    trainer = make_trainer(
        tmp_path, lmbda=lmbda, max_steps=steps, per_device_train_batch_size=1, max_completion_length=2
    )
    capture(trainer, "student_texts", calls)
    trainer.train()
    origins = history_of(trainer, "targets/from_student_ratio")
    assert len(origins) == steps and set(origins) <= {0.0, 1.0} and sum(origins) == len(calls)
    # Three standard deviations of 60 draws at 0.3.
    assert abs(sum(origins) / steps - lmbda) <= (0.18 if lmbda == 0.3 else 0.0)
    assert set(history_of(trainer, "targets/from_teacher_ratio")) == {0.0}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_text_is_generated_once_per_optimizer_step_in_eval_mode_with_a_cache(checkpointing, tmp_path):
    student, seen, widths = build(mlp_dropout=0.2, attention_dropout=0.2), [], []
    trainer = make_trainer(
        tmp_path,
        student,
        lmbda=1.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **{f"{CHECKPOINTING}_checkpointing": checkpointing},
    )
    generate = student.generate

    def spy(input_ids, **kwargs):
        hook = student.model.decoder.layers[0].register_forward_pre_hook(
            lambda module, args: widths.append(args[0].shape[1])
        )
        seen.append((len(input_ids), [module for module in student.modules() if module.training]))
        written = generate(input_ids, **kwargs)
        hook.remove()
        assert not any(module.training for module in student.modules())
        return written

    student.generate = spy
    modes = []
    capture_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: modes.append(student.training) or capture_loss(*args, **kwargs)
    trainer.train()
    assert [(size, training) for size, training in seen] == [(8, []), (8, [])]
    assert widths and set(widths) == {1}
    assert modes == [True] * 8


def test_the_sampling_temperature_is_not_that_of_the_loss(tmp_path):
    rows, student, texts = make_texts(8), build(), []
    settings = {"kd_temperature": 2.0, "beta": 0.0}
    # Sampling this cold is greedy search.
    trainer = make_trainer(tmp_path, student, rows=rows, lmbda=1.0, temperature=1e-4, max_steps=1, **settings)
    capture(trainer, "student_texts", texts)
    trainer.train()
    ((sources,), _, written), *_ = texts
    assert written == [greedy_text(build().eval(), source, begin=1) for source in sources]
    expected = plain_numbers(build(), make_teacher(), list(zip(sources, written, strict=True)), **settings)
    torch.testing.assert_close(history_of(trainer)[0], expected["loss"].item(), **OTHER_ORDER)


def test_seq_kd_trains_on_what_the_teacher_writes(tmp_path):
    rows, student, texts = [{"prompt": row["prompt"]} for row in make_texts(8)], build(), []
    settings = {"kd_ratio": 0.5, "kd_temperature": 2.0, "beta": 0.0}
    trainer = make_trainer(
        tmp_path, student, rows=rows, lmbda=0.0, seq_kd=True, temperature=1e-4, max_steps=1, **settings
    )
    capture(trainer, "teacher_texts", texts)
    trainer.train()
    ((encoded,), _, written), *others = texts
    sources = [row["source_ids"] for row in encoded]
    assert not others and sorted(sources) == sorted(ids_of(row["prompt"]) for row in rows)
    assert written == [greedy_text(make_teacher(), source, begin=len(source)) for source in sources]
    reference = build()
    expected = plain_numbers(reference, make_teacher(), list(zip(sources, written, strict=True)), **settings)
    expected["loss"].backward()
    torch.testing.assert_close(history_of(trainer)[0], expected["loss"].item(), **OTHER_ORDER)
    stepped = {name: (p - 0.05 * p.grad).detach() for name, p in reference.named_parameters()}
    torch.testing.assert_close(dict(student.named_parameters()), stepped, **OTHER_ORDER)
    assert history_of(trainer, "targets/from_teacher_ratio") == [1.0]


def test_with_kd_ratio_0_neither_the_teacher_reads_nor_the_student_writes(tmp_path):
    student, teacher = build(), make_teacher()

    def refuse(*args, **kwargs):
        raise AssertionError("ran")

    teacher.forward = student.generate = refuse
    trainer = make_trainer(tmp_path, student, teacher, kd_ratio=0.0, lmbda=1.0)
    trainer.train()
    torch.testing.assert_close(history_of(trainer), history_of(trainer, "ce_loss"), **OTHER_ORDER)
    assert not history_of(trainer, "kd_loss")


def test_the_end_of_text_is_taught_unless_the_target_is_cut(tmp_path):
    batches = []
    trainer = make_trainer(tmp_path, lmbda=0.0, max_completion_length=4, max_steps=1, pad_to_multiple_of=8)
    capture(trainer, "make_batch", batches)
    trainer.train()
    (((rows,), _, batch),) = batches
    texts = {tuple(source[:]): target for source, target in gold_pairs(make_texts())}
    for row, ids, mask in zip(rows, batch["target_ids"], batch["target_mask"], strict=True):
        whole = texts[tuple(row["source_ids"])]
        assert ids[mask.bool()].tolist() == whole[:4]
    num_cut = sum(len(texts[tuple(row["source_ids"])]) > 4 for row in rows)
    assert 0 < num_cut < 8 and history_of(trainer, "targets/cut_ratio") == [num_cut / 8]


# Evaluation


def test_a_stream_is_trained_on_like_a_data_set_in_its_order(tmp_path):
    rows, runs = make_texts(16), []
    for as_stream in (False, True):
        dataset = IterableDataset.from_generator(lambda: iter(rows)) if as_stream else Dataset.from_list(rows)
        student = build()
        trainer = make_trainer(
            tmp_path,
            student,
            arguments={"train_dataset": dataset},
            **OFF_POLICY,
            shuffle_dataset=False,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=6,
        )
        trainer.train()
        runs.append((history_of(trainer), weights_of(student)))
    assert len(runs[0][0]) == 6
    torch.testing.assert_close(runs[0], runs[1], **OTHER_ORDER)


def test_a_chat_template_renders_messages_for_the_teacher_alone(tmp_path):
    teacher_tokenizer, batches = make_tokenizer(), []
    teacher_tokenizer.chat_template = TEMPLATE
    plain = make_texts(8)
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in plain
    ]
    trainer = make_trainer(
        tmp_path, rows=rows, arguments={"teacher_processing_class": teacher_tokenizer}, **OFF_POLICY, max_steps=1
    )
    capture(trainer, "make_batch", batches)
    trainer.train()
    batch = batches[0][2]
    expected = {}
    for source, target in gold_pairs(plain):
        expected[tuple(source)] = (target, [90, *source, 91, *target])
    for row in range(8):
        ids = {
            name: batch[f"{name}_ids"][row][batch[f"{name}_mask"][row].bool()].tolist()
            for name in ("source", "target", "teacher")
        }
        assert (ids["target"], ids["teacher"]) == expected.pop(tuple(ids["source"]))
        assert batch["teacher_source_lengths"][row] == len(ids["source"]) + 2
    assert not expected


def test_sources_that_are_cut_are_counted_and_short_for_the_teacher_too(tmp_path):
    batches, rows = [], make_texts(8)
    trainer = make_trainer(tmp_path, rows=rows, **OFF_POLICY, max_steps=1, max_source_length=3)
    capture(trainer, "make_batch", batches)
    trainer.train()
    lengths = [len(source) for source, _ in gold_pairs(rows)]
    num_cut = sum(length > 3 for length in lengths)
    assert 0 < num_cut < 8 and history_of(trainer, "sources/cut_ratio") == [num_cut / 8]
    assert history_of(trainer, "sources/max_length") == [max(lengths)]
    assert batches[0][2]["teacher_source_lengths"].max() == batches[0][2]["source_mask"].sum(-1).max() == 3


# Resuming, adapters, checkpointing


@pytest.mark.parametrize("checkpoint", [3, 6], ids=["first epoch", "second epoch"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(checkpoint, accumulation, tmp_path):
    settings = {
        "lmbda": 0.5,
        "kd_ratio": 0.5,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 3,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    dropout = {"attention_dropout": 0.1, "mlp_dropout": 0.1}
    student = build(**dropout)
    uninterrupted = make_trainer(tmp_path, student, **settings)
    uninterrupted.train()
    again = build(seed=5, **dropout)
    resumed = make_trainer(tmp_path, again, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
    assert len(history_of(resumed)) == 8 and set(history_of(resumed, "targets/from_student_ratio")) == {0.0, 1.0}
    torch.testing.assert_close(history_of(resumed), history_of(uninterrupted))
    assert history_of(resumed, "num_tokens") == history_of(uninterrupted, "num_tokens")
    torch.testing.assert_close(weights_of(again), weights_of(student))


@peft_uses_a_deprecated_name
@pytest.mark.parametrize("given_as", ["peft_config", "PeftModel"])
def test_adapters_train_alone_and_are_saved_alone(given_as, tmp_path):
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=PROJECTIONS)
    student = build() if given_as == "peft_config" else get_peft_model(build(), config)
    arguments = {"peft_config": config} if given_as == "peft_config" else {}
    trainer = make_trainer(
        tmp_path, student, arguments=arguments, lmbda=0.5, kd_ratio=0.5, optim="adamw_torch", learning_rate=1e-2
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert ("lora_" in name) == (not torch.equal(parameter, before[name])), name
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(build(), tmp_path).eval()
    pairs = gold_pairs(make_texts(4))
    with torch.no_grad():
        expected = plain_numbers(trainer.model.eval(), make_teacher(), pairs)
        torch.testing.assert_close(plain_numbers(loaded, make_teacher(), pairs), expected)


@peft_uses_a_deprecated_name
@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_activation_checkpointing_changes_no_loss_and_no_weight(lmbda, with_lora, tmp_path):
    runs = []
    for checkpointing in (False, True):
        student = build()
        arguments = {}
        if with_lora:
            arguments["peft_config"] = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=PROJECTIONS)
        trainer = make_trainer(
            tmp_path,
            student,
            arguments=arguments,
            lmbda=lmbda,
            kd_ratio=0.5,
            **{f"{CHECKPOINTING}_checkpointing": checkpointing},
        )
        flags = []
        capture_loss = trainer.compute_loss

        def loss(*args, _loss=capture_loss, _flags=flags, _student=student, **kwargs):
            _flags.append(_student.model.encoder.layers[0].gradient_checkpointing)
            return _loss(*args, **kwargs)

        trainer.compute_loss = loss
        trainer.train()
        assert set(flags) == {checkpointing}
        runs.append((history_of(trainer), history_of(trainer, "grad_norm"), weights_of(trainer.model)))
    torch.testing.assert_close(runs[0], runs[1])
    assert runs[0][1][0] > 0


def test_bfloat16_autocast_still_takes_the_loss_from_hidden_states(tmp_path):
    losses = {}
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, rows=make_texts(8), bf16=bf16, **OFF_POLICY)
        trainer.train()
        losses[bf16] = history_of(trainer)
        # What each reader found: `False` means that logits of the whole vocabulary are held at once.
        assert trainer._read_student.head_is_known is True and trainer._read_teacher.head_is_known is True
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert losses[True] != losses[False]
    # bfloat16 keeps 8 bits.
    torch.testing.assert_close(losses[True], losses[False], rtol=2e-2, atol=0.0)


@peft_uses_a_deprecated_name
@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
@pytest.mark.parametrize("part", ["encoder", "decoder", "teacher"])
def test_bfloat16_autocast_reaches_every_part(part, lmbda, with_lora, tmp_path):
    student, teacher, dtypes = build(), make_teacher(), set()
    arguments = {}
    if with_lora:
        arguments["peft_config"] = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["o_proj"])
    layers = {"encoder": student.model.encoder, "decoder": student.model.decoder, "teacher": teacher.model}[
        part
    ].layers
    layers[1].self_attn.q_proj.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    make_trainer(tmp_path, student, teacher, arguments=arguments, bf16=True, lmbda=lmbda, max_steps=1).train()
    assert dtypes == {torch.bfloat16}


# The card and the Hub


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_run_on_the_kernel_of_cuda_has_the_losses_of_one_in_chunks(lmbda, tmp_path, monkeypatch):
    settings = {"lmbda": lmbda, "kd_ratio": 0.5, "temperature": 1e-4}
    expected = make_trainer(tmp_path, **settings)
    expected.train()

    def as_on_cuda(student_hidden, student_head, teacher_hidden, *rest):
        on_kernel = torch.is_grad_enabled() and teacher_hidden is not None
        name = "_objective_on_kernel" if on_kernel else "distillation_objective"
        return getattr(distillation_losses, name)(student_hidden, student_head, teacher_hidden, *rest)

    monkeypatch.setattr(distillation_trainer, "distillation_objective", as_on_cuda)
    trainer = make_trainer(tmp_path, **settings)
    trainer.train()
    torch.testing.assert_close(history_of(trainer), history_of(expected), rtol=1e-4, atol=1e-4)  # other kernels
    assert history_of(expected, "teacher_agreement") and not history_of(trainer, "teacher_agreement")
    assert "eval_teacher_agreement" in trainer.evaluate(trainer.train_dataset)
