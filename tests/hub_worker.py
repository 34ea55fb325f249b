# SPDX-License-Identifier: Apache-2.0
"""Use a saved folder in a process that cannot import `encdec_slm`, as users who download it do.

python hub_worker.py <folder> <expected.pt> <workspace> runs every job below and writes `<workspace>/report.json`, with
`null` or a traceback for each job.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)


class PackageIsNotInstalled:
    """An import finder that hides `encdec_slm`."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("encdec_slm", "modeling_encdec_slm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(auto_class, folder, **kwargs):
    model, info = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    return model.eval()


def logits_of(model, expected):
    with torch.no_grad():
        return model(**expected["inputs"]).logits


def train(model, output_dir, tokenizer):
    rows = [{"input_ids": [4 + i, 5, 6, 7][: 2 + i], "labels": [8, 9 + i, 2]} for i in range(3)]
    arguments = Seq2SeqTrainingArguments(
        output_dir,
        max_steps=2,
        save_steps=2,
        learning_rate=0.01,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    trainer = Seq2SeqTrainer(model, arguments, collator, rows, processing_class=tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert trainer.train().training_loss > 0
    unchanged = [name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])]
    # One of LoRA's factors starts at zero, so the other has a gradient from the second step on only.
    assert not unchanged, unchanged
    return Path(output_dir) / "checkpoint-2"


def check_the_config_loads_and_survives_a_save(folder, workspace, expected):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.model_type == "encdec_slm" and config.hidden_size == 32 and config.decoder_num_hidden_layers == 2
    assert type(AutoModelForSeq2SeqLM.from_config(config, trust_remote_code=True)).__name__.startswith("EncDecSLM")


def check_the_logits_are_those_of_the_saving_process(folder, workspace, expected):
    torch.testing.assert_close(logits_of(load(AutoModelForSeq2SeqLM, folder), expected), expected["logits"])


def check_the_bare_model_and_the_encoder_load_from_the_same_folder(folder, workspace, expected):
    inputs = expected["inputs"]
    with torch.no_grad():
        body = load(AutoModel, folder)(**inputs)
        encoder = load(AutoModelForTextEncoding, folder)
        encoded = encoder(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    assert type(encoder).__name__ == "EncDecSLMEncoderModel"
    torch.testing.assert_close(body.last_hidden_state, expected["decoder_states"])
    torch.testing.assert_close(encoded, expected["encoder_states"])


def check_generate_gives_the_same_tokens(folder, workspace, expected):
    model = load(AutoModelForSeq2SeqLM, folder)
    source = {name: expected["inputs"][name] for name in ("input_ids", "attention_mask")}
    for name, tokens in expected["generated"].items():
        settings = {"greedy": {}, "beams": {"num_beams": 3}}[name]
        generated = model.generate(**source, do_sample=False, max_new_tokens=12, **settings)
        assert torch.equal(generated, tokens), name


def check_folders_saved_here_work_too(folder, workspace, expected):
    second = workspace / "second"
    load(AutoModelForSeq2SeqLM, folder).save_pretrained(second)
    assert sorted(path.name for path in second.iterdir()) == expected["files"]
    for code in Path(folder).glob("*.py"):
        assert (second / code.name).read_text() == code.read_text(), code.name
    torch.testing.assert_close(logits_of(load(AutoModelForSeq2SeqLM, second), expected), expected["logits"])
    load(AutoModel, second).save_pretrained(workspace / "second_body")
    load(AutoModelForTextEncoding, second).save_pretrained(workspace / "second_encoder")
    for name in ("second_body", "second_encoder"):
        assert (workspace / name / "pipeline_encdec_slm.py").is_file()
        assert not (workspace / name / "generation_config.json").exists()
        source = expected["inputs"]["input_ids"], expected["inputs"]["attention_mask"]
        with torch.no_grad():
            encoded = load(AutoModelForTextEncoding, workspace / name)(*source).last_hidden_state
        torch.testing.assert_close(encoded, expected["encoder_states"])
    torch.testing.assert_close(
        logits_of(load(AutoModelForSeq2SeqLM, workspace / "second_body"), expected), expected["logits"]
    )


def check_checkpoints_of_the_trainer_are_complete_folders(folder, workspace, expected):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = load(AutoModelForSeq2SeqLM, folder)
    checkpoint = train(model, workspace / "training", tokenizer)
    assert set(expected["files"]) <= {path.name for path in checkpoint.iterdir()}
    trained = logits_of(model.eval(), expected)
    torch.testing.assert_close(logits_of(load(AutoModelForSeq2SeqLM, checkpoint), expected), trained)
    assert not torch.allclose(trained, expected["logits"])


def check_lora_adapters_train_save_load_and_merge(folder, workspace, expected):
    from peft import AutoPeftModelForSeq2SeqLM, LoraConfig, PeftModel, get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    lora = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=PROJECTIONS)
    model = get_peft_model(load(AutoModelForSeq2SeqLM, folder), lora)
    checkpoint = train(model, workspace / "lora", tokenizer)
    adapted = logits_of(model.eval(), expected)
    assert not torch.allclose(adapted, expected["logits"])
    loaded = PeftModel.from_pretrained(load(AutoModelForSeq2SeqLM, folder), checkpoint).eval()
    torch.testing.assert_close(logits_of(loaded, expected), adapted)
    by_adapter = AutoPeftModelForSeq2SeqLM.from_pretrained(checkpoint, trust_remote_code=True).eval()
    torch.testing.assert_close(logits_of(by_adapter, expected), adapted)
    loaded.merge_and_unload().save_pretrained(workspace / "merged")
    assert sorted(path.name for path in (workspace / "merged").iterdir()) == expected["files"]
    # Merging adds B A to W once instead of adding B A x to W x.
    merged = logits_of(load(AutoModelForSeq2SeqLM, workspace / "merged"), expected)
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)


def check_without_trust_the_message_names_the_argument(folder, workspace, expected):
    try:
        AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("code ran without trust")


def check_a_folder_without_its_code_names_the_missing_file(folder, workspace, expected):
    for missing in sorted(path.name for path in Path(folder).glob("*.py")):
        incomplete = workspace / f"without_{missing.partition('.')[0]}"
        incomplete.mkdir()
        for path in Path(folder).iterdir():
            if path.name != missing:
                (incomplete / path.name).symlink_to(path)
        try:
            AutoModelForSeq2SeqLM.from_pretrained(incomplete, trust_remote_code=True)
        except OSError as error:
            assert missing in str(error), error
        else:
            raise AssertionError(f"loaded without {missing}")


JOBS = {name.removeprefix("check_"): job for name, job in list(globals().items()) if name.startswith("check_")}


def main(folder, expected, workspace):
    assert not any(name.startswith("encdec_slm") for name in sys.modules)
    sys.meta_path.insert(0, PackageIsNotInstalled())
    expected, workspace = torch.load(expected), Path(workspace)
    report = {}
    for name, job in JOBS.items():
        try:
            job(folder, workspace, expected)
            report[name] = None
        except Exception:
            report[name] = traceback.format_exc()
    (workspace / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
