# SPDX-License-Identifier: Apache-2.0
"""Publish a model: build a complete repository folder, check it without this package, and upload it."""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.dynamic_module_utils import get_relative_import_files

from .. import modeling_encdec_slm
from ..checkpoints import (
    TOKENIZER_FILES,
    check_complete_model,
    check_no_overlap,
    has_vision,
    load_checkpoint,
    load_processing_class,
    matches_any,
    write_folder,
)
from ..errors import format_list
from ..export_manifest import FORMAT_FOLDERS, MANIFEST, check_bundle_matches, check_tokenizer, read_manifest
from ..run_results import RunResults
from . import fresh_process
from .eval_results import EVAL_RESULTS_FOLDER, load_evaluations, write_eval_results
from .model_cards import (
    RESULTS_PLOT,
    CardContent,
    build_card,
    check_facts,
    is_repository_name,
    read_card_metadata,
    save_card,
)
from .repository_checks import refuse_unsafe_files, remove_local_paths
from .uploading import upload


logger = logging.getLogger(__name__)

PACKAGE = Path(modeling_encdec_slm.__file__).parent
TEXT_CODE = ("configuration_encdec_slm.py", "modeling_encdec_slm.py", "pipeline_encdec_slm.py")
VISION_CODE = (
    *("configuration_encdec_vlm.py", "modeling_encdec_vlm.py", "pipeline_encdec_slm.py"),
    *("image_processing_encdec_vlm.py", "processing_encdec_vlm.py"),
)
# `shell_calibration.json` is read by `encdec-slm shell`, and the card shows the plot.
PROCESSING_FILES = (
    *(*TOKENIZER_FILES, "processor_config.json", "preprocessor_config.json"),
    *("shell_calibration.json", RESULTS_PLOT),
)
BUNDLES = tuple(dict.fromkeys(FORMAT_FOLDERS.values()))
# License of the weights, if it differs from that of the code.
WEIGHTS_LICENSE = "LICENSE-weights"
REWRITTEN_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.py"),
    *("README.md", "LICENSE", WEIGHTS_LICENSE),
)
RESULTS_FILE = "results.json"
# Files that a run of this package writes beside its model.
RUN_FILES = (
    RESULTS_FILE,
    "predictions.jsonl",
    "evaluation.json",
    "evaluation_run.json",
    "loss.png",
    "contact_sheet.png",
)
TRAINING_ARGUMENTS = "training_args.bin"
# Begin of the names that `write_folder` uses while it writes.
WRITE_PREFIX = ".encdec_slm"
MARK = re.compile(r"\n<!-- Written by encdec_slm\.hub_cards\.publish; sha256 of the folder: ([0-9a-f]{64}) -->\n")


@dataclass(frozen=True)
class PublishedRepository:
    """Result of [`publish`]; a path-like object for its folder.

    Args:
        folder (`Path`): The complete repository on this machine.
        left_out (`tuple[str, ...]`): Names in the source that do not belong into a repository and were not copied.
        repo_id (`str`, *optional*): `None` if nothing was uploaded; likewise the next three.
        commit (`str`, *optional*): Hash of the commit that holds the folder, to pin `revision=` to.
        commit_url (`str`, *optional*): Page of the commit.
        pull_request_url (`str`, *optional*): Page of the pull request that was opened.
        is_new_commit (`bool`): `False` if nothing was uploaded, or the repository already had this content.
    """

    folder: Path
    left_out: tuple[str, ...] = ()
    repo_id: str | None = None
    commit: str | None = None
    commit_url: str | None = None
    pull_request_url: str | None = None
    is_new_commit: bool = False

    def __fspath__(self) -> str:
        return os.fspath(self.folder)


def publish(
    model_or_dir: PreTrainedModel | str | Path,
    repo_id: str | None = None,
    *,
    output_dir: str | Path,
    results: Any = None,
    push: bool = False,
    private: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    bundles: Sequence[str | Path] = (),
    facts: dict[str, Any] | None = None,
    leave_out: Sequence[str] = (),
) -> PublishedRepository:
    """Build a complete repository in `output_dir` and, with `push`, upload it to the Hub in one commit.

    The folder holds safetensors weights, config, generation config, tokenizer or processor, all code files, a model
    card, a license, `.eval_results` and exports. Before `output_dir` is written, a process without this package and
    without network loads the folder, generates, and runs the pipeline.

    Files that look like secrets, training states or pickles, and files that contain secrets or paths of this machine
    are refused. Other files that do not belong into a repository are left out and listed in `left_out`: folders such
    as `checkpoint-500/` and `runs/`, and what a run of this package writes beside its model (also `training_args.bin`
    if there is a `results.json`).

    Args:
        model_or_dir ([`~transformers.PreTrainedModel`], `str` or `Path`): A model of this family, a folder that
            `save_pretrained` wrote, or the folder of a training run or one of its checkpoints. Its code files are
            replaced by those of this package.
        repo_id (`str`, *optional*): Such as `"user/model"`, required to upload. The snippets of the card load it, or
            the folder if it is `None`.
        output_dir (`str` or `Path`): A new or empty folder, or the unchanged output of an earlier `publish`, which is
            replaced.
        results ([`~encdec_slm.run_results.RunResults`], `str`, `Path`, `dict` or a list of these, *optional*):
            Evaluations, or the paths of `evaluation.json` files. Paths of this machine in their commands are
            shortened to the last name.
        push (`bool`, *optional*, defaults to `False`): Upload the folder. No commit is made if the repository already
            has this content. Call again after an interruption: what has arrived is not sent again.
        private (`bool`, *optional*, defaults to `True`): Whether a repository that is created is private.
        revision (`str`, *optional*): Branch to upload to, defaults to the main branch.
        create_pr (`bool`, *optional*, defaults to `False`): Upload as a pull request to the main branch.
        processing_class (tokenizer or processor, *optional*): `None` takes the one beside the weights; for a model in
            memory, the one in the folder that it was loaded from.
        bundles (`Sequence[str | Path]`, *optional*): Folders of exports, one of each format, copied to a folder of
            the format's name. Folders of these names in the source are copied too.
        facts (`dict`, *optional*): Facts for the card that no file records. They take precedence over recorded ones:
            `description`, `training_data`, `starting_point`, `teacher`, `objective`, `optimizer_steps`,
            `training_time`, `hardware`, `energy`, `limits`, `example` (a source for the snippets), `license`, `name`,
            `language` (defaults to `"en"`), `datasets`, `base_model`, `tags`.
        leave_out (`Sequence[str]`, *optional*): Patterns of names in the source folder that are ignored.

    Returns:
        [`PublishedRepository`]: The folder, the names that were left out, and the commit.

    Raises:
        ValueError: Arguments do not fit together, a file must not be published, `output_dir` holds other or changed
            files, or the folder does not work without this package. Nothing is written or uploaded.
        TypeError: `model_or_dir` is neither a model nor a path.
        ConnectionError: The folder was written, but could not be uploaded.
    """
    output_dir, resolved = Path(output_dir), Path(output_dir).resolve()
    _check_upload(repo_id, push, revision, create_pr)
    facts, evaluations = check_facts(facts), load_evaluations(results)
    bundles = [Path(bundle) for bundle in ([bundles] if isinstance(bundles, (str, Path)) else bundles)]
    source = Path(model_or_dir) if isinstance(model_or_dir, (str, Path)) else None
    sources = [*bundles, *([source] if source else [])]
    check_no_overlap(output_dir, sources)
    left_out = _check_source_files(source, leave_out) if source else []
    model = _load_model(model_or_dir, source)
    with write_folder(output_dir, overwrite=True, find_foreign_files=find_changed_files, sources=sources) as folder:
        _write_checkpoint(folder, model, source, processing_class)
        manifests = _copy_bundles(source, bundles, folder, model)
        content = CardContent(
            folder,
            repo_id or resolved.name,
            training=_load_training_results(source),
            evaluations=evaluations,
            metadata=read_card_metadata(source) if source else {},
            facts=facts,
            bundles=manifests,
            revision=revision,
            is_published=True,
            has_weights_license=_write_licenses(source, folder),
        )
        write_eval_results(evaluations, folder)
        _write_marked_card(content)
        refuse_unsafe_files(folder, sorted(folder.rglob("*")), is_repository=True)
        logger.info("Loading and using the folder in a process without this package ...")
        fresh_process.check_in_fresh_process(folder)
    if left_out:
        logger.info(f"Left out: {format_list(left_out)}.")
    if not push:
        return PublishedRepository(output_dir, tuple(left_out))
    message = f"Publish {facts.get('name') or repo_id.rpartition('/')[2]}"
    done = upload(resolved, repo_id, private=private, revision=revision, create_pr=create_pr, message=message)
    return PublishedRepository(
        output_dir, tuple(left_out), repo_id, done.commit, done.commit_url, done.pull_request_url, done.is_new
    )


# Check


def _check_upload(repo_id, push, revision, create_pr):
    if repo_id is not None and not ("/" in repo_id and is_repository_name(repo_id)):
        raise ValueError(
            f"`repo_id` is {repo_id!r}, but must be the full name of a repository such as 'user/model': letters, "
            "digits, dots, dashes and underscores on both sides of the slash."
        )
    if push and repo_id is None:
        raise ValueError("`push` is true, but `repo_id` is not set. Name the repository, such as 'user/model'.")
    if create_pr and not push:
        raise ValueError("`create_pr` is true, but `push` is not. Set `push` to upload the pull request.")
    if create_pr and revision is not None:
        raise ValueError(
            f"`create_pr` is true and `revision` is {revision!r}, but a pull request goes to the main branch. Leave "
            "one of them out."
        )


def _check_source_files(source, leave_out):
    """Refuse unsafe files; return the names that are not copied."""
    if not source.is_dir():
        kind = "a file" if source.exists() else "not a folder of this machine"
        raise ValueError(f"`model_or_dir` is {str(source)!r}, which is {kind}. Give a model or a checkpoint folder.")
    ignored = [*RUN_FILES, *([TRAINING_ARGUMENTS] if (source / RESULTS_FILE).is_file() else []), *leave_out]
    paths = sorted(source.iterdir())
    in_bundles = [path for name in BUNDLES for path in _bundle_files(source / name)]
    refuse_unsafe_files(source, [*(path for path in paths if not matches_any(path.name, ignored)), *in_bundles])
    return [f"{path.name}/" if path.is_dir() else path.name for path in paths if not _is_published(path)]


def _is_published(path):
    """Return whether a path of the source is part of the repository, copied or rewritten."""
    if path.is_dir():
        return path.name in (*BUNDLES, EVAL_RESULTS_FOLDER, "additional_chat_templates")
    if path.suffix == ".py":
        return path.name in (*TEXT_CODE, *VISION_CODE) or (PACKAGE / path.name).is_file()
    return matches_any(path.name, (*REWRITTEN_FILES, *PROCESSING_FILES))


def _load_model(model_or_dir, source):
    model = model_or_dir
    if source is not None:
        model, _ = load_checkpoint(source, adapter="refuse", family_only=True)
    check_complete_model(model, "model_or_dir")
    return model


def find_changed_files(folder: Path) -> list[str]:
    """Return the files of a folder if it is not exactly what [`publish`] wrote; else nothing."""
    try:
        mark = MARK.search((folder / "README.md").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        mark = None
    if mark is not None and mark[1] == _compute_digest(folder):
        return []
    names = sorted(path.name for path in folder.iterdir())
    return names if mark is None else ["changes made after it was published"]


def _compute_digest(folder):
    """Hash all names and contents in a folder, except the mark in the card and the files of a write in progress."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(WRITE_PREFIX) or (path.is_dir() and not path.is_symlink() and any(path.iterdir())):
            continue
        digest.update(f"{name}\0{_hash_content(path)}\n".encode())
    return digest.hexdigest()


def _hash_content(path):
    if path.is_symlink() or path.is_dir():
        return "a link" if path.is_symlink() else "an empty folder"
    if path.name == "README.md":
        return hashlib.sha256(MARK.sub("", path.read_text(encoding="utf-8")).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Write


def _write_checkpoint(folder, model, source, processing_class):
    """Write weights, configs, tokenizer or processor, and code."""
    model.save_pretrained(folder)
    _write_processing(folder, model, source, processing_class)
    for path in folder.glob("*.py"):
        path.unlink()
    entries = [PACKAGE / name for name in (VISION_CODE if has_vision(model) else TEXT_CODE)]
    for path in {path for entry in entries for path in (entry, *map(Path, get_relative_import_files(entry)))}:
        shutil.copyfile(path, folder / path.name)


def _write_processing(folder, model, source, processing_class):
    kind, auto_class = ("processor", "AutoProcessor") if has_vision(model) else ("tokenizer", "AutoTokenizer")
    if processing_class is None:
        source = source or Path(model.config._name_or_path or "no folder")
        _copy_processing(source, folder)
        if not any(folder.glob("*processor_config.json" if has_vision(model) else "tokenizer*")):
            raise ValueError(
                f"A repository needs a {kind}, but {str(source)!r} has none. Save it beside the weights, or set "
                f"`processing_class={auto_class}.from_pretrained(...)`."
            )
    elif has_vision(model) != isinstance(processing_class, ProcessorMixin):
        raise ValueError(f"`processing_class` is a {type(processing_class).__name__}, but the model needs a {kind}.")
    else:
        processing_class.save_pretrained(folder)


def _copy_processing(source, folder):
    """Copy instead of saving again, because a tokenizer that is rebuilt can give other ids."""
    for path in sorted(path for pattern in PROCESSING_FILES for path in source.glob(pattern)):
        refuse_unsafe_files(source, [path])
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        elif path.suffix != ".py":
            shutil.copyfile(path, folder / path.name)


def _copy_bundles(source, bundles, folder, model):
    """Copy exports of the model into the repository; returns their manifests by folder name."""
    found = [source / name for name in BUNDLES if source is not None and (source / name).is_dir()]
    tokenizer = load_processing_class(folder, model)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    manifests = {}
    for path in (*found, *bundles):
        manifest = read_manifest(path, *FORMAT_FOLDERS)
        name = FORMAT_FOLDERS[manifest["format"]]
        if name in manifests:
            raise ValueError(f"{str(path)!r} is a second export for `{name}/`. Give only one of them.")
        try:
            check_bundle_matches(manifest, model)
            check_tokenizer(manifest, tokenizer)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} cannot be published with this model. {error}") from error
        refuse_unsafe_files(path, _bundle_files(path))
        shutil.copytree(path, folder / name)
        text = json.dumps(_remove_origin(manifest), indent=2) + "\n"
        (folder / name / MANIFEST).write_text(text, encoding="utf-8")
        manifests[name] = manifest
    return manifests


def _bundle_files(path):
    """Return the files of an export without its manifest, which contains the path of the model and is rewritten."""
    return sorted(file for file in path.rglob("*") if file.name != MANIFEST)


def _remove_origin(content):
    if not isinstance(content, dict):
        return content
    return {
        key: remove_local_paths(value) if key == "_name_or_path" and value else _remove_origin(value)
        for key, value in content.items()
    }


def _load_training_results(source):
    if source is None or not (source / RESULTS_FILE).is_file():
        return None
    try:
        return RunResults.load(source / RESULTS_FILE)
    except ValueError as error:
        logger.warning(f"The card says nothing about the training: {error}")
        return None


def _write_marked_card(content):
    """Write the card, with a mark at its end by which a later call recognizes the unchanged folder."""
    folder = content.folder
    save_card(build_card(content), folder)
    with (folder / "README.md").open("a", encoding="utf-8") as file:
        file.write(
            f"\n<!-- Written by encdec_slm.hub_cards.publish; sha256 of the folder: {_compute_digest(folder)} -->\n"
        )


def _write_licenses(source, folder):
    """Write the license of the code, and that of the weights if it differs; returns whether it does."""
    (folder / "LICENSE").write_text(_read_license(), encoding="utf-8")
    for path in (source / WEIGHTS_LICENSE, source / "LICENSE") if source is not None else ():
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
        if text not in (None, _read_license()):
            (folder / WEIGHTS_LICENSE).write_text(text, encoding="utf-8")
            return True
    return False


def _read_license():
    """Return the text of Apache-2.0, from beside the sources or from the metadata of the installed package."""
    paths = [Path(__file__).resolve().parent.parent / "LICENSE"]
    with contextlib.suppress(PackageNotFoundError):
        paths += [Path(file.locate()) for file in files("encdec-slm") or () if file.name == "LICENSE"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError("The installed package has no LICENSE file. Install encdec-slm again.")
    return path.read_text(encoding="utf-8")
