# SPDX-License-Identifier: Apache-2.0
"""A saved vision-text folder in a process that has neither the package nor torchvision: everything a user does."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from conftest import TINY_SIGLIP, save_vision_folder


JOBS = r"""
import sys
sys.modules["encdec_slm"] = sys.modules["torchvision"] = None
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import (
    AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForSeq2SeqLM,
    AutoProcessor, Seq2SeqTrainer, Seq2SeqTrainingArguments, pipeline,
)
folder, workspace = sys.argv[1:]
trusted = {"trust_remote_code": True}
file = f"{folder}/picture.png"
image = Image.open(file)

def load(auto_class, path=folder):
    model, info = auto_class.from_pretrained(path, output_loading_info=True, **trusted)
    assert not any(info.values()), info
    return model.eval()

load(AutoModel), load(AutoModelForMultimodalLM), load(AutoModelForSeq2SeqLM)
model, processor = load(AutoModelForImageTextToText), AutoProcessor.from_pretrained(folder, **trusted)
assert AutoImageProcessor.from_pretrained(folder, **trusted).to_dict() == processor.image_processor.to_dict()
rows = {"images": [[image], [], [image, image]], "text": ["what?", "say it", "one <image> two <image>?"]}
inputs = processor(**rows, padding=True, return_tensors="pt")
expected = model.generate(**inputs, max_new_tokens=6)
assert torch.equal(model.generate(**inputs, max_new_tokens=6, cache_implementation="static"), expected)

def written(result):
    return (result[0] if isinstance(result, list) else result)["generated_text"]

chat = [{"role": "user", "content": [{"type": "image", "url": file}, {"type": "text", "text": "what?"}]}]
options = {"max_new_tokens": 6, "return_full_text": False}
answers = []
by_path = pipeline("image-text-to-text", model=folder, **trusted)
assert type(by_path).__name__ == "EncDecVLMPipeline"
for pipe in (by_path, type(by_path)(model=model, processor=processor)):
    assert pipe(text=[chat, chat], **options)[1] == pipe(text=chat, **options)
    plain = pipe(images=[file, image], text=["what?"] * 2, batch_size=2, **options)
    plain = [written(one) for one in (*plain, pipe(images=image, text="what?", **options))]
    assert plain[0] == plain[1] == plain[2]
    answers.append((plain[0], written(pipe(text=chat, **options))))
assert answers[0] == answers[1]

def collate(rows):
    images, texts = ([row[name] for row in rows] for name in ("images", "text"))
    batch = processor(images, texts, padding=True, return_tensors="pt")
    labels = processor.tokenizer([row["answer"] for row in rows], padding=True, return_tensors="pt")["input_ids"]
    return {**batch, "labels": labels.masked_fill(labels == processor.tokenizer.pad_token_id, -100)}

data = [{"images": [image], "text": "what?", "answer": "this"}, {"images": [], "text": "say it", "answer": "it"}] * 2
options = {"max_steps": 1, "per_device_train_batch_size": 2, "predict_with_generate": True, "report_to": "none"}
options |= {"generation_max_length": 5, "remove_unused_columns": False, "use_cpu": True, "disable_tqdm": True}
trained = load(AutoModelForImageTextToText)
args = Seq2SeqTrainingArguments(f"{workspace}/run", **options)
trainer = Seq2SeqTrainer(trained, args, collate, data, data, processing_class=processor)
trainer.train()
assert len(trainer.predict(data).predictions) == 4
trainer.save_model()
assert torch.equal(load(AutoModelForImageTextToText, args.output_dir).lm_head.weight, trained.lm_head.weight)
AutoProcessor.from_pretrained(args.output_dir, **trusted)

parts = r".*(self_attn.q_proj|multi_modal_projector.linear_1|vision_tower.*v_proj)"
lora = LoraConfig(r=2, target_modules=parts, init_lora_weights=False)
adapted = get_peft_model(load(AutoModelForImageTextToText), lora)
adapted.save_pretrained(f"{workspace}/adapter")
merged = PeftModel.from_pretrained(load(AutoModelForImageTextToText), f"{workspace}/adapter").merge_and_unload()
merged.save_pretrained(f"{workspace}/merged")
target = {"decoder_input_ids": torch.tensor([[1, 5, 7]] * 3)}
with torch.no_grad():
    logits = load(AutoModelForImageTextToText, f"{workspace}/merged")(**inputs, **target).logits
    torch.testing.assert_close(logits, adapted.eval()(**inputs, **target).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, model(**inputs, **target).logits)
"""


@pytest.mark.slow
def test_a_folder_alone_answers_trains_and_is_adapted_without_the_package(tmp_path):
    folder = tmp_path / "model"
    save_vision_folder(
        folder, vision_config={**TINY_SIGLIP, "image_size": 16, "patch_size": 8}, image_grid_pinpoints=None
    )
    Image.effect_noise((40, 30), 90).convert("RGB").save(folder / "picture.png")
    (tmp_path / "empty").mkdir()
    own = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    command = [sys.executable, "-c", JOBS, str(folder), str(tmp_path)]
    run = subprocess.run(
        command, cwd=tmp_path / "empty", env={**os.environ, **own}, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
