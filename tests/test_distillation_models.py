# SPDX-License-Identifier: Apache-2.0
"""Students and teachers in all forms in which they can be given, adapters included; and forms that are refused."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from ddp_worker import build, history_of, make_tokenizer
from distillation_worker import (
    LORA_TARGETS,
    OFF_POLICY,
    OTHER_ORDER,
    capture,
    capture_completions,
    gold_pairs,
    make_args,
    make_teacher,
    make_texts,
    make_trainer,
    plain_numbers,
    save_folder,
)
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainingArguments,
)
from trl import DistillationConfig

from encdec_slm import EncDecSLMForConditionalGeneration, EncDecSLMModel
from encdec_slm.trainers import Seq2SeqDistillationTrainer


ROWS = make_texts(8)
# PEFT 0.21 uses a name that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def build_trainer(output_dir, student, teacher=None, arguments=None, **settings):
    """A trainer whose processing classes are loaded from the folders of the models, if there are any."""
    args = make_args(output_dir, **{**OFF_POLICY, "max_steps": 1, **settings})
    teacher = make_teacher() if teacher is None and "teacher_model_name_or_path" not in settings else teacher
    defaults = {} if isinstance(student, str) else {"processing_class": make_tokenizer()}
    return Seq2SeqDistillationTrainer(
        student, teacher, args, **{"train_dataset": Dataset.from_list(ROWS), **defaults, **(arguments or {})}
    )


def adapt(model, task_type="SEQ_2_SEQ_LM"):
    """Add a LoRA adapter with large weights, so that it changes what the model predicts."""
    adapted = get_peft_model(model, LoraConfig(task_type=task_type, r=2, target_modules=LORA_TARGETS))
    for index, (name, parameter) in enumerate(adapted.named_parameters()):
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
    return adapted


def expected_loss(student, teacher, **settings):
    with torch.no_grad():
        return plain_numbers(student, teacher, gold_pairs(ROWS), **{"kd_ratio": 0.5, **settings})["loss"].item()


# Students


@pytest.fixture
def student_adapter(tmp_path):
    """A folder that holds a LoRA adapter of a student, and the adapted student."""
    base = save_folder(tmp_path / "base", build().eval(), make_tokenizer())
    adapted = adapt(AutoModelForSeq2SeqLM.from_pretrained(base))
    return save_folder(tmp_path / "adapter", adapted), adapted.eval()


@pytest.mark.parametrize("form", ["folder", "PeftModel"])
def test_the_training_of_a_students_adapter_continues(form, student_adapter, tmp_path):
    folder, adapted = student_adapter
    expected = expected_loss(adapted, make_teacher())
    assert abs(expected - expected_loss(build().eval(), make_teacher())) > 1e-2
    student = folder
    if form == "PeftModel":
        student = PeftModel.from_pretrained(build(), folder, is_trainable=True)
    trainer = build_trainer(tmp_path / "out", student, learning_rate=1e-2, optim="adamw_torch")
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    torch.testing.assert_close(history_of(trainer)[0], expected, atol=1e-4, rtol=1e-4)
    for name, parameter in trainer.model.named_parameters():
        assert ("lora_" in name) == (not torch.equal(parameter, before[name])), name
    trainer.save_model()
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files


@pytest.mark.parametrize("form", ["folder", "PeftModel"])
def test_a_second_adapter_is_refused(form, student_adapter, tmp_path):
    folder, _ = student_adapter
    student = folder if form == "folder" else PeftModel.from_pretrained(build(), folder, is_trainable=True)
    arguments = {"peft_config": LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=LORA_TARGETS)}
    with pytest.raises(ValueError, match="`peft_config`"):
        build_trainer(tmp_path / "out", student, arguments=arguments)


def test_a_student_of_which_nothing_can_be_trained_is_refused(student_adapter, tmp_path):
    with pytest.raises(ValueError, match="is_trainable=True"):
        build_trainer(tmp_path / "out", PeftModel.from_pretrained(build(), student_adapter[0]))
    with pytest.raises(ValueError, match="no trainable parameters"):
        build_trainer(tmp_path / "out", build().requires_grad_(False))


def test_trained_tokens_of_an_adapter_reach_the_output_head(tmp_path):
    """PEFT wraps embedding and head, so that the weight of the head is not all that produces the logits."""
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q_proj"], trainable_token_indices=[20, 21])
    arguments = {"peft_config": config}
    trainer = build_trainer(tmp_path, build(), arguments=arguments, max_steps=3, learning_rate=1.0, max_grad_norm=1e9)
    trainer.train()
    reference = copy.deepcopy(trainer.model).eval()
    measured = trainer.evaluate(Dataset.from_list(ROWS))["eval_loss"]
    torch.testing.assert_close(measured, expected_loss(reference, make_teacher()), **OTHER_ORDER)
    merged = reference.merge_and_unload()
    torch.testing.assert_close(measured, expected_loss(merged, make_teacher()), atol=1e-4, rtol=1e-4)


def test_a_student_is_loaded_from_a_string_in_float32_with_its_tokenizer(tmp_path):
    folder = save_folder(tmp_path / "student", build().to(torch.bfloat16), make_tokenizer())
    trainer = build_trainer(tmp_path / "out", folder)
    assert type(trainer.model) is EncDecSLMForConditionalGeneration
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert trainer.processing_class.get_vocab() == make_tokenizer().get_vocab()
    trainer.train()
    expected = expected_loss(build().to(torch.bfloat16).float(), make_teacher())
    torch.testing.assert_close(history_of(trainer)[0], expected, **OTHER_ORDER)
    for name in ("dtype", "torch_dtype"):
        half = build_trainer(tmp_path / "out", folder, model_init_kwargs={name: "bfloat16"})
        assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}


# Teachers


@pytest.mark.parametrize(
    "form", ["folder", "name in args", "adapter folder", "adapter subfolder", "PeftModel", "merged"]
)
def test_a_teacher_teaches_in_every_form(form, tmp_path):
    base = save_folder(tmp_path / "base", make_teacher(), make_tokenizer())
    settings, reference, teacher = {}, make_teacher(), base
    if form == "name in args":
        settings["teacher_model_name_or_path"], teacher = base, None
    elif form != "folder":
        reference = adapt(AutoModelForCausalLM.from_pretrained(base), "CAUSAL_LM").eval()
        teacher = copy.deepcopy(reference)
        if form == "adapter folder":
            teacher = save_folder(tmp_path / "adapter", teacher)
        elif form == "adapter subfolder":
            save_folder(tmp_path / "adapters" / "one", teacher)
            teacher, settings["teacher_model_init_kwargs"] = str(tmp_path / "adapters"), {"subfolder": "one"}
        elif form == "merged":
            teacher = teacher.merge_and_unload()
    trainer = build_trainer(tmp_path / "out", build(), teacher, **settings)
    trainer.train()
    expected = expected_loss(build(), reference)
    # Merging adds B A to W once instead of B A x to W x.
    torch.testing.assert_close(history_of(trainer)[0], expected, atol=1e-4, rtol=1e-4)
    if form not in ("folder", "name in args"):
        assert abs(expected_loss(build(), make_teacher()) - expected) > 1e-2
    assert not any(parameter.requires_grad for parameter in trainer.teacher_model.parameters())


def test_the_tokenizer_of_a_teachers_adapter_is_used(tmp_path):
    base = save_folder(tmp_path / "base", make_teacher(), make_tokenizer())
    adapted, tokenizer = adapt(AutoModelForCausalLM.from_pretrained(base), "CAUSAL_LM"), make_tokenizer()
    tokenizer.chat_template = "w90 {{ messages[0]['content'] }}"
    folder = save_folder(tmp_path / "adapter", adapted, tokenizer)
    assert build_trainer(tmp_path, build(), folder).teacher_processing_class.chat_template == tokenizer.chat_template
    (tmp_path / "adapter" / "tokenizer_config.json").unlink()
    (tmp_path / "adapter" / "tokenizer.json").unlink()
    for path in (tmp_path / "adapter").glob("chat_template*"):
        path.unlink()
    assert build_trainer(tmp_path, build(), folder).teacher_processing_class.chat_template is None


def test_a_teacher_is_loaded_as_its_settings_say(tmp_path):
    folder = save_folder(tmp_path / "teacher", make_teacher(), make_tokenizer())
    settings = {"teacher_model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = build_trainer(tmp_path / "out", build(), folder, **settings)
    assert {parameter.dtype for parameter in trainer.teacher_model.parameters()} == {torch.bfloat16}
    trainer.train()
    # bfloat16 keeps 8 bits.
    torch.testing.assert_close(history_of(trainer)[0], expected_loss(build(), make_teacher()), rtol=0.05, atol=0.0)


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(97, 128), (104, 97), (104, 128)])
def test_padded_tables_are_compared_on_the_common_ids(student_rows, teacher_rows, tmp_path):
    student, teacher = build(vocab_size=student_rows), make_teacher(vocab_size=teacher_rows)
    settings = {"kd_ratio": 0.5, "beta": 0.5, "kd_temperature": 2.0}
    trainer = build_trainer(tmp_path, student, teacher, lmbda=1.0, **settings)
    pairs = capture_completions(trainer)
    with torch.no_grad():
        # Untrained rows may be probable, and are still not tokens.
        student.get_output_embeddings().weight[97:] *= 20
        teacher.get_output_embeddings().weight[97:] *= 20
    before = copy.deepcopy(student)
    trainer.train()
    assert max(token_id for _, ids in pairs for token_id in ids) < 97
    expected = plain_numbers(before, teacher, pairs, gold_pairs(ROWS), common=97, **settings)
    torch.testing.assert_close(history_of(trainer)[0], expected["loss"].item(), **OTHER_ORDER)
    assert max(map(max, trainer.generate_as_teacher(list(trainer.train_dataset)))) < 97


# Models that cannot have their role


def build_wrong_model(kind):
    if kind == "decoder-only":
        return make_teacher()
    if kind == "encoder-decoder":
        return build()
    if kind == "without a head":
        # A head that is not the embedding table would be initialized randomly.
        return AutoModel.from_config(make_teacher(tie_word_embeddings=False).config)
    if kind == "student without a head":
        return EncDecSLMModel(build().config)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {"BertModel": BertModel, "BertLMHeadModel": BertLMHeadModel}[kind](
        BertConfig(intermediate_size=32, **sizes)
    )


@pytest.mark.parametrize("form", ["object", "folder"])
@pytest.mark.parametrize(
    ("role", "kind"),
    [
        ("student", "decoder-only"),
        ("student", "student without a head"),
        ("teacher", "encoder-decoder"),
        ("teacher", "without a head"),
        ("teacher", "BertModel"),
        ("teacher", "BertLMHeadModel"),
    ],
)
def test_models_of_other_kinds_are_refused(role, kind, form, tmp_path):
    if (kind, form) == ("student without a head", "folder"):
        pytest.skip("its head is its embedding table, so the folder is complete")
    model = build_wrong_model(kind)
    if form == "folder":
        model = save_folder(tmp_path / "model", model, make_tokenizer())
    models = {"student": build(), "teacher": make_teacher(), role: model}
    with pytest.raises(
        ValueError, match="encoder-decoder" if role == "student" else "teacher .*causal language model"
    ):
        build_trainer(tmp_path, models["student"], models["teacher"])


def test_a_teacher_with_virtual_tokens_is_refused(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="virtual tokens"):
        build_trainer(tmp_path, build(), get_peft_model(make_teacher(), config))


@pytest.mark.parametrize(
    ("settings", "arguments", "names"),
    [
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, {}, "`model_init_kwargs`"),
        ({"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, {}, "`teacher_model_init_kwargs`"),
        ({"teacher_model_revision": "main"}, {}, "`teacher_model_revision`"),
        ({}, {"compute_metrics": len}, "`compute_metrics`.*`predict_with_generate"),
    ],
)
def test_settings_that_have_no_effect_are_refused(settings, arguments, names, tmp_path):
    with pytest.raises(ValueError, match=names):
        build_trainer(tmp_path, build(), make_teacher(), arguments, **settings)


def test_a_teacher_that_cannot_be_loaded_is_refused_by_name(tmp_path):
    adapted = adapt(make_teacher(), "CAUSAL_LM")
    folder = save_folder(tmp_path / "adapter", adapted, make_tokenizer())
    with pytest.raises(ValueError, match=r"adapter.*`base_model_name_or_path`"):
        build_trainer(tmp_path, build(), folder)
    (tmp_path / "empty").mkdir()
    for name in ("nobody/no-such-teacher", str(tmp_path / "nowhere" / "teacher"), str(tmp_path / "empty")):
        with pytest.raises(ValueError, match=name):
            build_trainer(tmp_path, build(), name)


def test_a_missing_teacher_and_settings_of_another_class_are_refused(tmp_path):
    arguments = {"train_dataset": Dataset.from_list(ROWS), "processing_class": make_tokenizer()}
    with pytest.raises(ValueError, match="`teacher_model_name_or_path`"):
        Seq2SeqDistillationTrainer(build(), None, make_args(tmp_path), **arguments)
    for kind in (DistillationConfig, Seq2SeqTrainingArguments):
        fields = {"bf16": False, "use_cpu": True, "report_to": []}
        if "activation_checkpointing" in kind.__dataclass_fields__:
            fields["activation_checkpointing"] = False
        with pytest.raises(TypeError, match=f"`args` .*{kind.__name__}"):
            Seq2SeqDistillationTrainer(build(), make_teacher(), kind(str(tmp_path), **fields), **arguments)


# Tokenizers


def build_other_tokenizer():
    """The tokenizer with the words of the ids 10 to 14 in reversed order."""
    state = json.loads(make_tokenizer().backend_tokenizer.to_str())
    words = [f"w{token_id}" for token_id in range(10, 15)]
    state["model"]["vocab"].update(zip(words, reversed(range(10, 15)), strict=True))
    tokenizer = type(make_tokenizer().backend_tokenizer).from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def test_a_teacher_with_another_vocabulary_can_only_generate(tmp_path):
    arguments = {"teacher_processing_class": build_other_tokenizer()}
    with pytest.raises(ValueError, match=r"4 of 97 .*10 is 'w10' and 'w14'.*kd_ratio=0"):
        make_trainer(tmp_path, arguments=arguments)
    trainer = make_trainer(tmp_path, arguments=arguments, kd_ratio=0.0, seq_kd=True, max_steps=1)
    calls = capture(trainer, "generate_as_teacher")
    trainer.train()
    assert torch.isfinite(torch.tensor(history_of(trainer))).all() and len(calls[0][1]) == 8
    mapped = {10: 14, 11: 13, 12: 12, 13: 11, 14: 10}
    for row in trainer.train_dataset:
        assert row["teacher_source_ids"] == [mapped.get(token_id, token_id) for token_id in row["source_ids"]]


def test_another_end_of_text_token_and_a_second_teacher_are_warned_of(tmp_path, caplog):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "w96"
    with caplog.at_level("WARNING", logger="encdec_slm"):
        arguments = {"teacher_processing_class": tokenizer}
        make_trainer(tmp_path, arguments=arguments, teacher_model_name_or_path="another")
    assert all(part in caplog.text for part in ("'</s>'", "'w96'", "`teacher_model_name_or_path`", "'another'"))
