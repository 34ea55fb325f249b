# SPDX-License-Identifier: Apache-2.0
"""A vision-text student, with a teacher that reads images in its own way or that reads text about them."""

import copy

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from ddp_worker import history_of, result_of
from distillation_vision_worker import (
    CAPTIONS,
    FEATURES,
    IMAGE_ID,
    PATCH,
    TEMPLATE,
    as_dataset,
    greedy_completion,
    make_processor,
    make_rows,
    make_student,
    make_teacher,
    make_teacher_processor,
    make_text_teacher,
    make_tokenizer,
    make_trainer,
    noise,
    plain_loss,
    target_of,
)
from distillation_worker import (
    OTHER_ORDER,
    assert_step,
    capture_batches,
    capture_completions,
    make_args,
    metrics_of,
    save_folder,
)
from PIL import Image as PILImage
from tokenizers.processors import TemplateProcessing
from transformers import LlavaProcessor

from encdec_slm.processing_encdec_vlm import EncDecVLMProcessor
from encdec_slm.trainers import Seq2SeqDistillationTrainer
from encdec_slm.trainers.distillation_data import to_lists
from encdec_slm.trainers.new_models import train_tokenizer


# The loss


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize(("beta", "kd_ratio"), [(1.0, 1.0), (0.0, 0.5)])
def test_a_step_follows_the_definition(kind, beta, kd_ratio, tmp_path):
    rows, student, reference = make_rows(), make_student(), make_student()
    settings, processor = {"beta": beta, "kd_ratio": kd_ratio}, make_teacher_processor(kind)
    trainer = make_trainer(tmp_path, rows, student, make_teacher(kind), processor, **settings)
    trainer.train()
    assert_step(trainer, student, plain_loss(rows, reference, make_teacher(kind), processor, **settings), reference)
    before, after = reference.state_dict(), student.state_dict()
    assert any("vision_tower" in name and not torch.equal(value, before[name]) for name, value in after.items())


def test_a_text_teacher_reads_the_caption_in_place_of_the_prompt(tmp_path):
    rows, texts, student, reference = make_rows(captions=True), make_tokenizer(None), make_student(), make_student()
    trainer = make_trainer(tmp_path, rows, student, make_text_teacher(), texts)
    trainer.train()
    # Only the student has an image token; the others are compared.
    common = len(texts)
    assert trainer.num_common_tokens == common == reference.config.text_config.vocab_size - 1
    expected = plain_loss(rows, reference, make_text_teacher(), texts, common=common)
    blind = [{name: row[name] for name in FEATURES} for row in rows]
    assert abs(plain_loss(blind, reference, make_text_teacher(), texts, common=common) - expected) > 1e-3
    assert_step(trainer, student, expected, reference)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_each_model_sees_the_images(role, tmp_path):
    losses = []
    for seed in (0, 1):
        models, rows = {"student": make_student(), "teacher": make_teacher()}, make_rows()
        for row in rows:
            row["images"] = [noise(image.size, seed) for image in row["images"]]
        blind = models["teacher" if role == "student" else "student"]
        for name, parameter in blind.named_parameters():
            if "multi_modal_projector.linear_2" in name:
                torch.nn.init.zeros_(parameter)
        trainer = make_trainer(tmp_path, rows, **models)
        losses.append(metrics_of(trainer, as_dataset(rows))["kd_loss"])
    assert abs(losses[0] - losses[1]) > 1e-4


def test_other_rows_and_padding_change_nothing(tmp_path):
    rows = make_rows()
    trainer = make_trainer(tmp_path, rows, kd_ratio=0.5, per_device_eval_batch_size=4)
    alone = [metrics_of(trainer, as_dataset([row])) for row in rows]
    counts = torch.tensor([float(len(target_of(row["completion"]))) for row in rows], dtype=torch.float64)
    padded = make_trainer(tmp_path, rows, kd_ratio=0.5, per_device_eval_batch_size=4, pad_to_multiple_of=32)
    for together in (metrics_of(trainer, as_dataset(rows)), metrics_of(padded, as_dataset(rows))):
        assert together.keys() == {"loss", "kd_loss", "ce_loss", "teacher_agreement", "entropy"}
        for name, value in together.items():
            mean = (counts * torch.tensor([numbers[name] for numbers in alone])).sum() / counts.sum()
            torch.testing.assert_close(value, mean.item(), **OTHER_ORDER)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_accumulating_2_batches_of_2_equals_one_batch_of_4(kind, tmp_path):
    results, settings = [], {"kd_ratio": 0.5, "max_steps": 2}
    for batch_size, accumulation in ((4, 1), (2, 2)):
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        models = make_student(), make_teacher(kind), make_teacher_processor(kind)
        trainer = make_trainer(tmp_path, None, *models, **sizes, **settings)
        trainer.train()
        results.append(result_of(trainer))
    torch.testing.assert_close(results[0], results[1], **OTHER_ORDER)
    assert results[0]["losses"][0] != results[0]["losses"][1]


# Generation


def prefer_images(model):
    """Make the image token the most probable one in many places."""
    with torch.no_grad():
        model.lm_head.weight[IMAGE_ID] *= 20
    return model


def test_the_student_generates_with_its_images(tmp_path):
    rows, student = make_rows(), prefer_images(make_student())
    reference, settings = copy.deepcopy(student), {"lmbda": 1.0, "max_completion_length": 6, "temperature": 1e-4}
    trainer = make_trainer(tmp_path, rows, student, **settings)
    pairs = capture_completions(trainer)
    trainer.train()
    expected = [greedy_completion(reference, make_processor(), row, 1) for row in rows]
    assert sorted(completion for _, completion in pairs) == sorted(expected)
    loss = plain_loss(rows, reference, make_teacher(), make_teacher_processor(), expected)
    assert_step(trainer, student, loss, reference)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_the_teacher_generates_with_its_images(kind, tmp_path):
    rows, processor, teacher = make_rows(), make_teacher_processor(kind), prefer_images(make_teacher(kind))
    settings = {"seq_kd": True, "max_completion_length": 6, "temperature": 1e-4}
    trainer = make_trainer(tmp_path, rows, teacher=teacher, processor=processor, **settings)
    pairs = capture_completions(trainer, "teacher")
    trainer.train()
    expected = [greedy_completion(teacher, processor, row, None) for row in rows]
    assert sorted(completion for _, completion in pairs) == sorted(expected)
    loss = plain_loss(rows, make_student(), teacher, processor, expected)
    torch.testing.assert_close(history_of(trainer)[0], loss.item(), **OTHER_ORDER)


def test_a_teacher_with_another_vocabulary_generates_from_images(tmp_path):
    rows, processor = make_rows(), make_teacher_processor()
    tokenizer = train_tokenizer(CAPTIONS[:1], vocab_size=280, model_max_length=256)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|img|>"]})
    options = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(processor.image_processor, tokenizer, image_token="<|img|>", **options)
    teacher = make_teacher(num_tokens=len(tokenizer), image_token_id=processor.image_token_id)
    with pytest.raises(ValueError, match="vocabularies"):
        make_trainer(tmp_path, teacher=teacher, processor=processor)
    settings = {"seq_kd": True, "kd_ratio": 0.0, "max_completion_length": 8, "temperature": 1e-4}
    trainer = make_trainer(tmp_path, teacher=teacher, processor=processor, **settings)
    pairs = capture_completions(trainer, "teacher")
    trainer.train()
    row = next(row for row in rows if "<image>" in row["prompt"])
    inputs = processor(images=row["images"], text=[row["prompt"].replace("<image>", "<|img|>")], return_tensors="pt")
    inputs = {name: value[:, :-1] if value.dim() == 2 else value for name, value in inputs.items()}
    ids = teacher.generate(**inputs, do_sample=False, max_new_tokens=8, suppress_tokens=[processor.image_token_id])
    text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ids = make_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert ids[:7] in [completion[:7] for _, completion in pairs]


def test_evaluation_generates_with_the_images(tmp_path):
    rows, predictions = make_rows(), []
    trainer = Seq2SeqDistillationTrainer(
        make_student(),
        make_teacher(),
        make_args(tmp_path, max_completion_length=6, predict_with_generate=True),
        eval_dataset=as_dataset(rows),
        processing_class=make_processor(),
        teacher_processing_class=make_teacher_processor(),
        compute_metrics=lambda prediction: predictions.append(prediction.predictions) or {"rows": len(rows)},
    )
    assert trainer.evaluate()["eval_rows"] == 4
    completions = [[int(token_id) for token_id in ids if token_id not in (0, -100)] for ids in predictions[0]]
    assert completions == [greedy_completion(make_student(), make_processor(), row, 1) for row in rows]


# Sources


def encode_sources(trainer, rows):
    """What student and teacher read of rows, in their order."""
    dataset = as_dataset(rows) if isinstance(rows, list) else rows
    trainer.model.eval()
    batches = capture_batches(trainer)
    trainer.evaluate(dataset)
    sources, teacher_sources = [], []
    for _, batch in batches:
        sources += to_lists(batch["source_ids"], batch["source_mask"])
        lengths = batch["teacher_source_lengths"]
        teacher_sources += [ids[:length].tolist() for ids, length in zip(batch["teacher_ids"], lengths, strict=True)]
    return sources, teacher_sources


def test_messages_are_rendered_by_each_processors_own_template(tmp_path):
    processor = make_teacher_processor(chat_template=TEMPLATE)
    # Like Llama's, which begins each text with a token that this template has too.
    start = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    processor.tokenizer.backend_tokenizer.post_processor = start
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what is it"}]
    images = [noise((30, 30), 0)]
    rows = [
        {"prompt": [{"role": "user", "content": content}], "images": images, "completion": "a cat"}
        for content in (parts, parts[1:])
    ]
    trainer = make_trainer(tmp_path, processor=processor, dataset=Dataset.from_list(rows))
    sources, teacher_sources = encode_sources(trainer, Dataset.from_list(rows))
    messages = [{"role": "user", "content": [{"type": "image", "image": images[0]}, parts[1]]}]
    expected = make_processor().apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    expected_teacher = processor.apply_chat_template(messages, **options)["input_ids"][0]
    assert expected_teacher.count(1) == 1
    assert sources == [expected, expected] and teacher_sources == [expected_teacher] * 2
    # Text is a message to such a teacher, and text to the student.
    sources, teacher_sources = encode_sources(trainer, make_rows()[:1])
    assert teacher_sources == [expected_teacher]
    assert sources == make_processor()(images=images, text=["what is it"])["input_ids"]


def test_a_teacher_prompt_of_text_is_read_without_the_template(tmp_path):
    rows = [{**row, "teacher_prompt": f"look: {row['prompt']}"} for row in make_rows()]
    processor = make_teacher_processor(chat_template=TEMPLATE)
    trainer = make_trainer(tmp_path, rows, processor=processor)
    trainer.train()
    expected = plain_loss(rows, make_student(), make_teacher(), processor, text=lambda row: row["teacher_prompt"])
    torch.testing.assert_close(history_of(trainer)[0], expected.item(), **OTHER_ORDER)


def test_a_long_source_loses_text_for_both_and_never_an_image(tmp_path):
    rows = make_rows()[:1]
    (whole,) = make_processor()(images=rows[0]["images"], text=["what is it"])["input_ids"]
    trainer = make_trainer(tmp_path, rows, max_source_length=len(whole) - 2)
    (source,), (teacher_source,) = encode_sources(trainer, rows)
    kept = make_tokenizer()("what is it", add_special_tokens=False)["input_ids"][:-2]
    assert source == [IMAGE_ID] * (len(whole) - 1 - len(kept) - 2) + [*kept, 2]
    assert teacher_source == [IMAGE_ID] * 4 + kept
    trainer = make_trainer(tmp_path, rows, max_source_length=5, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match=r"`prompt` of row 0 .*`max_source_length` is 5"):
        trainer.train()


@pytest.mark.parametrize("as_stream", [False, True])
def test_one_image_or_none_may_be_in_a_column_of_its_own(as_stream, tmp_path):
    rows = make_rows()[:3]
    single = [
        {"image": (row["images"] or [None])[0], "source": row["prompt"], "target": row["completion"]} for row in rows
    ]
    single[0]["source"] = f"<image>{rows[0]['prompt']}"
    features = Features({"image": Image(), "source": Value("string"), "target": Value("string")})
    dataset = Dataset.from_list(single, features=features)
    dataset = dataset.to_iterable_dataset() if as_stream else dataset
    settings = {"per_device_train_batch_size": 3, "shuffle_dataset": False, "remove_unused_columns": True}
    trainer = make_trainer(tmp_path, dataset=dataset, **settings)
    trainer.train()
    expected = plain_loss(rows, make_student(), make_teacher(), make_teacher_processor())
    torch.testing.assert_close(history_of(trainer)[0], expected.item(), **OTHER_ORDER)


def test_models_and_processors_are_loaded_from_folders(tmp_path):
    folders = (
        save_folder(tmp_path / "student", make_student(), make_processor()),
        save_folder(tmp_path / "teacher", make_teacher(), make_teacher_processor()),
    )
    settings = {"lmbda": 0.0, "max_steps": 1, "per_device_train_batch_size": 4, "max_completion_length": 24}
    args = make_args(tmp_path / "out", **settings)
    trainer = Seq2SeqDistillationTrainer(*folders, args, train_dataset=as_dataset(make_rows()))
    trainer.train()
    expected = plain_loss(make_rows(), make_student(), make_teacher(), make_teacher_processor())
    torch.testing.assert_close(history_of(trainer)[0], expected.item(), **OTHER_ORDER)
    trainer.save_model()
    assert EncDecVLMProcessor.from_pretrained(args.output_dir).image_processor.patch_size == PATCH


# What is refused


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"prompt": "<image> and <image>"}, "`prompt` of row 0 .*2 .* 1"),
        ({"images": []}, "`prompt` of row 0 .*1 .* 0"),
        ({"completion": "an <image>"}, "`completion` of row 0 .*'<image>'"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_name(change, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, [{**make_rows()[0], "prompt": "<image> what", **change}])


@pytest.mark.parametrize("as_stream", [False, True])
def test_a_damaged_image_is_refused_by_its_row(as_stream, tmp_path):
    rows = make_rows()
    PILImage.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    rows[3]["images"][1] = {"bytes": (tmp_path / "whole.png").read_bytes()[:999], "path": None}
    dataset = as_dataset(rows)
    dataset = dataset.to_iterable_dataset() if as_stream else dataset
    trainer = make_trainer(tmp_path, dataset=dataset, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match=r"row 3 .*Image 1 .*truncated"):
        trainer.train()


def test_a_text_teacher_without_a_caption_is_refused(tmp_path):
    rows = make_rows(captions=True)
    rows[1]["teacher_prompt"] = None
    with pytest.raises(ValueError, match=r"Row 1 .*`teacher_prompt`"):
        make_trainer(tmp_path, rows, teacher=make_text_teacher(), processor=make_tokenizer(None))


def test_another_vocabulary_is_refused_whatever_its_size(tmp_path):
    other = make_tokenizer(None)
    other.add_tokens(["<video>"])  # as many as the student's, whose last is the image token
    with pytest.raises(ValueError, match=r"1 of .* '<image>' and '<video>'"):
        make_trainer(tmp_path, make_rows(True), teacher=make_text_teacher(len(other)), processor=other)


def test_processors_must_be_those_of_the_models(tmp_path):
    arguments = (make_student(), make_teacher(), make_args(tmp_path))
    with pytest.raises(TypeError, match=r"`processing_class` .*processor"):
        Seq2SeqDistillationTrainer(*arguments, processing_class=make_tokenizer())
    with pytest.raises(TypeError, match=r"`teacher_processing_class` .*tokenizer.*LlavaProcessor"):
        make_trainer(tmp_path, make_rows(True), teacher=make_text_teacher())
    teacher = make_teacher()
    teacher.config.image_token_id = 5
    with pytest.raises(ValueError, match=r"`image_token_id` .*LlavaForConditionalGeneration"):
        make_trainer(tmp_path, teacher=teacher)
