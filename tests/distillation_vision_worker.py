# SPDX-License-Identifier: Apache-2.0
"""A tiny vision-text student, tiny teachers, rows for them, and their loss written out plainly."""

import torch
from datasets import Dataset, Features, Image, List, Value
from distillation_worker import make_args, plain_divergence
from PIL import Image as PILImage
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    ProcessorMixin,
)

from conftest import (
    TINY_CLIP,
    build_byte_tokenizer,
    build_config,
    build_processor,
    build_vision_config,
    build_vision_model,
    randomize,
)
from encdec_slm.trainers import Seq2SeqDistillationTrainer


TILE, PATCH = TINY_CLIP["image_size"], TINY_CLIP["patch_size"]
PINPOINTS = [[TILE, TILE], [TILE, 2 * TILE], [2 * TILE, TILE]]
IMAGE_ID = len(build_byte_tokenizer())
# (width, height) of the images of each row: of one tile and of two, none and several.
IMAGES = [[(30, 30)], [(60, 25)], [], [(20, 50), (28, 28)]]
PROMPTS = ["what is it", "how many are there", "say the word", "compare <image> with <image> now"]
COMPLETIONS = ["a cat", "two of them", "word", "it is the same cat"]
CAPTIONS = ["a cat sits. what is it", "two dogs. how many are there", None, "a cat and a cat. compare"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}\n{% endfor %}answer:"
)


def make_tokenizer(image_token="<image>"):
    return build_byte_tokenizer(image_token=image_token)


def student_config():
    text_config = build_config(vocab_size=IMAGE_ID + 1, max_position_embeddings=256)
    return build_vision_config(text_config, image_token_id=IMAGE_ID, image_grid_pinpoints=PINPOINTS)


def make_processor():
    return build_processor(student_config(), make_tokenizer())


def make_student():
    return build_vision_model(student_config())


def make_teacher_processor(kind="llava", chat_template=None):
    common = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    sizes = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
    if kind == "llava":
        processor = LlavaProcessor(CLIPImageProcessor(**sizes), make_tokenizer(), **common)
    else:
        images = LlavaNextImageProcessor(**sizes, image_grid_pinpoints=PINPOINTS)
        processor = LlavaNextProcessor(images, make_tokenizer(), **common)
    processor.chat_template = chat_template
    return processor


def llama_config(num_tokens):
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaConfig(**sizes, **ids, vocab_size=num_tokens, num_hidden_layers=2)


def make_teacher(kind="llava", num_tokens=IMAGE_ID + 1, image_token_id=IMAGE_ID):
    options = {"text_config": llama_config(num_tokens), "vision_config": dict(TINY_CLIP)}
    options |= {"image_token_id": image_token_id, "vision_feature_layer": -2}
    if kind == "llava":
        return randomize(LlavaForConditionalGeneration(LlavaConfig(**options)), 1).eval()
    config = LlavaNextConfig(**options, image_grid_pinpoints=PINPOINTS)
    return randomize(LlavaNextForConditionalGeneration(config), 1).eval()


def make_text_teacher(num_tokens=IMAGE_ID):
    return randomize(LlamaForCausalLM(llama_config(num_tokens)), 2).eval()


def noise(size, seed):
    width, height = size
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return PILImage.fromarray(pixels.to(torch.uint8).numpy())


def make_rows(captions=False):
    return [
        {
            "images": [noise(size, 10 * index + place) for place, size in enumerate(IMAGES[index])],
            "prompt": PROMPTS[index],
            "completion": COMPLETIONS[index],
            **({"teacher_prompt": CAPTIONS[index]} if captions else {}),
        }
        for index in range(4)
    ]


FEATURES = {"images": List(Image()), "prompt": Value("string"), "completion": Value("string")}


def as_dataset(rows):
    features = {**FEATURES, "teacher_prompt": Value("string")}
    return Dataset.from_list(rows, features=Features({name: features[name] for name in rows[0]}))


def make_trainer(output_dir, rows=None, student=None, teacher=None, processor=None, dataset=None, **settings):
    defaults = {"per_device_train_batch_size": 4, "max_steps": 1, "lmbda": 0.0, "max_completion_length": 24}
    return Seq2SeqDistillationTrainer(
        make_student() if student is None else student,
        make_teacher() if teacher is None else teacher,
        make_args(output_dir, **{**defaults, **settings}),
        train_dataset=as_dataset(make_rows() if rows is None else rows) if dataset is None else dataset,
        processing_class=make_processor(),
        teacher_processing_class=make_teacher_processor() if processor is None else processor,
    )


# The plain loss


def target_of(text):
    return [*make_tokenizer()(text, add_special_tokens=False)["input_ids"], 2]


def student_logits(student, row, target):
    inputs = make_processor()(images=row["images"] or None, text=[row["prompt"]], return_tensors="pt")
    return student(**inputs, decoder_input_ids=torch.tensor([[1, *target[:-1]]])).logits[0]


def teacher_logits(teacher, processor, row, target, text=None):
    """Logits of a plain forward pass that predict the target, with the target behind the source."""
    if isinstance(processor, ProcessorMixin):
        text = row["prompt"] if text is None else text
        text = text if "<image>" in text else "<image>" * len(row["images"]) + text
        inputs = dict(processor(images=row["images"] or None, text=[text], return_tensors="pt"))
    else:
        inputs = dict(processor(row.get("teacher_prompt") or row["prompt"], return_tensors="pt"))
    source = inputs["input_ids"][:, :-1] if inputs["input_ids"][0, -1] == 2 else inputs["input_ids"]
    ids = torch.cat((source, torch.tensor([target])), 1)
    images = {name: value for name, value in inputs.items() if name in ("pixel_values", "image_sizes")}
    with torch.no_grad():
        logits = teacher(input_ids=ids, attention_mask=torch.ones_like(ids), **images).logits[0]
    start = source.shape[1] - 1
    return logits[start : start + len(target)]


def plain_loss(rows, student, teacher, processor, targets=None, common=None, text=None, kd_ratio=1.0, beta=1.0):
    """Means over target tokens: of the divergence on the first `common` ids, and of the gold cross-entropy."""
    divergences, entropies = [], []
    for index, row in enumerate(rows):
        target = target_of(row["completion"]) if targets is None else targets[index]
        logits = student_logits(student, row, target)
        target_logits = teacher_logits(teacher, processor, row, target, text and text(row))
        divergences.append(plain_divergence(logits[:, :common], target_logits[:, :common], beta, 1.0))
        gold = target_of(row["completion"])
        entropies.append(F.cross_entropy(student_logits(student, row, gold), torch.tensor(gold), reduction="none"))
    return kd_ratio * torch.cat(divergences).mean() + (1 - kd_ratio) * torch.cat(entropies).mean()


def greedy_completion(model, processor, row, start):
    text = row["prompt"] if "<image>" in row["prompt"] else "<image>" * len(row["images"]) + row["prompt"]
    inputs = processor(images=row["images"] or None, text=[text], return_tensors="pt")
    if start is None:  # the teacher's text ends where the target begins
        inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][:, :-1], inputs["attention_mask"][:, :-1]
        start = inputs["input_ids"].shape[1]
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": 2, "pad_token_id": 0}
    output = model.generate(**inputs, **options, suppress_tokens=[IMAGE_ID])[0, start:].tolist()
    return output[: output.index(2) + 1] if 2 in output else output
