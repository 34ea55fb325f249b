# SPDX-License-Identifier: Apache-2.0
"""Use a repository in a process without network and without `encdec_slm`, as users who download it do.

[`check_in_fresh_process`] runs this file as a script, so it imports nothing from this package.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path


# Variables with which the check could pass here and fail elsewhere.
CLEARED = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_CACHE", "HF_HUB_CACHE", "HF_HOME", "HF_MODULES_CACHE")
CHECK_SECONDS = 1800


def check_in_fresh_process(folder: Path) -> None:
    """Load a folder with every Auto class, generate, and run the pipeline in a process that has only transformers.

    Args:
        folder (`Path`): Repository to upload.

    Raises:
        ValueError: Something fails. The message has the last line of the error.
    """
    with tempfile.TemporaryDirectory(prefix="encdec_slm_check_") as workspace:
        environment = {name: value for name, value in os.environ.items() if name not in CLEARED}
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(Path(workspace, "hf")), "CUDA_VISIBLE_DEVICES": ""}
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        Path(workspace, "empty").mkdir()
        # -P: do not import modules from the folder of this file.
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", str(Path(__file__).resolve()), str(Path(folder).resolve())],
            cwd=Path(workspace, "empty"),
            env={**environment, **offline, **quiet},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CHECK_SECONDS,
        )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1] if lines else f"exit status {done.returncode} without a message"
        raise ValueError(
            f"The repository of this model does not work without `encdec_slm`: {last}. Nothing was written or "
            "uploaded. Correct the model or its tokenizer, and publish again."
        )


class _PackageIsNotInstalled:
    """An import finder that hides this package."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("encdec_slm", "modeling_encdec_slm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _load(auto_class, folder):
    model, info = auto_class.from_pretrained(folder, trust_remote_code=True, dtype="auto", output_loading_info=True)
    # Unexpected keys are normal: the base model has no head, and the encoder no decoder.
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(f"{auto_class.__name__} lacks weights: {info['missing_keys'] or info['mismatched_keys']}")
    if not type(model).__module__.startswith("transformers_modules."):
        raise ValueError(f"{auto_class.__name__} runs code from outside the folder: {type(model).__module__}")
    return model.eval()


def _use_text(folder):
    from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoModelForTextEncoding, AutoTokenizer, pipeline

    for auto_class in (AutoModel, AutoModelForTextEncoding):
        _load(auto_class, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    batch = tokenizer("one two three", return_tensors="pt", return_token_type_ids=False)
    _load(AutoModelForSeq2SeqLM, folder).generate(**batch, max_new_tokens=2, do_sample=False)
    pipe = pipeline("text2text-generation", model=folder, trust_remote_code=True, device="cpu")
    pipe("one two three", max_new_tokens=2)[0]["generated_text"]


def _use_vision(folder):
    from PIL import Image
    from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoProcessor, pipeline

    for auto_class in (AutoModel, AutoModelForSeq2SeqLM):
        _load(auto_class, folder)
    image = Image.new("RGB", (40, 30), (200, 30, 30))
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    batch = processor.encode_questions("one two three", image, return_tensors="pt")
    _load(AutoModelForImageTextToText, folder).generate(**batch, max_new_tokens=2, do_sample=False)
    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True, device="cpu")
    pipe(images=image, text="one two three", max_new_tokens=2, return_full_text=False)[0]["generated_text"]


def _main(folder):
    sys.meta_path.insert(0, _PackageIsNotInstalled())
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    (_use_vision if hasattr(config, "vision_config") else _use_text)(folder)


if __name__ == "__main__":
    _main(sys.argv[1])
