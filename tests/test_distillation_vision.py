# SPDX-License-Identifier: Apache-2.0
"""A student that reads images, beside a teacher that reads them in its own way or that reads text about them."""

import copy

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from ddp_worker import history_of
from distillation_vision_worker import (
    CAPTIONS,
    FEATURES,
    PATCH,
    TEMPLATE,
    TOWER,
    as_dataset,
    drawn,
    greedy,
    llama_config,
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
    words,
)
from distillation_worker import OTHER_ORDER, capture, make_args, metrics_of, weights_of
from PIL import Image as PILImage
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from encdec_slm.processing_encdec_vlm import EncDecVLMProcessor
from encdec_slm.trainers import Seq2SeqDistillationTrainer
from encdec_slm.trainers.new_models import train_tokenizer


# The loss


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize(("beta", "kd_ratio"), [(1.0, 1.0), (0.0, 0.5)])
def test_a_step_follows_the_definition_from_plain_forward_passes(kind, beta, kd_ratio, tmp_path):
    rows, student, settings = make_rows(), make_student(), {"beta": beta, "kd_ratio": kd_ratio}
    reader = make_teacher_processor(kind)
    trainer = make_trainer(tmp_path, rows, student, make_teacher(kind), reader, **settings)
    trainer.train()
    reference = make_student()
    expected = plain_loss(rows, reference, make_teacher(kind), reader, **settings)
    expected.backward()
    torch.testing.assert_close(history_of(trainer)[0], expected.item(), **OTHER_ORDER)
    stepped = {name: (p if p.grad is None else p - 0.05 * p.grad).detach() for name, p in reference.named_parameters()}
    torch.testing.assert_close(dict(student.named_parameters()), stepped, **OTHER_ORDER)
    before = make_student().state_dict()
    assert any("vision_tower" in name and not torch.equal(value, before[name]) for name, value in stepped.items())


def test_a_text_teacher_reads_the_caption_in_place_of_the_prompt(tmp_path):
    rows, texts = make_rows(captions=True), make_tokenizer(None)
    trainer = make_trainer(tmp_path, rows, teacher=make_text_teacher(), reader=texts)
    trainer.train()
    # The student alone has a token for images: what is compared are the others.
    common = len(texts)
    assert trainer.num_common_tokens == common == make_student().config.text_config.vocab_size - 1
    expected = plain_loss(rows, make_student(), make_text_teacher(), texts, common=common)
    torch.testing.assert_close(history_of(trainer)[0], expected.item(), **OTHER_ORDER)
    blind = [{name: row[name] for name in FEATURES} for row in rows]
    assert abs(plain_loss(blind, make_student(), make_text_teacher(), texts, common=common) - expected) > 1e-3


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_each_model_sees_the_images(whose, tmp_path):
    losses = []
    for seed in (0, 1):
        student, teacher, rows = make_student(), make_teacher(), make_rows()
        for row in rows:
            row["images"] = [noise(image.size, seed) for image in row["images"]]
        blinded = teacher if whose == "student" else student
        for name, parameter in blinded.named_parameters():
            if "multi_modal_projector.linear_2" in name:
                torch.nn.init.zeros_(parameter)
        trainer = make_trainer(tmp_path, rows, student, teacher)
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
    runs = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        student = make_student()
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        reader = make_teacher_processor(kind)
        trainer = make_trainer(tmp_path, None, student, make_teacher(kind), reader, kd_ratio=0.5, max_steps=2, **sizes)
        trainer.train()
        runs.append((history_of(trainer), history_of(trainer, "grad_norm"), weights_of(student)))
    torch.testing.assert_close(runs[0], runs[1], **OTHER_ORDER)
    assert runs[0][0][0] != runs[0][0][1]


# Who writes


def wants_to_write_images(model):
    """`model`, for which the image's token is often the likeliest."""
    with torch.no_grad():
        model.lm_head.weight[make_tokenizer().convert_tokens_to_ids("<image>")] *= 20
    return model


def test_the_student_writes_with_its_images(tmp_path):
    rows, texts, student = make_rows(), [], wants_to_write_images(make_student())
    reference = copy.deepcopy(student)
    trainer = make_trainer(tmp_path, rows, student, lmbda=1.0, max_completion_length=6, temperature=1e-4)
    capture(trainer, "student_texts", texts)
    trainer.train()
    ((_, _, written),) = texts
    expected = [greedy(reference, make_processor(), row, begin=1) for row in rows]
    assert sorted(written) == sorted(expected)
    loss = plain_loss(rows, reference, make_teacher(), make_teacher_processor(), expected)
    torch.testing.assert_close(history_of(trainer)[0], loss.item(), **OTHER_ORDER)
    assert not torch.equal(student.lm_head.weight, reference.lm_head.weight)


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_the_teacher_writes_with_its_images(kind, tmp_path):
    rows, texts, reader, teacher = make_rows(), [], make_teacher_processor(kind), make_teacher(kind)
    settings = {"seq_kd": True, "max_completion_length": 6, "temperature": 1e-4}
    trainer = make_trainer(tmp_path, rows, teacher=wants_to_write_images(teacher), reader=reader, **settings)
    capture(trainer, "teacher_texts", texts)
    trainer.train()
    ((_, _, written),) = texts
    expected = [greedy(teacher, reader, row, begin=None) for row in rows]
    assert sorted(written) == sorted(expected)
    loss = plain_loss(rows, make_student(), teacher, reader, expected)
    torch.testing.assert_close(history_of(trainer)[0], loss.item(), **OTHER_ORDER)


def test_a_teacher_of_another_vocabulary_writes_what_it_sees(tmp_path):
    rows, texts, reader = make_rows(), [], make_teacher_processor()
    tokenizer = train_tokenizer(CAPTIONS[:1], vocab_size=280, model_max_length=256)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|img|>"]})
    options = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    reader = LlavaProcessor(reader.image_processor, tokenizer, image_token="<|img|>", **options)
    sizes = {"text_config": llama_config(len(tokenizer)), "vision_config": dict(TOWER)}
    config = LlavaConfig(**sizes, image_token_id=reader.image_token_id, vision_feature_layer=-2)
    teacher = drawn(LlavaForConditionalGeneration(config), seed=3)
    with pytest.raises(ValueError, match="Student and teacher disagree about"):
        make_trainer(tmp_path, teacher=teacher, reader=reader)
    settings = {"seq_kd": True, "kd_ratio": 0.0, "max_completion_length": 8, "temperature": 1e-4}
    trainer = make_trainer(tmp_path, teacher=teacher, reader=reader, **settings)
    capture(trainer, "teacher_texts", texts)
    trainer.train()
    ((_, _, written),) = texts
    row = next(row for row in rows if "<image>" in row["prompt"])
    inputs = reader(images=row["images"], text=[row["prompt"].replace("<image>", "<|img|>")], return_tensors="pt")
    inputs = {name: value[:, :-1] if value.dim() == 2 else value for name, value in inputs.items()}
    ids = teacher.generate(**inputs, do_sample=False, max_new_tokens=8, suppress_tokens=[reader.image_token_id])
    text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert words()(text, add_special_tokens=False)["input_ids"][:7] in [ids[:7] for ids in written]


def test_evaluation_writes_with_the_images(tmp_path):
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
    written = [[int(id) for id in ids if id not in (0, -100)] for ids in predictions[0]]
    assert written == [greedy(make_student(), make_processor(), row, begin=1) for row in rows]


# What the models read


def ids_read(trainer, rows):
    """What student and teacher read of rows, in their order."""
    trainer.model.eval()
    batch = trainer.make_batch(list(trainer._encoded(as_dataset(rows) if isinstance(rows, list) else rows, "data")))
    sources = [ids[mask.bool()].tolist() for ids, mask in zip(batch["source_ids"], batch["source_mask"], strict=True)]
    begins = batch["teacher_source_lengths"]
    return sources, [ids[:begin].tolist() for ids, begin in zip(batch["teacher_ids"], begins, strict=True)]


def test_messages_are_rendered_by_each_processors_own_template(tmp_path):
    reader = make_teacher_processor(chat_template=TEMPLATE)
    # As Llama's, which begins every text with the token that this template has too.
    begins = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    reader.tokenizer.backend_tokenizer.post_processor = begins
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "what is it"}]
    images = [noise((30, 30), 0)]
    rows = [
        {"prompt": [{"role": "user", "content": parts}], "images": images, "completion": "a cat"},
        {"prompt": [{"role": "user", "content": parts[1:]}], "images": images, "completion": "a cat"},
    ]
    trainer = make_trainer(tmp_path, reader=reader, dataset=Dataset.from_list(rows))
    sources, teacher_sources = ids_read(trainer, Dataset.from_list(rows))
    messages = [{"role": "user", "content": [{"type": "image", "image": images[0]}, parts[1]]}]
    mine = make_processor().apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"][0]
    theirs = reader.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert theirs["input_ids"][0].count(1) == 1
    assert sources == [mine, mine] and teacher_sources == [theirs["input_ids"][0]] * 2
    # A prompt of text is a message to such a teacher, and text to the student.
    sources, teacher_sources = ids_read(trainer, make_rows()[:1])
    assert teacher_sources == [theirs["input_ids"][0]]
    assert sources == make_processor()(images=images, text=["what is it"])["input_ids"]


def test_a_teacher_prompt_of_text_is_read_as_it_is_by_a_teacher_that_reads_images(tmp_path):
    rows = [{**row, "teacher_prompt": f"look: {row['prompt']}"} for row in make_rows()]
    reader = make_teacher_processor(chat_template=TEMPLATE)
    trainer = make_trainer(tmp_path, rows, reader=reader)
    trainer.train()
    expected = plain_loss(rows, make_student(), make_teacher(), reader, text=lambda row: row["teacher_prompt"])
    torch.testing.assert_close(history_of(trainer)[0], expected.item(), **OTHER_ORDER)


def test_a_long_source_loses_text_for_both_and_never_an_image(tmp_path):
    rows = make_rows()[:1]
    (whole,) = make_processor()(images=rows[0]["images"], text=["what is it"])["input_ids"]
    trainer = make_trainer(tmp_path, rows, max_source_length=len(whole) - 2)
    (source,), (teacher_source,) = ids_read(trainer, rows)
    words_kept = make_tokenizer()("what is it", add_special_tokens=False)["input_ids"][:-2]
    image = make_tokenizer().convert_tokens_to_ids("<image>")
    assert source == [image] * (len(whole) - 1 - len(words_kept) - 2) + [*words_kept, 2]
    assert teacher_source == [image] * 4 + words_kept
    trainer = make_trainer(tmp_path, rows, max_source_length=5, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match=f"has {len(whole)} tokens, .* `max_source_length` is 5, and images are not"):
        trainer.train()


@pytest.mark.parametrize("as_stream", [False, True])
def test_one_image_or_none_may_stand_in_a_column_of_its_own(as_stream, tmp_path):
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
    for name, parts in (
        ("student", (make_student(), make_processor())),
        ("teacher", (make_teacher(), make_teacher_processor())),
    ):
        for part in parts:
            part.save_pretrained(tmp_path / name)
    args = make_args(tmp_path / "out", lmbda=0.0, max_steps=1, per_device_train_batch_size=4)
    folders = (str(tmp_path / "student"), str(tmp_path / "teacher"))
    trainer = Seq2SeqDistillationTrainer(*folders, args, train_dataset=as_dataset(make_rows()))
    trainer.train()
    expected = plain_loss(make_rows(), make_student(), make_teacher(), make_teacher_processor())
    torch.testing.assert_close(history_of(trainer)[0], expected.item(), **OTHER_ORDER)
    trainer.save_model()
    assert EncDecVLMProcessor.from_pretrained(args.output_dir).image_processor.patch_size == PATCH


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "<image> and <image>"}, "`prompt` of index=0 has places for 2 image.s., but the row has 1"),
        ({"images": []}, "`prompt` of index=0 has places for 1 image.s., but the row has 0"),
        ({"completion": "an <image>"}, "`completion` of index=0 has the token '<image>', which stands for an image"),
    ],
)
def test_images_and_their_places_must_agree_in_number(change, message, tmp_path):
    row = {**make_rows()[0], "prompt": "<image> what", **change}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, [row])


@pytest.mark.parametrize("as_stream", [False, True])
def test_a_damaged_image_is_refused_by_its_row(as_stream, tmp_path):
    rows = make_rows()
    PILImage.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    rows[3]["images"][1] = {"bytes": (tmp_path / "whole.png").read_bytes()[:999], "path": None}
    dataset = as_dataset(rows)
    dataset = dataset.to_iterable_dataset() if as_stream else dataset
    trainer = make_trainer(tmp_path, dataset=dataset, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match="Row 3: Image 1 cannot be read: image file is truncated"):
        trainer.train()


def test_a_text_teacher_without_a_caption_is_refused(tmp_path):
    rows = make_rows(captions=True)
    rows[1]["teacher_prompt"] = None
    with pytest.raises(ValueError, match=r"Row 1 has 1 image.* the teacher reads text alone .* no `teacher_prompt`"):
        make_trainer(tmp_path, rows, teacher=make_text_teacher(), reader=make_tokenizer(None))


def test_another_vocabulary_is_refused_whatever_its_size(tmp_path):
    other = make_tokenizer(None)
    other.add_tokens(["<video>"])  # as many as the student's, whose last is the image's
    with pytest.raises(ValueError, match=r"disagree about 1 of .* '<image>' and '<video>'"):
        make_trainer(tmp_path, make_rows(True), teacher=make_text_teacher(len(other)), reader=other)


def test_processors_must_be_those_of_the_models(tmp_path):
    arguments = (make_student(), make_teacher(), make_args(tmp_path))
    with pytest.raises(TypeError, match=r"`processing_class` is a .*, but a processor is needed"):
        Seq2SeqDistillationTrainer(*arguments, processing_class=make_tokenizer())
    with pytest.raises(TypeError, match="`teacher_processing_class` is a LlavaProcessor, but a tokenizer is needed"):
        make_trainer(tmp_path, make_rows(True), teacher=make_text_teacher())
    teacher = make_teacher()
    teacher.config.image_token_id = 5
    with pytest.raises(ValueError, match=r"puts images at the token id .*, but LlavaForConditionalGeneration looks"):
        make_trainer(tmp_path, teacher=teacher)
