# SPDX-License-Identifier: Apache-2.0
"""Find checkpoint folders, load any model of the family, and write folders and files atomically."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from .errors import format_list, summarize_error


MODEL_TYPES = ("encdec_slm", "encdec_vlm")
ADAPTER_FILE = "adapter_config.json"
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates"),
    *("vocab.*", "merges.txt"),
)
# Everything that `save_pretrained` of a model and its tokenizer or processor, and a model card, put into a folder.
CHECKPOINT_FILES = (
    *(
        "config.json",
        "generation_config.json",
        "*.safetensors",
        "*.safetensors.index.json",
        "README.md",
        ".gitattributes",
    ),
    *("*_encdec_slm.py", "*_encdec_vlm.py", "processor_config.json", "preprocessor_config.json", *TOKENIZER_FILES),
    *("shell_calibration.json", "results.png"),
)
LOCK_NAME = ".encdec_slm.lock"
INCOMPLETE_PREFIX = ".encdec_slm-incomplete-"
PREVIOUS_PREFIX = ".encdec_slm-previous-"
HUB_TIMEOUT_SECONDS = 10
UNREACHABLE = "the Hub cannot be reached, and the local cache does not have it"


# Find


def find_checkpoint_folder(
    name_or_path: str | Path,
    allow_patterns: Sequence[str] = ("*",),
    *,
    revision: str | None = None,
    subfolder: str | None = None,
) -> Path:
    """Return the local folder of a checkpoint; a repository on the Hub is downloaded first.

    Args:
        name_or_path (`str` or `Path`): A folder, or the name of a repository on the Hub.
        allow_patterns (`Sequence[str]`): Which files to download, as in `huggingface_hub.snapshot_download`.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        subfolder (`str`, *optional*): Folder below `name_or_path` that holds the checkpoint.

    Raises:
        ValueError: There is no such folder, and the repository cannot be downloaded.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        patterns = [f"{subfolder}/{pattern}" for pattern in allow_patterns] if subfolder else list(allow_patterns)
        local_files_only = not check_hub_name(name_or_path, revision)
        try:
            folder = Path(
                snapshot_download(
                    str(name_or_path), revision=revision, allow_patterns=patterns, local_files_only=local_files_only
                )
            )
        except (HFValidationError, OSError) as error:
            reason = UNREACHABLE if local_files_only else summarize_error(error)
            raise ValueError(_not_found(name_or_path, reason)) from error
    folder = folder / (subfolder or "")
    if not folder.is_dir():
        raise ValueError(f"{str(name_or_path)!r} has no folder {subfolder!r}. Give the name of one of its folders.")
    return folder


def check_hub_name(
    name_or_path: str | Path, revision: str | None = None, *, repo_type: str = "model", token: str | None = None
) -> bool:
    """Check that something that is not a local folder is a repository on the Hub.

    transformers and datasets retry an unreachable Hub for half a minute; this asks once.

    Returns:
        `bool`: `False` when the Hub cannot be reached, so that only files in the local cache can be used.

    Raises:
        ValueError: It is a file, can only be a path, or the Hub refuses it. The message keeps the Hub's advice.
    """
    path = Path(name_or_path)
    if path.exists():
        raise ValueError(
            f"{str(name_or_path)!r} is a file, but a folder is required. Give the folder that contains it."
        )
    name = str(name_or_path)
    is_path = path.is_absolute() or name.count("/") > 1 or name.startswith((".", "~")) or "\\" in name
    if is_path or ("/" in name and path.parent.is_dir()):
        raise ValueError(
            f"There is no folder {name!r}. Give the path of an existing folder, or the name of a repository on the "
            "Hub."
        )
    if constants.is_offline_mode():
        return False
    try:
        options = {"repo_type": repo_type, "token": token, "timeout": HUB_TIMEOUT_SECONDS}
        HfApi().repo_info(name, revision=revision, **options)
    except (HFValidationError, HfHubHTTPError) as error:
        if getattr(getattr(error, "response", None), "status_code", 400) >= 500:
            return False
        raise ValueError(_not_found(name, summarize_error(error))) from error
    except Exception:  # the HTTP client's own errors: no network, no name server, a time-out
        return False
    return True


def _not_found(name, reason):
    return (
        f"{str(name)!r} is not a local folder and could not be loaded from the Hub ({reason}). Give the path of a "
        "folder, or the name of a repository on the Hub."
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read `config.json` of a checkpoint folder.

    Raises:
        ValueError: There is none, or it is not a JSON object.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(folder)!r} has no readable config.json ({summarize_error(error)}). Give a folder that "
            "`save_pretrained` wrote, or the name of a model on the Hub."
        ) from error
    return config


def find_source_folders(name_or_path: str | Path | None) -> list[str]:
    """Return what loading a checkpoint reads: the checkpoint and, if it is a local LoRA adapter, its base model."""
    if name_or_path is None:
        return []
    sources = [str(name_or_path)]
    with contextlib.suppress(OSError, ValueError):
        adapter = json.loads(Path(name_or_path, ADAPTER_FILE).read_text(encoding="utf-8"))
        sources.append(adapter.get("base_model_name_or_path") or sources[0])
    return sources


# Load


def load_checkpoint(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    adapter: str = "load",
    family_only: bool = False,
    **kwargs,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin | None]:
    """Load an encoder-decoder in evaluation mode, and its tokenizer or, for a vision-text model, its processor.

    Models of this family use the code of this package; code in the checkpoint is not run unless
    `trust_remote_code=True`.

    Args:
        name_or_path (`str` or `Path`): A folder, or the name of a repository on the Hub. A folder with a LoRA adapter
            loads its base model too.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        subfolder (`str`, *optional*): Folder within the checkpoint.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): `"auto"` keeps the dtype of the file.
        device (`str` or `torch.device`, *optional*): `None` leaves the model on the CPU.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code from the checkpoint.
        adapter (`str`, *optional*, defaults to `"load"`): What to do with a LoRA adapter: `"load"` for inference,
            `"train"` to continue its training (returns a [`~peft.PeftModel`] whose adapter is trainable), or
            `"refuse"`.
        family_only (`bool`, *optional*, defaults to `False`): Refuse other encoder-decoders such as T5.
        kwargs: Passed to `AutoModelForSeq2SeqLM.from_pretrained`, such as `attn_implementation`.

    Returns:
        `tuple`: The model, and its tokenizer or processor (an adapter without one has that of its base model); `None`
        if there is neither.

    Raises:
        ValueError: The checkpoint cannot be found or read, lacks weights, is quantized, decoder-only or of another
            family, or has an adapter that is refused.
    """
    options = {"revision": revision, "subfolder": subfolder or "", "trust_remote_code": trust_remote_code}
    if not Path(name_or_path).is_dir():
        options["local_files_only"] = not check_hub_name(name_or_path, revision)
    name, processing_class = str(name_or_path), None
    try:
        if _is_adapter(name, options):
            model, processing_class = _load_adapter(name, options, adapter, dtype, kwargs)
        else:
            _check_config(_load_config(name, options), name, family_only)
            model = _load_weights(name, options, dtype, kwargs)
        processing_class = load_processing_class(name, model, **options) or processing_class
    except (OSError, KeyError, ImportError, RuntimeError) as error:
        if options.get("local_files_only") and isinstance(error, OSError):
            raise ValueError(_not_found(name, UNREACHABLE)) from error
        raise ValueError(
            f"{name!r} could not be loaded as an encoder-decoder ({summarize_error(error)}). Give a folder that "
            "`save_pretrained` wrote, or the name of a model on the Hub."
        ) from error
    model.eval()
    return (model if device is None else move_to_device(model, device)), processing_class


def load_processing_class(
    name_or_path: str | Path, model: PreTrainedModel, **options
) -> PreTrainedTokenizerBase | ProcessorMixin | None:
    """Load the tokenizer of a model, or the processor of a vision-text model; `None` if the folder has none.

    A tokenizer without a padding token, as many decoder-only models have, is given the one of the model's config.

    Args:
        name_or_path (`str` or `Path`): A folder, or the name of a repository on the Hub.
        model ([`~transformers.PreTrainedModel`]): Its config decides between tokenizer and processor.
        options: Passed to `from_pretrained`.
    """
    options.setdefault("trust_remote_code", False)
    auto_class = AutoProcessor if has_vision(model) else AutoTokenizer
    folder = Path(name_or_path) / options.get("subfolder", "")
    if folder.is_dir() and not any(matches_any(path.name, ("*token*", "vocab*")) for path in folder.iterdir()):
        return None
    processing_class = auto_class.from_pretrained(str(name_or_path), **options)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    pad_token_id = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    if tokenizer.pad_token_id is None and pad_token_id is not None and 0 <= pad_token_id < len(tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id)
    return processing_class


def has_vision(model: PreTrainedModel) -> bool:
    """Return whether a model reads images."""
    return getattr(model.config, "vision_config", None) is not None


def _is_adapter(name, options):
    if Path(name).is_dir():
        return Path(name, options["subfolder"], ADAPTER_FILE).is_file()
    from transformers.utils.peft_utils import find_adapter_config_file

    keys = ("revision", "subfolder", "local_files_only")
    return find_adapter_config_file(name, **{key: options[key] for key in keys}) is not None


def check_no_adapter(
    name_or_path: str | Path, auto_class: str = "AutoPeftModelForCausalLM", local_files_only: bool = False
) -> None:
    """Check that a checkpoint has no LoRA adapter, for callers that read its weights themselves.

    Args:
        name_or_path (`str` or `Path`): A folder, or the name of a repository on the Hub.
        auto_class (`str`, *optional*): PEFT's class that loads the adapter, for the message.
        local_files_only (`bool`, *optional*, defaults to `False`): Look only at the local cache of the Hub.

    Raises:
        ValueError: It has one.
    """
    options = {"revision": None, "subfolder": "", "local_files_only": local_files_only}
    if _is_adapter(str(name_or_path), options):
        raise ValueError(_adapter_message(name_or_path, auto_class))


def _adapter_message(name, auto_class):
    return (
        f"{str(name)!r} holds an adapter (`{ADAPTER_FILE}`), but whole weights are required. Merge it first: "
        f"`model = {auto_class}.from_pretrained(folder).merge_and_unload()`."
    )


def _load_adapter(name, options, adapter, dtype, kwargs):
    """Return an adapted model, and the tokenizer or processor of its base model."""
    if adapter == "refuse":
        raise ValueError(_adapter_message(name, "AutoPeftModelForSeq2SeqLM"))
    from peft import PeftConfig, PeftModel

    peft_options = {key: value for key, value in options.items() if key != "trust_remote_code"}
    base_name = PeftConfig.from_pretrained(name, **peft_options).base_model_name_or_path
    if not base_name:
        raise ValueError(f"{ADAPTER_FILE} of {name!r} does not name its base model. Set `base_model_name_or_path`.")
    base_model, processing_class = load_checkpoint(
        base_name, dtype=dtype, trust_remote_code=options["trust_remote_code"], adapter="refuse", **kwargs
    )
    model = PeftModel.from_pretrained(base_model, name, is_trainable=adapter == "train", **peft_options)
    with contextlib.suppress(OSError):  # saved by our training jobs, not by PEFT
        base_model.generation_config = GenerationConfig.from_pretrained(name, **peft_options)
    return model, processing_class


def _load_config(name, options):
    if Path(name).is_dir():
        read_config(Path(name, options["subfolder"]))
    try:
        return AutoConfig.from_pretrained(name, **options)
    except ValueError as error:
        raise ValueError(
            f"{name!r} could not be loaded as an encoder-decoder ({summarize_error(error)}). Give a folder that "
            "`save_pretrained` wrote, or the name of a model on the Hub."
        ) from error


def _load_weights(name, options, dtype, kwargs):
    # Sizes that differ are refused below by name; transformers refers to a report that may not be visible.
    model, info = AutoModelForSeq2SeqLM.from_pretrained(
        name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options, **kwargs
    )
    check_shapes(name, model, info)
    if info["missing_keys"]:
        raise ValueError(
            f"{name!r} has no weights for {format_list(sorted(info['missing_keys']))}. Give a folder that holds a "
            "complete `...ForConditionalGeneration`."
        )
    return model


def check_shapes(name_or_path: str | Path, model: PreTrainedModel, loading_info: dict[str, Any]) -> None:
    """Check that the weights of a checkpoint had the shapes that its config requires.

    Args:
        name_or_path (`str` or `Path`): The checkpoint, for the message.
        model ([`~transformers.PreTrainedModel`]): The loaded model.
        loading_info (`dict`): From `from_pretrained` with `output_loading_info=True, ignore_mismatched_sizes=True`.

    Raises:
        ValueError: A shape differs, or the config has fewer layers.
    """
    differences = [
        f"{key} has shape {list(found)}, but config.json requires {list(expected)}"
        for key, found, expected in sorted(loading_info["mismatched_keys"])
    ]
    if model.config.model_type in MODEL_TYPES:
        extra = [key for key in loading_info["unexpected_keys"] if re.search(r"\.layers\.\d+\.", key)]
        differences += [f"{key} is in a layer that config.json does not have" for key in sorted(extra)]
    if differences:
        raise ValueError(
            f"The weights of {str(name_or_path)!r} do not fit its config.json: {format_list(differences, 2)}. Give a "
            "folder whose files were saved together."
        )


def _check_config(config: PreTrainedConfig, name, family_only):
    if family_only and config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"{name!r} has `model_type` {config.model_type!r}, but {' or '.join(MODEL_TYPES)} is required."
        )
    if not config.is_encoder_decoder:
        raise ValueError(
            f"{name!r} is a decoder-only or encoder-only model ({config.model_type}), but an encoder-decoder is "
            "required. `encdec-slm adapt` makes one from a decoder-only model."
        )


def move_to_device(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    """Move a model to a device.

    Raises:
        ValueError: This machine does not have the device.
    """
    try:
        return model.to(torch.device(device))
    # torch raises an AssertionError if it was built without the device.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"`device` is {str(device)!r}, but the model could not be moved there ({summarize_error(error)}). Use a "
            "device of this machine, such as 'cpu' or 'cuda'."
        ) from error


def check_complete_model(model: Any, argument: str) -> None:
    """Check that a model in memory can be exported or published as it is.

    Args:
        model: What the caller passed.
        argument (`str`): Its name in messages.

    Raises:
        TypeError: It is not a transformers model.
        ValueError: It has adapters, quantized weights, weights on the meta device or no output head, or is of another
            family.
    """
    name = type(model).__name__
    # Both a PeftModel and a model with adapters from `add_adapter` have this.
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"`{argument}` is a {name} with adapters, but whole weights are required. Merge them first: "
            "`model = model.merge_and_unload()`."
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`{argument}` is a {name}, but must be a model of this family, a folder, or a name on the Hub."
        )
    _check_config(model.config, name, family_only=True)
    if not model.can_generate():
        raise ValueError(f"`{argument}` is a {name} without an output head. Give its `...ForConditionalGeneration`.")
    quantized = [name for name, value in model.named_parameters() if not _is_plain(value)]
    if quantized or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"`{argument}` has quantized weights ({format_list(quantized) or name}). Give the model that it was made "
            "from."
        )
    if any(value.is_meta for value in model.parameters()):
        raise ValueError(f"`{argument}` has weights without data (on the meta device). Load it onto the CPU.")


def _is_plain(parameter):
    return type(parameter.data) is torch.Tensor and parameter.is_floating_point()


# Write


def foreign_files(folder: str | Path) -> list[str]:
    """Return the names in a folder that an earlier checkpoint of this family does not have.

    All names, if the folder holds no checkpoint of this family at all.
    """
    names = sorted(path.name for path in Path(folder).iterdir())
    try:
        is_checkpoint = read_config(folder).get("model_type") in MODEL_TYPES
    except ValueError:
        is_checkpoint = False
    return [name for name in names if not is_checkpoint or not matches_any(name, CHECKPOINT_FILES)]


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Return whether a file name matches one of some patterns such as `"*.safetensors"`."""
    return any(fnmatch(name, pattern) for pattern in patterns)


@contextlib.contextmanager
def write_folder(
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    find_foreign_files: Callable[[Path], Sequence[str]] = foreign_files,
    sources: Sequence[str | Path] = (),
) -> Iterator[Path]:
    """Write a folder atomically: yield a temporary folder whose files become `output_dir` when the block succeeds.

    The temporary folder is inside `output_dir`, so that mount points and links to other disks work. If the block or
    the replacement fails, `output_dir` is as it was.

    Args:
        output_dir (`str` or `Path`): Folder to write; created with its parents.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an earlier output of the same kind. All its files
            are removed.
        find_foreign_files (`Callable`, *optional*): Returns the names in a folder that do not belong to an earlier
            output of the same kind. Such a folder is never replaced. By default an earlier output is a checkpoint.
        sources (`Sequence[str]`, *optional*): Folders that are read. None of them may contain `output_dir` or lie in
            it.

    Raises:
        ValueError: `output_dir` is a file, is not empty, holds other files, overlaps a source, or another process
            writes to it.
    """
    output_dir = Path(output_dir)
    check_no_overlap(output_dir, sources)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"The output {str(output_dir)!r} is a file, but a folder is written. Give another path.")
    _check_replaceable(output_dir, overwrite, find_foreign_files)
    # A relative path changes its meaning if the working directory is in a folder that is replaced.
    output_dir = output_dir.resolve()
    with _created_folder(output_dir), lock_folder(output_dir):
        _remove_leftovers(output_dir)
        before = _entries(output_dir)
        _check_replaceable(output_dir, overwrite, find_foreign_files)
        with tempfile.TemporaryDirectory(prefix=INCOMPLETE_PREFIX, dir=output_dir) as temporary:
            yield Path(temporary)
            if _entries(output_dir) != before:
                raise ValueError(
                    f"The content of {str(output_dir)!r} changed while the output was written. Give another folder."
                )
            _replace_entries(output_dir, Path(temporary), before)


def check_no_overlap(output_dir: str | Path, sources: Iterable[str | Path]) -> None:
    """Check that an output folder is not a source, inside a source, or around one; links are followed.

    Raises:
        ValueError: It is.
    """
    output = Path(output_dir).resolve()
    for source in sources:
        path = Path(source).resolve()
        if Path(source).exists() and (output == path or output in path.parents or path in output.parents):
            raise ValueError(
                f"The output {str(output_dir)!r} and the source {str(source)!r} are the same folder or contain each "
                "other. Give an output folder outside of the source."
            )


def _check_replaceable(output_dir, overwrite, find_foreign_files):
    if not output_dir.is_dir() or not _entries(output_dir):
        return
    if not overwrite:
        raise ValueError(
            f"The folder {str(output_dir)!r} is not empty. Give another folder, or set `overwrite=True` to replace an "
            "earlier output."
        )
    ours = {path.name for path in output_dir.iterdir()} - _entries(output_dir)
    if foreign := [name for name in find_foreign_files(output_dir) if name not in ours]:
        raise ValueError(
            f"The folder {str(output_dir)!r} holds {format_list(foreign)}, which an earlier output of this kind does "
            "not have. Nothing was changed. Give another folder."
        )


def _entries(folder):
    """Names in a folder, without the files of a write in progress."""
    names = {path.name for path in folder.iterdir()}
    return {name for name in names if name != LOCK_NAME and not name.startswith(INCOMPLETE_PREFIX)}


@contextlib.contextmanager
def _created_folder(folder):
    """Create a folder and its parents; remove those that are still empty if the block fails."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Make sure that no other process writes to an existing folder in this way.

    Raises:
        ValueError: Another process does.
    """
    folder = Path(folder)
    lock = FileLock(folder / LOCK_NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"Another process is writing to {str(folder)!r}. Wait for it, or give another folder."
        ) from error
    try:
        yield
    finally:
        (folder / LOCK_NAME).unlink(missing_ok=True)
        lock.release()


def _remove_leftovers(folder):
    """Remove what a killed process left behind; the lock is held, so that nobody is writing."""
    for path in folder.glob(f"{INCOMPLETE_PREFIX}*"):
        shutil.rmtree(path)


def _replace_entries(output_dir, temporary, before):
    """Move old entries away and new ones in; `config.json` goes first and comes last. Undo all of it on failure."""
    previous = Path(tempfile.mkdtemp(prefix=PREVIOUS_PREFIX, dir=output_dir))
    moved = []
    try:
        for name in sorted(before, key=lambda name: name != "config.json"):
            _move(output_dir / name, previous / name, moved)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            _move(path, output_dir / path.name, moved)
    except BaseException:
        for source, target in reversed(moved):
            os.replace(target, source)
        previous.rmdir()
        raise
    shutil.rmtree(previous)


def _move(source, target, moved):
    os.replace(source, target)
    moved.append((source, target))


def write_file(path: str | Path, write: Callable[[Path], Any] | str) -> None:
    """Write a file under a temporary name and rename it, so that readers never see half of it.

    Args:
        path (`str` or `Path`): File to write.
        write (`Callable` or `str`): Writes the path that it is given, or the text of the file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(write, encoding="utf-8") if isinstance(write, str) else write(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


__all__ = [
    "check_complete_model",
    "check_hub_name",
    "check_no_adapter",
    "check_no_overlap",
    "check_shapes",
    "find_checkpoint_folder",
    "find_source_folders",
    "foreign_files",
    "has_vision",
    "load_checkpoint",
    "load_processing_class",
    "lock_folder",
    "matches_any",
    "move_to_device",
    "read_config",
    "write_file",
    "write_folder",
]
