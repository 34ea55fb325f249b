# SPDX-License-Identifier: Apache-2.0
"""A model as one complete repository of the Hub: built, checked where only transformers is installed, uploaded."""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from .. import modeling_encdec_slm
from ..checkpoint_folders import TOKENIZER_FILES, first_line, folder_written_whole, listed
from ..export.bundles import MANIFEST, read_manifest
from . import fresh_process
from .eval_results import EvaluationResult, read_results, write_eval_results
from .published_cards import (
    RUN_FILE,
    ModelFacts,
    RunFacts,
    check_facts,
    is_repository_name,
    published_card,
    run_facts,
)
from .repository_checks import refuse_unsafe_files, without_local_paths
from .uploading import upload


logger = logging.getLogger(__name__)

# Where the code files lie that go into a repository.
PACKAGE = Path(modeling_encdec_slm.__file__).parent
FAMILY = ("encdec_slm", "encdec_vlm")
PROCESSING_FILES = (*TOKENIZER_FILES, "additional_chat_templates", "processor_config.json", "preprocessor_config.json")
PROCESSOR_CODE = ("image_processing_encdec_vlm.py", "processing_encdec_vlm.py")
BUNDLES = {"ctranslate2": ("ctranslate2",), "onnx": ("onnx", "onnx-static")}
# That of weights of others, where one lies beside them.
WEIGHTS_LICENCE = "LICENSE-weights"
WRITTEN_ANEW = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("README.md", "LICENSE", WEIGHTS_LICENCE),
)
# What a run of this package writes beside its model; none of it is part of a repository.
RUN_FILES = (RUN_FILE, "predictions.jsonl", "evaluation.json", "loss.png", "contact_sheet.png")
TRAINING_ARGUMENTS = "training_args.bin"
MARK = re.compile(r"\n<!-- Written by encdec_slm\.hub_cards\.publish; sha256 of the folder: ([0-9a-f]{64}) -->\n")


@dataclass(frozen=True)
class PublishedRepository:
    """What [`publish`] made; `os.fspath` and `Path` take it as the path of its folder.

    Args:
        folder (`Path`): The whole repository on this machine.
        left_out (`tuple[str, ...]`): Names in the source that are no part of a repository and stayed behind.
        repo_id (`str`, *optional*): `None` where nothing was uploaded, as are the next three.
        commit (`str`, *optional*): Hash of the commit that has the folder; pin `revision=` to it.
        commit_url (`str`, *optional*): Its page.
        pull_request_url (`str`, *optional*): Of a pull request that was opened.
        is_new_commit (`bool`): `False` where nothing was uploaded, or the repository had all of it already.
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
    """A self-contained repository folder in `output_dir`, and, only when asked, one commit with it on the Hub.

    The folder has weights as safetensors, config, generation config, tokenizer or processor, every code file, a card,
    a licence, `.eval_results` and exports. Before `output_dir` is written, it is loaded, asked to generate and run in
    its pipeline by a process without this package and without network.

    Names in a source folder that look like secrets, states of a training or pickles are refused, as are files with
    secrets or paths of this machine. What is known to be no part of a repository is left where it is: folders such as
    `checkpoint-500/` and `runs/`, and what a run of this package writes beside its model (with `results.json`,
    also `training_args.bin`). All of that is named in `left_out`.

    Args:
        model_or_dir ([`~transformers.PreTrainedModel`], `str` or `Path`): A model of this family, a folder that
            `save_pretrained` wrote, or that of a training run or of one of its checkpoints. Code files are those of
            this package, whatever lies in the folder.
        repo_id (`str`, *optional*): Such as `"me/my-model"`; needed to upload. The card's snippets load it. `None`
            lets them load the folder.
        output_dir (`str` or `Path`): Where the folder is to lie: new, empty, or as an earlier `publish` left it.
        results (`dict`, `str`, `Path` or a list of these, *optional*): Of
            [`~encdec_slm.trainers.evaluation.evaluate_checkpoint`], or the paths of its `evaluation.json`. Paths of
            this machine in their commands are shortened to the last name.
        push (`bool`, *optional*, defaults to `False`): Upload the folder in one commit. Where the repository has all
            of it already, none is made. Call again after an interruption: what has arrived is not sent again.
        private (`bool`, *optional*, defaults to `True`): Whether a repository that is created is private.
        revision (`str`, *optional*): A branch to upload to. `None` is the main one.
        create_pr (`bool`, *optional*, defaults to `False`): Upload as a pull request to the main branch.
        processing_class (tokenizer or processor, *optional*): `None` takes the one that lies beside the weights; for a
            model in memory, in the folder that it was loaded from.
        bundles (`Sequence[str | Path]`, *optional*): Folders of `export_ctranslate2` and `export_onnx`, to lie in
            `ctranslate2/` and `onnx/`. Where the source has such folders, they are taken too.
        facts (`dict`, *optional*): What no file records, for the card, before what files tell: `description`,
            `training_data`, `teacher`, `objective`, `hardware`, `energy`, `limits`, `example` (a source for the
            snippets), `license`, `name`, `language` (`"en"` where nobody says otherwise), `datasets`, `base_model`,
            `tags`.
        leave_out (`Sequence[str]`, *optional*): Patterns of names in the source folder that are not looked at.

    Returns:
        [`PublishedRepository`]: The folder, what was left out, and the commit.

    Raises:
        ValueError: Arguments do not fit together, something must not be published, `output_dir` has something else or
            was changed, or the folder does not work without this package; nothing has been written or uploaded then.
        TypeError: `model_or_dir` is neither a model nor a path.
        ConnectionError: The folder was written, but could not be uploaded.
    """
    output_dir = Path(output_dir)
    _check_upload(repo_id, push, revision, create_pr)
    facts, results = check_facts(facts), read_results(results)
    source = _source(model_or_dir, output_dir)
    is_replaced = _is_as_published(output_dir)
    left_out = _refuse_or_leave_out(source, leave_out)
    run = run_facts(source)
    with _repository_written(output_dir, is_replaced) as folder:
        model = _model_facts(model_or_dir, source, folder, processing_class)
        manifests = _copy_bundles(source, bundles, folder)
        _write_texts(folder, source, repo_id or output_dir.name, model, run, results, facts, manifests, revision)
        refuse_unsafe_files(folder, sorted(folder.rglob("*")), is_repository=True)
        logger.info("Loading and using the folder in a process without this package ...")
        fresh_process.check_in_fresh_process(folder)
    if left_out:
        logger.info(f"Left out, being no part of a repository: {listed(left_out)}.")
    published = PublishedRepository(output_dir, tuple(left_out))
    if not push:
        return published
    message = f"Publish {facts.get('name') or repo_id.rpartition('/')[2]}"
    done = upload(output_dir, repo_id, private=private, revision=revision, create_pr=create_pr, message=message)
    return PublishedRepository(
        output_dir, tuple(left_out), repo_id, done.commit, done.commit_url, done.pull_request_url, done.is_new
    )


# What is given


def _check_upload(repo_id, push, revision, create_pr):
    if repo_id is not None and not ("/" in repo_id and is_repository_name(repo_id)):
        raise ValueError(
            f"`repo_id` is {repo_id!r}, which is no whole name of a repository. Give one as in 'me/my-model': "
            "letters, digits, dots, dashes and underscores on both sides of the slash."
        )
    if push and repo_id is None:
        raise ValueError("`push` is true and `repo_id` is not given. Name the repository, as in 'me/my-model'.")
    if create_pr and not push:
        raise ValueError("`create_pr` is true and `push` is not, but only an upload opens a pull request. Set `push`.")
    if create_pr and revision is not None:
        raise ValueError(
            f"`create_pr` is true and `revision` is {revision!r}, but a pull request goes to the main branch. Leave "
            "one of them out."
        )


def _source(model_or_dir, output_dir):
    """The folder that the model lies in; `None` for a model in memory."""
    if isinstance(model_or_dir, (str, Path)):
        folder = Path(model_or_dir)
        if not folder.is_dir():
            what = "a file" if folder.exists() else "no folder here"
            raise ValueError(
                f"`model_or_dir` is {str(model_or_dir)!r}, which is {what}. Give a model, or a folder that "
                "`save_pretrained` wrote."
            )
        source, target = folder.resolve(), output_dir.resolve()
        if source == target or source in target.parents or target in source.parents:
            raise ValueError(
                f"`output_dir` {str(output_dir)!r} and `model_or_dir` {str(model_or_dir)!r} lie in each other, but "
                "the source has to stay as it is. Give an `output_dir` beside it."
            )
        return folder
    _check_model(model_or_dir)
    return None


def _check_model(model):
    kind = type(model).__name__
    # Both a PeftModel and a model with adapters of `add_adapter` have this.
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"`model_or_dir` is a {kind} with adapters, but a repository has whole weights. Merge them first: "
            "`model = model.merge_and_unload()` (of a PeftModel), and publish that."
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"`model_or_dir` is a {kind}, but must be a model of this family, or the path of a folder.")
    _check_family(model.config.model_type, kind)
    if not model.can_generate():
        raise ValueError(
            f"`model_or_dir` is a {kind}, which has no output head. Give the `...ForConditionalGeneration` of it."
        )
    if any(value.is_meta for value in model.parameters()):
        raise ValueError("`model_or_dir` has weights without data (on the meta device). Load it onto the CPU.")


def _check_family(model_type, name):
    if model_type not in FAMILY:
        raise ValueError(
            f"{name} is of `model_type` {model_type!r}, but this publishes {' and '.join(FAMILY)}. Other models have "
            "`push_to_hub`."
        )


def _refuse_or_leave_out(source, leave_out):
    """Names in the source that stay behind, after a look at everything else."""
    if source is None:
        return []
    if (source / "adapter_config.json").is_file():
        raise ValueError(
            f"{str(source)!r} holds adapters (`adapter_config.json`), but a repository has whole weights. Merge them "
            "first: `model = AutoPeftModelForSeq2SeqLM.from_pretrained(folder).merge_and_unload()`, and publish that."
        )
    known = (*RUN_FILES, TRAINING_ARGUMENTS) if (source / RUN_FILE).is_file() else RUN_FILES
    paths = sorted(source.iterdir())
    skipped = [path for path in paths if any(fnmatch(path.name, pattern) for pattern in (*known, *leave_out))]
    looked_at = [path for path in paths if path not in skipped]
    in_bundles = [path for name in BUNDLES for path in _files_of_bundle(source / name)]
    refuse_unsafe_files(source, [*looked_at, *in_bundles])
    return [f"{path.name}/" if path.is_dir() else path.name for path in paths if not _is_taken(path)]


def _is_taken(path):
    """Whether something of the source, as it is or written anew, is part of the repository."""
    if path.is_dir():
        return path.name in (*BUNDLES, "additional_chat_templates")
    taken = (*WRITTEN_ANEW, *PROCESSING_FILES)
    return any(fnmatch(path.name, name) for name in taken) or _is_code_file(path.name)


def _is_code_file(name):
    return name.endswith(("_encdec_slm.py", "_encdec_vlm.py")) and (PACKAGE / name).is_file()


# What is written


@contextlib.contextmanager
def _repository_written(output_dir, is_replaced) -> Iterator[Path]:
    """A temporary folder that becomes `output_dir`, in the place of an earlier one if that is replaced."""
    with folder_written_whole(output_dir, overwrite=is_replaced) as folder:
        yield folder
        for path in output_dir.iterdir() if is_replaced else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_as_published(output_dir):
    """Whether a folder is just what an earlier call wrote, so that nothing of anybody's is lost with it.

    Raises:
        ValueError: Something else lies there, or what an earlier call wrote and somebody has changed since.
    """
    try:
        mark = MARK.search((output_dir / "README.md").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        mark = None
    if mark is None and output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} is not empty, and not what `publish` wrote. Give a new folder, or "
            "remove this one."
        )
    if mark is not None and mark[1] != _digest(output_dir):
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} was published before and changed since, and the changes would be lost. "
            "Give another folder, or remove this one."
        )
    return mark is not None


def _digest(folder):
    """A digest of all names and contents in a folder; the mark in the card is not part of it."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        content = hashlib.sha256()
        if name == "README.md":
            content.update(MARK.sub("", path.read_text(encoding="utf-8")).encode())
        else:
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    content.update(block)
        digest.update(f"{name}\0{content.hexdigest()}\n".encode())
    return digest.hexdigest()


def _model_facts(model_or_dir, source, folder, processing_class):
    """Writes weights, configs, code, tokenizer or processor, and says how large the model is."""
    model = model_or_dir if source is None else _loaded(source)
    model.save_pretrained(folder)
    sees = model.config.model_type == "encdec_vlm"
    _write_processing(folder, processing_class, source or _loaded_from(model), sees)
    for path in folder.glob("*.py"):
        # A model that was loaded from a folder may have brought other code than that which is tested here.
        if _is_code_file(path.name):
            shutil.copyfile(PACKAGE / path.name, path)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return ModelFacts(model.config, model.num_parameters(), num_bytes, dtype)


def _loaded_from(model):
    folder = model.config._name_or_path
    return Path(folder) if folder and Path(folder).is_dir() else None


def _loaded(source):
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(source)!r} has no config.json that can be read ({type(error).__name__}). Give a folder that "
            "`save_pretrained` wrote."
        ) from error
    _check_family(config.get("model_type") if isinstance(config, dict) else None, repr(str(source)))
    if not any(source.glob("*.safetensors")):
        raise ValueError(
            f"{str(source)!r} has no weights as safetensors. Save the model there by `save_pretrained`, and publish "
            "again."
        )
    auto_class = AutoModelForImageTextToText if config["model_type"] == "encdec_vlm" else AutoModelForSeq2SeqLM
    # Classes of this package; no code of the folder is run.
    options = {"trust_remote_code": False, "dtype": "auto", "output_loading_info": True}
    try:
        model, info = auto_class.from_pretrained(source, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{str(source)!r} cannot be loaded ({first_line(error)}). Save the model there once more."
        ) from error
    if info["missing_keys"]:
        raise ValueError(
            f"{str(source)!r} has no weights for {listed(sorted(info['missing_keys']))}, which would be random. Give "
            "a folder that holds a whole `...ForConditionalGeneration`."
        )
    return model


def _write_processing(folder, processing_class, source, sees):
    needed, argument = ("processor", "AutoProcessor") if sees else ("tokenizer", "AutoTokenizer")
    if processing_class is None:
        _copy_processing(source, folder)
        if not any(folder.glob("*processor_config.json" if sees else "tokenizer*")):
            where = f"{str(source)!r} has none" if source is not None else "the model was not loaded from a folder"
            raise ValueError(
                f"A repository needs a {needed}, and {where}. Save it beside the weights, or give it as "
                f"`processing_class={argument}.from_pretrained(...)`."
            )
    elif sees != isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"`processing_class` is a {type(processing_class).__name__}, but this model needs a {needed}. Give that "
            "of the model."
        )
    else:
        processing_class.save_pretrained(folder)
    for name in PROCESSOR_CODE if sees else ():
        shutil.copyfile(PACKAGE / name, folder / name)


def _copy_processing(source, folder):
    """Copied, not saved anew, because a tokenizer that is rebuilt may give other ids."""
    for pattern in PROCESSING_FILES:
        for path in sorted(source.glob(pattern)) if source is not None else ():
            refuse_unsafe_files(source, [path])
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
            elif path.suffix != ".py":
                shutil.copyfile(path, folder / path.name)


def _copy_bundles(source, bundles, folder):
    """Manifests of the exports that were copied into the repository, by the names of their folders."""
    given = [Path(bundle) for bundle in ([bundles] if isinstance(bundles, (str, Path)) else bundles)]
    found = [source / name for name in BUNDLES if source is not None and (source / name).is_dir()]
    manifests = {}
    for path in (*found, *given):
        manifest = read_manifest(path, *(form for forms in BUNDLES.values() for form in forms))
        name = next(name for name, forms in BUNDLES.items() if manifest["format"] in forms)
        if name in manifests:
            raise ValueError(
                f"There are two exports for `{name}/`, and {str(path)!r} is the second. Give one of them only."
            )
        refuse_unsafe_files(path, _files_of_bundle(path))
        shutil.copytree(path, folder / name)
        text = json.dumps(_without_origin(manifest), indent=2) + "\n"
        (folder / name / MANIFEST).write_text(text, encoding="utf-8")
        manifests[name] = manifest
    return manifests


def _files_of_bundle(path):
    """Without the manifest, which tells where the exported model lay, and is written anew."""
    return sorted(file for file in path.rglob("*") if file.name != MANIFEST)


def _without_origin(content):
    if not isinstance(content, dict):
        return content
    return {
        key: without_local_paths(value) if key == "_name_or_path" and value else _without_origin(value)
        for key, value in content.items()
    }


def _write_texts(
    folder, source, repo_name, model, run: RunFacts, results: list[EvaluationResult], facts, manifests, revision
):
    (folder / "LICENSE").write_text(_licence(), encoding="utf-8")
    of_weights = _licence_of_weights(source)
    if of_weights is not None:
        (folder / WEIGHTS_LICENCE).write_text(of_weights, encoding="utf-8")
    write_eval_results(results, folder)
    name = facts.get("name") or repo_name.rpartition("/")[2]
    card = published_card(repo_name, name, model, run, results, facts, manifests, revision, of_weights is not None)
    card.save(folder / "README.md")
    text = (folder / "README.md").read_text(encoding="utf-8").rstrip("\n") + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    mark = f"\n<!-- Written by encdec_slm.hub_cards.publish; sha256 of the folder: {_digest(folder)} -->\n"
    (folder / "README.md").write_text(text + mark, encoding="utf-8")


def _licence_of_weights(source):
    """The text of a licence beside the weights, if it is another than that of the code."""
    for path in (source / WEIGHTS_LICENCE, source / "LICENSE") if source is not None else ():
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
        if text not in (None, _licence()):
            return text
    return None


def _licence():
    """The text of Apache-2.0: beside the sources, or among the metadata of the installed package."""
    paths = [Path(__file__).resolve().parent.parent / "LICENSE"]
    with contextlib.suppress(PackageNotFoundError):
        paths += [Path(file.locate()) for file in files("encdec-slm") or () if file.name == "LICENSE"]
    for path in paths:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise FileNotFoundError("The text of the licence is missing from the installed package. Install encdec-slm again.")
