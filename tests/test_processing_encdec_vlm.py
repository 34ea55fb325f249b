# SPDX-License-Identifier: Apache-2.0
"""Texts with images: every image has its tokens, every token its image, and what a user types stays text."""

import copy
import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.processing_utils import TextKwargs

from conftest import PROCESSOR_CODE_FILES
from encdec_slm.image_processing_encdec_vlm import EncDecVLMImageProcessor
from encdec_slm.processing_encdec_vlm import EncDecVLMProcessor
from encdec_slm.trainers.new_models import train_tokenizer
from encdec_slm.trainers.row_encoding import build_row_encoder


GOLDEN = json.loads((Path(__file__).parent / "golden" / "vision_golden.json").read_text(encoding="utf-8"))
PROMPTS = [case for case in GOLDEN["prompts"] if case["template"] == "mu_v1"]
# Stands for an image among the words of a prompt.
IMAGE = -200


def make_tokenizer(special=True):
    tokenizer = train_tokenizer([case["prompt"] for case in PROMPTS], 300, model_max_length=4096)
    tokenizer.add_tokens(["<image>"], special_tokens=special)
    return tokenizer


@pytest.fixture(scope="module")
def processor():
    """Tiles of 28 pixels in 4 x 4 patches; a tokenizer that ends texts in `</s>`, as the family's do."""
    return EncDecVLMProcessor(EncDecVLMImageProcessor(size=28, patch_size=7), make_tokenizer())


@pytest.fixture
def wide():
    """A picture of 64 tokens."""
    return Image.new("RGB", (60, 45), (200, 10, 10))


@pytest.fixture
def square():
    """A picture of 36 tokens."""
    return Image.new("RGB", (20, 20), (10, 200, 10))


def collapse(processor, ids):
    """`ids` with one -200 for each run of image tokens, and the lengths of the runs."""
    runs = [(token == processor.image_token_id, list(run)) for token, run in groupby(ids)]
    return [token for is_image, run in runs for token in ([IMAGE] if is_image else run)], [
        len(run) for is_image, run in runs if is_image
    ]


def words(processor, *pieces):
    """Ids of texts and images, piece by piece, with the end token."""
    tokenizer = processor.tokenizer
    rows = [[piece] if piece == IMAGE else tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces]
    return [token for row in rows for token in row] + [tokenizer.eos_token_id]


def ask(text, *images):
    return [
        {"role": "user", "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]}
    ]


@pytest.mark.parametrize("case", PROMPTS, ids=lambda case: case["prompt"][-30:])
def test_chat_messages_become_the_original_prompt(processor, wide, case):
    messages = ask(case["question"], *([wide] if case["with_image"] else []))
    assert processor.apply_chat_template(messages) == case["prompt"]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == case["prompt"]
    output = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    pieces = case["prompt"].split("<image>")
    expected = words(processor, pieces[0], *([IMAGE] if case["with_image"] else []))
    assert collapse(processor, output["input_ids"][0].tolist()) == (expected, [64] if case["with_image"] else [])
    assert ("pixel_values" in output) == case["with_image"]


@pytest.mark.parametrize("case", GOLDEN["prompts"], ids=lambda case: case["prompt"][-30:])
def test_prompts_are_tokenized_between_images(processor, wide, case):
    output = processor(text=case["prompt"], images=wide if case["with_image"] else None)
    before, *after = case["prompt"].split("<image>")
    pieces = [before, IMAGE, *after] if case["with_image"] else [before]
    assert collapse(processor, output["input_ids"][0])[0] == words(processor, *pieces)


def test_500_random_sizes_have_a_token_for_every_feature(processor):
    generator = np.random.default_rng(2)
    sizes = np.exp(generator.uniform(0, np.log(600), (500, 2))).astype(int)
    images = [Image.new("L", (int(width), int(height))) for width, height in sizes]
    output = processor(text=["<image>"] * 500, images=images)
    counts = [ids.count(processor.image_token_id) for ids in output["input_ids"]]
    assert (
        counts
        == processor._get_num_multimodal_tokens([(image.height, image.width) for image in images]).num_image_tokens
    )
    tiles = processor._get_num_multimodal_tokens(output["image_sizes"].tolist()).num_image_patches
    assert len(output["pixel_values"]) == sum(tiles)
    assert output["image_sizes"].tolist() == sizes[:, ::-1].tolist()
    assert len(set(counts)) > 15


def test_the_output_is_what_the_model_reads(processor, wide, square):
    output = processor(
        text=["a <image>", "<image> longer than a"], images=[wide, square], padding=True, return_tensors="pt"
    )
    assert list(output) == processor.model_input_names
    assert output["input_ids"].shape == output["attention_mask"].shape
    assert (output["attention_mask"] == (output["input_ids"] != processor.tokenizer.pad_token_id)).all()
    assert output["pixel_values"].shape == (7 + 2, 3, 28, 28)
    assert output["image_sizes"].tolist() == [[45, 60], [20, 20]]
    assert output["image_sizes"].dtype == output["input_ids"].dtype == torch.int64
    assert (output["input_ids"] == processor.image_token_id).sum(1).tolist() == [64, 36]


def test_a_batch_is_its_rows(processor, wide, square):
    chats = [ask("first", wide, square), ask("second"), ask("third", square)]
    options = {"tokenize": True, "return_dict": True}
    rows = [processor.apply_chat_template(chat, **options) for chat in chats]
    batch = processor.apply_chat_template(chats, **options)
    assert batch["input_ids"] == [row["input_ids"][0] for row in rows]
    pixels = [row["pixel_values"] for row in rows if "pixel_values" in row]
    np.testing.assert_array_equal(batch["pixel_values"], np.concatenate(pixels))
    padded = processor.apply_chat_template(chats, **options, return_tensors="pt")
    assert [
        ids[mask.bool()].tolist() for ids, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True)
    ] == batch["input_ids"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_the_tokenizers(processor, square, side):
    output = processor(
        text=["a <image>", "no image"], images=square, padding="max_length", max_length=50, padding_side=side
    )
    for ids, mask in zip(output["input_ids"], output["attention_mask"], strict=True):
        real = ids[-sum(mask) :] if side == "left" else ids[: sum(mask)]
        assert len(ids) == 50
        assert real[-1] == processor.tokenizer.eos_token_id
        assert 0 not in real


def test_text_alone_is_tokenized_as_by_the_tokenizer(processor):
    texts = ["a text", "", "another one, with </s> in it"]
    assert processor(text=texts)["input_ids"] == processor.tokenizer(texts)["input_ids"]
    bare = processor(text=texts, add_special_tokens=False)["input_ids"]
    assert bare == processor.tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_images_alone_give_pixels_alone(processor, wide):
    assert list(processor(images=wide)) == ["pixel_values", "image_sizes"]


def test_images_without_a_token_stand_in_front(processor, wide, square):
    one = processor(text="What?", images=[wide, square])["input_ids"][0]
    assert collapse(processor, one) == (words(processor, IMAGE, "What?"), [64 + 36])
    texts = ["a", "b"]
    rows = processor(text=texts, images=[wide, square])["input_ids"]
    assert texts == ["a", "b"]
    assert [row.count(processor.image_token_id) for row in rows] == [64, 36]
    nested = processor(text=["a", "b <image> c", "d"], images=[[wide, wide], [square], []])["input_ids"]
    assert [row.count(processor.image_token_id) for row in nested] == [128, 36, 0]
    assert nested[0][:128] == [processor.image_token_id] * 128


def test_flat_images_follow_the_tokens_of_all_texts(processor, wide, square):
    rows = processor(text=["<image> and <image>", "none", "<image>"], images=[wide, square, wide])["input_ids"]
    assert collapse(processor, rows[0])[1] == [64, 36]
    assert [row.count(processor.image_token_id) for row in rows] == [100, 0, 64]


@pytest.mark.parametrize(
    ("text", "num_images", "message"),
    [
        ("<image> or <image>?", 1, r"Text 0 has 2 image tokens \(`<image>`\), but 1 images"),
        ("<image>", 3, r"Text 0 has 1 image tokens .* but 3 images"),
        ("<image>", 0, r"Text 0 has 1 image tokens .* but 0 images"),
        ("<image>", None, r"Text 0 has 1 image tokens .* but 0 images"),
        (["<image>", "<image>"], 3, "3 images and 2 texts with 2 image tokens"),
        (["<image>", "b"], 0, "0 images and 2 texts with 1 image tokens"),
        (["a", "b"], 3, "3 images and 2 texts with 0 image tokens"),
        (["a", "b"], [1, 1, 1], "3 lists of images and 2 texts"),
        (["a", "<image>"], [1, 2], "Text 1 has 1 image tokens .* but 2 images"),
        (["<image>", "<image>"], [2, 0], "Text 0 has 1 image tokens .* but 2 images"),
    ],
)
def test_images_and_tokens_that_differ_in_number_are_refused(processor, square, text, num_images, message):
    images = num_images
    if isinstance(num_images, int):
        images = [square] * num_images
    elif num_images is not None:
        images = [[square] * count for count in num_images]
    with pytest.raises(ValueError, match=message):
        processor(text=text, images=images)


@pytest.mark.parametrize("special", [True, False])
def test_an_image_token_that_a_user_types_stays_text(wide, special):
    processor = EncDecVLMProcessor(EncDecVLMImageProcessor(size=28, patch_size=7), make_tokenizer(special))
    tokenizer = processor.tokenizer
    messages = ask("What does <image> mean in <image><image>?", wide)
    output = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    ids, runs = collapse(processor, output["input_ids"][0])
    assert runs == [64]
    # As the original would have written it, had the user typed another word.
    typed = processor.apply_chat_template(ask("What does TAG mean in TAGTAG?", wide)).replace("TAG", "<image>")
    assert tokenizer.decode([i for i in ids if i != IMAGE], skip_special_tokens=True) == typed.removesuffix("<image>")
    # Rendering first and tokenizing then is the same.
    prompt = processor.apply_chat_template(messages)
    assert processor(text=prompt, images=[wide])["input_ids"] == output["input_ids"]


def test_a_typed_image_token_without_images_stays_text(processor):
    for content in ("<image>", [{"type": "text", "text": "<image>"}]):
        messages = [{"role": "system", "content": "<image>!"}, {"role": "user", "content": content}]
        ids = processor.apply_chat_template(messages, tokenize=True)[0]
        assert processor.image_token_id not in ids
        assert processor.tokenizer.decode(ids, skip_special_tokens=True) == "<image>!\n###Question: <image>"
        assert messages[1]["content"] == content


def test_typed_pieces_that_join_into_an_image_token_are_refused(processor, square):
    messages = ask("<ima", square)
    messages[0]["content"].append({"type": "text", "text": "ge>"})
    with pytest.raises(ValueError, match=r"Text 0 has 2 image tokens .* but 1 images"):
        processor.apply_chat_template(messages, tokenize=True)


def test_paths_of_images_are_no_text(processor, square, tmp_path):
    path = tmp_path / "<image>.png"
    square.save(path)
    for block in ({"path": str(path)}, {"url": str(path)}, {"image": path.read_bytes()}):
        messages = [{"role": "user", "content": [{"type": "image", **block}]}]
        assert processor.apply_chat_template(messages, tokenize=True)[0].count(processor.image_token_id) == 36


@pytest.mark.skipif("sanitize_control_tokens" not in TextKwargs.__annotations__, reason="transformers is older")
def test_other_control_tokens_can_be_kept_out_too(processor, square):
    output = processor.apply_chat_template(
        ask("Is </s> or <image> the end?", square), tokenize=True, return_dict=True, sanitize_control_tokens=True
    )
    ids = output["input_ids"][0]
    assert (ids.count(processor.tokenizer.eos_token_id), ids.count(processor.image_token_id)) == (1, 36)
    assert "Is </s> or <image> the end?" in processor.decode(ids)


def test_a_conversation_keeps_its_context_last(processor, wide, square):
    messages = [
        {"role": "system", "content": "Be brief."},
        *ask("One?", wide),
        {"role": "assistant", "content": "Yes."},
        *ask("Two?", square),
    ]
    prompt = "Be brief.\n###Question: \nOne?\n###Answer: Yes.\n###Question: \nTwo?\n###Context: <image><image>"
    assert processor.apply_chat_template(messages) == prompt
    ids = processor.apply_chat_template(messages, tokenize=True)[0]
    assert ids.count(processor.image_token_id) == 64 + 36


def test_truncation_cuts_texts_but_never_images(processor, square):
    text = "a text of many words, more than fit"
    expected = processor.tokenizer(text, truncation=True, max_length=9)["input_ids"]
    assert processor(text=text, truncation=True, max_length=9)["input_ids"] == [expected]
    for max_length in (0, 1):
        ids = processor(text=text, truncation=True, max_length=max_length)["input_ids"]
        assert ids == [[processor.tokenizer.eos_token_id]]
    with pytest.raises(ValueError, match=r"38.* 36"):
        processor(text="<image>!", images=square, truncation=True, max_length=36)
    cut = processor(text="<image>!", images=square, truncation=True, max_length=37)["input_ids"][0]
    assert cut == [processor.image_token_id] * 36 + [processor.tokenizer.eos_token_id]


# Questions


def text_of(processor, ids):
    return processor.decode([token for token in ids if token != processor.image_token_id], skip_special_tokens=True)


def test_a_question_is_encoded_as_its_chat(processor, wide, square):
    output = processor.encode_questions("What?", [wide, square], return_tensors="pt")
    options = {"tokenize": True, "return_dict": True, "processor_kwargs": {"return_tensors": "pt"}}
    expected = processor.apply_chat_template(ask("What?", wide, square), **options)
    assert output.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(output[name], value), name


@pytest.mark.parametrize("template", [None, "Q: {{ messages[0]['content'][-1]['text'] }} <image>"])
def test_the_processors_own_template_renders_a_question(processor, square, template):
    processor = copy.copy(processor)
    processor.chat_template = template
    (ids,) = processor.encode_questions("What?", square)["input_ids"]
    assert text_of(processor, ids) == ("What?" if template is None else "Q: What? ")
    assert ids.count(processor.image_token_id) == 36
    (typed,) = processor.encode_questions("a <image> b <image>", square)["input_ids"]
    assert typed.count(processor.image_token_id) == 36


def test_image_tokens_of_a_question_mark_places_if_it_has_as_many_images(processor, square):
    processor = copy.copy(processor)
    processor.chat_template = None
    for question, expected in {"a <image> b": "a  b", "a <image> <image>": "a <image> <image>"}.items():
        (ids,) = processor.encode_questions(question, square)["input_ids"]
        assert ids.count(processor.image_token_id) == 36
        assert text_of(processor, ids) == expected


def test_questions_in_a_batch_are_those_alone(processor, wide, square):
    questions, images = ["first", "second", "a third one"], [[wide], [], [square, wide]]
    alone = [processor.encode_questions(*pair)["input_ids"][0] for pair in zip(questions, images, strict=True)]
    assert processor.encode_questions(questions, images)["input_ids"] == alone
    padded = processor.encode_questions(questions, images, return_tensors="pt")
    assert padded["attention_mask"].sum(1).tolist() == list(map(len, alone))
    one_each = processor.encode_questions(questions[:2], [wide, square])["input_ids"]
    assert [row.count(processor.image_token_id) for row in one_each] == [64, 36]


@pytest.mark.parametrize("template", [None, "", "as it is"])
def test_a_question_that_is_too_long_is_refused_or_cut_at_its_end(processor, wide, template):
    if template is not None:
        processor = copy.copy(processor)
        processor.chat_template = template and "Q: {{ messages[0]['content'][-1]['text'] }} <image> ?"
    questions = ["word " * 300, "short"]
    whole = processor.encode_questions(questions, [wide, wide])["input_ids"]
    with pytest.raises(ValueError, match=rf"{len(whole[0])} tokens, 64 .* 150\. .*`truncation=True`"):
        processor.encode_questions(questions, [wide, wide], max_length=150)
    cut, short = processor.encode_questions(questions, [wide, wide], truncation=True, max_length=150)["input_ids"]
    assert short == whole[1]
    assert 145 <= len(cut) <= 150 and cut.count(processor.image_token_id) == 64
    assert cut[-3:] == whole[0][-3:]  # the end of the template is kept
    with pytest.raises(ValueError, match=r"64 of them for images.* 40"):
        processor.encode_questions("word", wide, truncation=True, max_length=40)


@pytest.mark.parametrize("template", [None, "Q: {{ messages[0]['content'][-1]['text'] }} <image>"])
@pytest.mark.parametrize("question", ["What?", "a <image> b", "a <image> <image> b", "word " * 300])
def test_training_and_evaluation_encode_a_question_in_the_same_way(processor, square, template, question):
    if template is not None:
        processor = copy.copy(processor)
        processor.chat_template = template
    encoder = build_row_encoder(processor, max_source_length=150)
    row = encoder.collate([{"question": question, "image": square}])
    inputs = processor.encode_questions(question, square, truncation=True, max_length=150, return_tensors="pt")
    assert torch.equal(row["input_ids"], inputs["input_ids"])
    assert torch.equal(row["pixel_values"], inputs["pixel_values"])


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({}, ValueError, "`text`"),
        ({"text": 7}, TypeError, "`text` holds int"),
        ({"text": []}, TypeError, "`text`"),
        ({"text": ["a", None]}, TypeError, "NoneType"),
        ({"text": [[{"role": "user"}]]}, TypeError, "apply_chat_template"),
        ({"text": "a", "videos": [1]}, ValueError, "`videos`"),
        ({"text": "a", "text_target": "b"}, ValueError, "text_target"),
        ({"text": "a", "text_kwargs": {"return_offsets_mapping": True}}, ValueError, "return_offsets_mapping"),
        ({"text": "a", "images": [None]}, TypeError, "Image 0"),
    ],
)
def test_inputs_of_other_types_are_refused(processor, arguments, error, name):
    with pytest.raises(error, match=name):
        processor(**arguments)


@pytest.mark.parametrize(
    ("messages", "options", "name"),
    [
        ([], {}, "messages"),
        ([[]], {}, "messages"),
        (ask("a"), {"continue_final_message": True}, "continue_final_message"),
        ([{"role": "judge", "content": "a"}], {}, "judge"),
        ([{"content": "a"}], {}, "role"),
        (ask("a"), {"chat_template": "{{ nothing.at.all }}"}, "nothing"),
    ],
)
def test_conversations_that_the_template_cannot_render_are_refused(processor, messages, options, name):
    with pytest.raises(ValueError, match=name):
        processor.apply_chat_template(messages, **options)


@pytest.mark.parametrize(
    "messages",
    [
        "a",
        {"role": "user", "content": "a"},
        [ask("a"), {"role": "user", "content": "b"}],
        [{"role": "user", "content": 7}],
        [{"role": "user", "content": ["a"]}],
        [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}],
        [{"role": "user", "content": [{"type": "text", "text": None}]}],
    ],
    ids=str,
)
def test_conversations_of_other_types_are_refused(processor, messages):
    with pytest.raises(TypeError, match=r"conversation|content"):
        processor.apply_chat_template(messages)


def test_a_tokenizer_without_the_token_is_refused():
    tokenizer = train_tokenizer(["a"], 300, model_max_length=64)
    with pytest.raises(ValueError, match="<image>"):
        EncDecVLMProcessor(EncDecVLMImageProcessor(), tokenizer)


def test_the_token_may_have_another_name(square):
    tokenizer = train_tokenizer(["a"], 300, model_max_length=64)
    tokenizer.add_special_tokens({"extra_special_tokens": ["[IMG]"]})
    processor = EncDecVLMProcessor(EncDecVLMImageProcessor(size=28, patch_size=7), tokenizer, image_token="[IMG]")
    messages = ask("Is [IMG] not <image>?", square)
    ids = processor.apply_chat_template(messages, tokenize=True)[0]
    assert processor.apply_chat_template(messages).endswith("not <image>?\n###Context: [IMG]")
    assert processor.image_token_id == tokenizer.convert_tokens_to_ids("[IMG]")
    assert ids.count(processor.image_token_id) == 36


def test_answers_are_decoded(processor):
    ids = [processor.tokenizer.bos_token_id, *words(processor, "an answer")]
    assert processor.post_process_image_text_to_text([ids, ids]) == ["an answer"] * 2
    assert processor.decode(ids, skip_special_tokens=True) == "an answer"


FRESH = """
import sys
sys.modules["encdec_slm"] = None
import json
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(processor.image_processor).__name__ == type(image_processor).__name__ == "EncDecVLMImageProcessor"
assert image_processor.to_dict() == processor.image_processor.to_dict()
image = Image.new("RGB", (60, 45), (200, 10, 10))
messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
output = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
processor.save_pretrained(sys.argv[2])
print(json.dumps([output["input_ids"].tolist(), output["pixel_values"].shape, output["pixel_values"].sum().item()]))
"""


def test_a_saved_folder_works_in_a_fresh_process(processor, wide, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    processor.save_pretrained(first)
    (tmp_path / "cwd").mkdir()
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH, str(first), str(second)],
        cwd=tmp_path / "cwd",
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    # torchao, where it is installed, tells of kernels that it has not for this machine.
    assert not [line for line in run.stderr.splitlines() if "torchao" not in line and "_pytree" not in line]
    expected = processor.apply_chat_template(ask("What?", wide), tokenize=True, return_dict=True, return_tensors="pt")
    ids, shape, total = json.loads(run.stdout)
    assert ids == expected["input_ids"].tolist()
    assert (shape, total) == ([7, 3, 28, 28], expected["pixel_values"].sum().item())
    for folder in (first, second):
        assert {path.name for path in folder.glob("*.py")} == PROCESSOR_CODE_FILES
        config = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
        assert config["auto_map"] == {"AutoProcessor": "processing_encdec_vlm.EncDecVLMProcessor"}
        assert config["image_processor"]["auto_map"]["AutoImageProcessor"].endswith(".EncDecVLMImageProcessor")


def test_loading_keeps_template_and_token(processor, tmp_path):
    custom = EncDecVLMProcessor(
        processor.image_processor, processor.tokenizer, chat_template="{{ messages[0]['content'] }}"
    )
    custom.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text(encoding="utf-8"))
    assert saved["image_token"] == "<image>"
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == "{{ messages[0]['content'] }}"
    assert custom.apply_chat_template([{"role": "user", "content": "Hello"}]) == "Hello"
