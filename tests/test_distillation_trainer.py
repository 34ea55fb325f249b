# SPDX-License-Identifier: Apache-2.0
"""Steps of distillation: the loss, where targets come from, padding, resuming and adapters."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from ddp_worker import build, history_of, make_tokenizer
from distillation_worker import (
    BOS,
    CHECKPOINTING,
    EOS,
    LORA_TARGETS,
    OFF_POLICY,
    OTHER_ORDER,
    assert_step,
    capture,
    capture_batches,
    capture_completions,
    generate_from_source,
    gold_pairs,
    greedy_completion,
    make_teacher,
    make_texts,
    make_trainer,
    metrics_of,
    plain_numbers,
    same_function_pair,
    to_ids,
    weights_of,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


TEMPLATE = "{% for m in messages %}w90 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w91{% endif %}"
# PEFT 0.21 uses a name that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_two_steps_change_every_student_parameter_and_save_the_student_alone(lmbda, tmp_path):
    student, teacher = build(), make_teacher()
    before, teacher_before = weights_of(student), weights_of(teacher)
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, student, teacher, lmbda=lmbda, kd_ratio=0.5, **settings)
    trainer.train()
    trainer.save_model()
    assert not [name for name, parameter in student.named_parameters() if torch.equal(parameter, before[name])]
    assert all(torch.equal(tensor, teacher_before[name]) for name, tensor in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters()) and not teacher.training
    files = {path.name for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".pth")}
    others = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    assert files == {"model.safetensors", *others}
    assert all(load_file(path).keys() <= before.keys() for path in tmp_path.rglob("model.safetensors"))
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
        (0.5, 2.0, 1.0, 0.3),
        (0.1, 3.0, 0.5, 0.1),
        (0.5, 1.0, 0.0, 0.1),
    ],
)
def test_an_off_policy_step_follows_the_definition(beta, kd_temperature, kd_ratio, smoothing, tmp_path):
    rows, student, reference = make_texts(8), build(), build()
    settings = {"beta": beta, "kd_temperature": kd_temperature, "kd_ratio": kd_ratio}
    smoothed = {"label_smoothing_factor": smoothing, "max_steps": 1}
    trainer = make_trainer(tmp_path, student, rows=rows, lmbda=0.0, **smoothed, **settings)
    trainer.train()
    expected = plain_numbers(reference, make_teacher(), gold_pairs(rows), smoothing=smoothing, **settings)
    for name in ("kd_loss", "entropy", "teacher_agreement") if kd_ratio else ():
        torch.testing.assert_close(history_of(trainer, name)[0], expected[name].item(), **OTHER_ORDER)
    assert_step(trainer, student, expected["loss"], reference)


@pytest.mark.parametrize(("beta", "kd_temperature", "kd_ratio"), [(0.0, 1.0, 0.9), (1.0, 2.0, 1.0), (0.4, 1.5, 0.5)])
def test_an_on_policy_step_follows_the_definition_on_completions_of_the_student(
    beta, kd_temperature, kd_ratio, tmp_path
):
    rows, student, reference = make_texts(8), build(), build()
    settings = {"beta": beta, "kd_temperature": kd_temperature, "kd_ratio": kd_ratio}
    lengths = {"max_completion_length": 40, "max_steps": 1}
    trainer = make_trainer(tmp_path, student, rows=rows, lmbda=1.0, **lengths, **settings)
    pairs = capture_completions(trainer)
    trainer.train()
    assert sorted(source for source, _ in pairs) == sorted(source for source, _ in gold_pairs(rows))
    assert all(1 <= len(ids) <= 40 and EOS not in ids[:-1] for _, ids in pairs)
    assert len({len(ids) for _, ids in pairs}) > 1
    expected = plain_numbers(reference, make_teacher(), pairs, gold_pairs(rows), **settings)
    assert_step(trainer, student, expected["loss"], reference)


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
        pointed = (7 * input_ids + 11 * (attention_mask.cumsum(-1) - 1)) % 97
        return CausalLMOutputWithPast(logits=100.0 * torch.nn.functional.one_hot(pointed, 97).float())


def test_positions_are_aligned_token_by_token(tmp_path):
    rows, student = make_texts(8), build()
    settings = {"lmbda": 0.0, "beta": 0.0, "per_device_eval_batch_size": 4}
    trainer = make_trainer(tmp_path, student, PointingTeacher(PointingConfig()), rows=rows, **settings)
    losses = []
    for source, target in gold_pairs(rows):
        decoder_input = torch.tensor([[BOS, *target[:-1]]])
        logits = student(input_ids=torch.tensor([source]), decoder_input_ids=decoder_input).logits[0]
        read = [source[-1], *target[:-1]]
        pointed = [(7 * token + 11 * (len(source) - 1 + t)) % 97 for t, token in enumerate(read)]
        # All of the teacher's probability is on one token, so the divergence is its surprisal.
        losses.append(-logits.log_softmax(-1)[range(len(target)), pointed].detach())
    for row, loss in zip(rows, losses, strict=True):
        measured = metrics_of(trainer, Dataset.from_list([row]))["kd_loss"]
        torch.testing.assert_close(measured, loss.mean().item(), **OTHER_ORDER)
    measured = metrics_of(trainer, Dataset.from_list(rows))["kd_loss"]
    torch.testing.assert_close(measured, torch.cat(losses).mean().item(), **OTHER_ORDER)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_a_student_that_is_the_teachers_function_has_divergence_0(beta, lmbda, tmp_path):
    # The decoder begins with <s> where the teacher has the last token of the source.
    rows = [{**row, "prompt": f"{row['prompt']} <s>"} for row in make_texts(8)]
    trainer = make_trainer(tmp_path, *same_function_pair(), rows=rows, lmbda=lmbda, beta=beta, max_steps=1)
    trainer.train()
    torch.testing.assert_close(history_of(trainer), [0.0], atol=1e-5, rtol=0.0)
    torch.testing.assert_close(history_of(trainer, "grad_norm"), [0.0], atol=1e-4, rtol=0.0)
    assert history_of(trainer, "teacher_agreement") == [1.0]
    shifted = make_trainer(tmp_path, *same_function_pair(), lmbda=0.0, beta=beta, max_steps=1)
    shifted.train()
    assert history_of(shifted)[0] > 1e-3


# Padding and accumulation


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
@pytest.mark.parametrize(
    "change",
    [
        {"padding_side": "left"},
        {"pad_to_multiple_of": 16},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_padding_and_accumulation_change_no_loss_and_no_weight(change, lmbda, tmp_path):
    runs = []
    for changed in ({}, change):
        tokenizer, student = make_tokenizer(), build()
        settings = {"lmbda": lmbda, "kd_ratio": 0.5, **changed}
        tokenizer.padding_side = settings.pop("padding_side", "right")
        trainer = make_trainer(tmp_path, student, arguments={"processing_class": tokenizer}, **settings)
        trainer.generate_as_student = generate_from_source
        batches = capture_batches(trainer)
        trainer.train()
        if "pad_to_multiple_of" in changed:
            assert {batches[0][1][f"{name}_ids"].shape[1] % 16 for name in ("source", "target", "teacher")} == {0}
        runs.append((history_of(trainer), history_of(trainer, "grad_norm"), weights_of(student)))
    torch.testing.assert_close(runs[0], runs[1], **OTHER_ORDER)
    assert runs[0][0][0] != runs[0][0][1]


def test_completions_are_the_same_alone_and_beside_longer_ones(tmp_path):
    trainer = make_trainer(tmp_path, temperature=1e-4, seq_kd=True, lmbda=0.5)
    rows = list(trainer.train_dataset)
    assert len({len(row["source_ids"]) for row in rows}) > 2
    config = trainer._generation_configs.greedy_student
    for generate, model, has_prompt in (
        (lambda rows: trainer.generate_as_student(rows, config), trainer.model, False),
        (trainer.generate_as_teacher, trainer.teacher_model, True),
    ):
        together = generate(rows)
        assert together == [generate([row])[0] for row in rows]
        starts = [len(row["source_ids"]) if has_prompt else 1 for row in rows]
        plain = [greedy_completion(model, row["source_ids"], start) for row, start in zip(rows, starts, strict=True)]
        assert together == plain


# Where targets come from


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
def test_the_student_generates_the_targets_of_a_share_lmbda_of_the_batches(lmbda, tmp_path):
    steps = 60 if lmbda == 0.3 else 6
    settings = {"max_steps": steps, "per_device_train_batch_size": 1, "max_completion_length": 2}
    trainer = make_trainer(tmp_path, lmbda=lmbda, **settings)
    calls = capture(trainer, "generate_as_student")
    trainer.train()
    origins = history_of(trainer, "targets/from_student_ratio")
    assert len(origins) == steps and set(origins) <= {0.0, 1.0} and sum(origins) == len(calls)
    # Three standard deviations of 60 draws at 0.3.
    assert abs(sum(origins) / steps - lmbda) <= (0.18 if lmbda == 0.3 else 0.0)
    assert set(history_of(trainer, "targets/from_teacher_ratio")) == {0.0}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_completions_are_generated_once_per_optimizer_step_in_eval_mode_with_a_cache(checkpointing, tmp_path):
    student, seen, widths, modes = build(mlp_dropout=0.2, attention_dropout=0.2), [], [], []
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    settings[f"{CHECKPOINTING}_checkpointing"] = checkpointing
    trainer = make_trainer(tmp_path, student, lmbda=1.0, **settings)
    generate, compute_loss = student.generate, trainer.compute_loss

    def spy(input_ids, **kwargs):
        layer = student.model.decoder.layers[0]
        hook = layer.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
        seen.append((len(input_ids), any(module.training for module in student.modules())))
        output = generate(input_ids, **kwargs)
        hook.remove()
        return output

    student.generate = spy
    trainer.compute_loss = lambda *args, **kwargs: modes.append(student.training) or compute_loss(*args, **kwargs)
    trainer.train()
    assert seen == [(8, False)] * 2 and set(widths) == {1} and modes == [True] * 8


def test_the_sampling_temperature_is_not_that_of_the_loss(tmp_path):
    rows, settings = make_texts(8), {"kd_temperature": 2.0, "beta": 0.0}
    # Sampling this cold is greedy search.
    trainer = make_trainer(tmp_path, rows=rows, lmbda=1.0, temperature=1e-4, max_steps=1, **settings)
    pairs = capture_completions(trainer)
    trainer.train()
    assert all(completion == greedy_completion(build().eval(), source, 1) for source, completion in pairs)
    expected = plain_numbers(build(), make_teacher(), pairs, **settings)
    torch.testing.assert_close(history_of(trainer)[0], expected["loss"].item(), **OTHER_ORDER)


def test_seq_kd_trains_on_completions_of_the_teacher(tmp_path):
    rows, student, reference = [{"prompt": row["prompt"]} for row in make_texts(8)], build(), build()
    settings = {"kd_ratio": 0.5, "kd_temperature": 2.0, "beta": 0.0}
    origin = {"lmbda": 0.0, "seq_kd": True, "temperature": 1e-4}
    trainer = make_trainer(tmp_path, student, rows=rows, max_steps=1, **origin, **settings)
    pairs = capture_completions(trainer, "teacher")
    trainer.train()
    assert sorted(source for source, _ in pairs) == sorted(to_ids(row["prompt"]) for row in rows)
    teacher = make_teacher()
    assert all(completion == greedy_completion(teacher, source, len(source)) for source, completion in pairs)
    assert history_of(trainer, "targets/from_teacher_ratio") == [1.0]
    assert_step(trainer, student, plain_numbers(reference, teacher, pairs, **settings)["loss"], reference)


def test_with_kd_ratio_0_neither_the_teacher_runs_nor_the_student_generates(tmp_path):
    student, teacher = build(), make_teacher()

    def fail(*args, **kwargs):
        raise AssertionError("ran")

    teacher.forward = student.generate = fail
    trainer = make_trainer(tmp_path, student, teacher, kd_ratio=0.0, lmbda=1.0)
    trainer.train()
    torch.testing.assert_close(history_of(trainer), history_of(trainer, "ce_loss"), **OTHER_ORDER)
    assert not history_of(trainer, "kd_loss")


def test_settings_of_the_user_reach_generation(tmp_path):
    settings = {"generation_kwargs": {"suppress_tokens": [7], "eos_token_id": [2, 9], "max_new_tokens": 3}}
    trainer = make_trainer(tmp_path, build(vocab_size=100), make_teacher(vocab_size=99), **settings)
    configs = trainer._generation_configs
    assert {config.max_new_tokens for config in configs} == {3}
    assert [config.suppress_tokens for config in configs] == [[7, 97, 98, 99]] * 2 + [[7, 97, 98]] * 2
    assert configs.student.eos_token_id == [2, 9]
    rows = list(trainer.train_dataset)
    for config in (configs.student, configs.greedy_student):
        completions = trainer.generate_as_student(rows, config)
        assert max(map(len, completions)) == 3 and not any(7 in ids or max(ids) > 96 for ids in completions)


# Data


def test_truncated_sources_and_targets_are_counted_and_short_for_the_teacher_too(tmp_path):
    rows = make_texts(8)
    lengths = {"max_source_length": 3, "max_completion_length": 4}
    trainer = make_trainer(tmp_path, rows=rows, **OFF_POLICY, **lengths, max_steps=1, pad_to_multiple_of=8)
    batches = capture_batches(trainer)
    trainer.train()
    (((encoded,), batch),) = batches
    gold = gold_pairs(rows)
    for row, ids, mask in zip(encoded, batch["target_ids"], batch["target_mask"], strict=True):
        source, target = gold[row["row"]]
        # The end is not taught where the target goes on.
        assert ids[mask.bool()].tolist() == target[:4] and row["source_ids"] == source[:3]
    for kind, index, limit in (("source", 0, 3), ("target", 1, 4)):
        lengths = [len(pair[index]) for pair in gold]
        num_cut = sum(length > limit for length in lengths)
        assert 0 < num_cut < 8 and history_of(trainer, f"{kind}s/cut_ratio") == [num_cut / 8]
        assert history_of(trainer, f"{kind}s/max_length") == [max(lengths)]
    assert batch["teacher_source_lengths"].max() == batch["source_mask"].sum(-1).max() == 3


def test_a_stream_is_trained_on_like_a_dataset_in_its_order(tmp_path):
    rows, runs = make_texts(16), []
    for as_stream in (False, True):
        dataset = IterableDataset.from_generator(lambda: iter(rows)) if as_stream else Dataset.from_list(rows)
        student, sizes = build(), {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
        order = {"train_sampling_strategy": "sequential"} if as_stream else {"shuffle_dataset": False}
        trainer = make_trainer(tmp_path, student, arguments={"train_dataset": dataset}, **OFF_POLICY, **order, **sizes)
        trainer.train()
        runs.append((history_of(trainer), weights_of(student)))
    assert len(runs[0][0]) == 6
    torch.testing.assert_close(runs[0], runs[1], **OTHER_ORDER)


@pytest.mark.parametrize("form", ["messages", "teacher_prompt"])
def test_the_teacher_reads_its_own_prompt(form, tmp_path):
    tokenizer, plain = make_tokenizer(), make_texts(8)
    tokenizer.chat_template = TEMPLATE
    rows = [{**row, "teacher_prompt": f"w90 {row['prompt']} w91"} for row in plain]
    if form == "messages":
        rows = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
            }
            for row in plain
        ]
    trainer = make_trainer(
        tmp_path, rows=rows, arguments={"teacher_processing_class": tokenizer}, **OFF_POLICY, max_steps=1
    )
    batches = capture_batches(trainer)
    trainer.train()
    (((encoded,), batch),) = batches
    for index, row in enumerate(encoded):
        source, target = gold_pairs(plain)[row["row"]]
        ids = batch["teacher_ids"][index][batch["teacher_mask"][index].bool()].tolist()
        assert row["source_ids"] == source and row["target_ids"] == target
        assert ids == [90, *source, 91, *target]
        assert batch["teacher_source_lengths"][index] == len(source) + 2


# Resuming, adapters, checkpointing, precision


@pytest.mark.parametrize("checkpoint", [3, 6], ids=["first epoch", "second epoch"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(checkpoint, accumulation, tmp_path):
    settings = {
        **{"lmbda": 0.5, "kd_ratio": 0.5, "max_steps": 8, "save_strategy": "steps", "save_steps": 3},
        **{"optim": "adamw_torch", "learning_rate": 1e-3, "data_seed": 5},
        **{"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation},
    }
    dropout = {"attention_dropout": 0.1, "mlp_dropout": 0.1}
    student, again = build(**dropout), build(seed=5, **dropout)
    uninterrupted = make_trainer(tmp_path, student, **settings)
    uninterrupted.train()
    resumed = make_trainer(tmp_path, again, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
    assert len(history_of(resumed)) == 8 and set(history_of(resumed, "targets/from_student_ratio")) == {0.0, 1.0}
    torch.testing.assert_close(history_of(resumed), history_of(uninterrupted))
    assert history_of(resumed, "num_tokens") == history_of(uninterrupted, "num_tokens")
    torch.testing.assert_close(weights_of(again), weights_of(student))


@pytest.mark.parametrize("form", ["peft_config", "PeftModel"])
def test_adapters_train_alone_and_are_saved_alone(form, tmp_path):
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=LORA_TARGETS)
    student = build() if form == "peft_config" else get_peft_model(build(), config)
    arguments = {"peft_config": config} if form == "peft_config" else {}
    settings = {"lmbda": 0.5, "kd_ratio": 0.5, "optim": "adamw_torch", "learning_rate": 1e-2}
    trainer = make_trainer(tmp_path, student, arguments=arguments, **settings)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert ("lora_" in name) == (not torch.equal(parameter, before[name])), name
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(build(), tmp_path).eval()
    with torch.no_grad():
        numbers = [
            plain_numbers(model, make_teacher(), gold_pairs(make_texts(4))) for model in (trainer.model.eval(), loaded)
        ]
    torch.testing.assert_close(numbers[0], numbers[1])


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_activation_checkpointing_changes_no_loss_and_no_weight(lmbda, with_lora, tmp_path):
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=LORA_TARGETS)
    arguments, runs = {"peft_config": config} if with_lora else {}, []
    for checkpointing in (False, True):
        student, flags = build(), []
        settings = {"lmbda": lmbda, "kd_ratio": 0.5, f"{CHECKPOINTING}_checkpointing": checkpointing}
        trainer = make_trainer(tmp_path, student, arguments=arguments, **settings)
        layer = student.model.encoder.layers[0]
        layer.register_forward_pre_hook(lambda module, args, flags=flags: flags.append(module.gradient_checkpointing))
        trainer.train()
        assert any(flags) == checkpointing
        runs.append((history_of(trainer), history_of(trainer, "grad_norm"), weights_of(trainer.model)))
    torch.testing.assert_close(runs[0], runs[1])
    assert runs[0][1][0] > 0


@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_bfloat16_autocast_reaches_every_part_and_keeps_hidden_states(lmbda, with_lora, tmp_path):
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["o_proj"])
    arguments, losses = {"peft_config": config} if with_lora else {}, []
    for bf16 in (False, True):
        student, teacher, dtypes = build(), make_teacher(), {}
        stacks = {"encoder": student.model.encoder, "decoder": student.model.decoder, "teacher": teacher.model}
        for name, stack in stacks.items():
            stack.layers[1].self_attn.q_proj.register_forward_hook(
                lambda module, args, output, name=name, dtypes=dtypes: dtypes.setdefault(name, set()).add(output.dtype)
            )
        trainer = make_trainer(tmp_path, student, teacher, arguments=arguments, bf16=bf16, lmbda=lmbda, max_steps=1)
        trainer.generate_as_student = trainer.generate_as_student if bf16 else generate_from_source
        trainer.train()
        dtype = torch.bfloat16 if bf16 else torch.float32
        assert dtypes == {name: {dtype} for name in stacks}
        # If it were not known, logits of the whole vocabulary would be computed.
        assert trainer._student_reader.head_is_known is True and trainer._teacher_reader.head_is_known is True
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
        losses.append(history_of(trainer))
    if lmbda == 0.0:
        assert losses[0] != losses[1]
        torch.testing.assert_close(losses[0], losses[1], rtol=2e-2, atol=0.0)  # bfloat16 keeps 8 bits
