# SPDX-License-Identifier: Apache-2.0
"""Folders of training runs: what a run may overwrite, and which checkpoint it continues from."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints import ADAPTER_FILE, CHECKPOINT_FILES, check_no_overlap, matches_any
from ..errors import format_list
from ..run_results import RunResults


logger = logging.getLogger(__name__)

STATE_NAME = "trainer_state.json"
RESULTS_NAME = "results.json"
# Everything that a run writes into its output folder.
RUN_FILES = (
    *(*CHECKPOINT_FILES, f"{PREFIX_CHECKPOINT_DIR}-*", ADAPTER_FILE, "training_args.bin"),
    *(RESULTS_NAME, "predictions.jsonl", "loss.png", "contact_sheet.png"),
)


def prepare_output_dir(
    training_args: TrainingArguments,
    kind: str,
    sources: Sequence[str | Path | None] = (),
    data_files: Sequence[str | Path] = (),
) -> str | None:
    """Check the output folder of a run before anything is loaded or written.

    Args:
        training_args ([`~transformers.TrainingArguments`]): `output_dir` and `resume_from_checkpoint` are read.
        kind (`str`): As in [`check_output_dir`], and so are `sources` and `data_files`.

    Returns:
        `str`: The checkpoint to continue from; `None` to train from the start.

    Raises:
        ValueError: As in [`check_output_dir`], or there is no checkpoint to continue from.
    """
    checkpoint = find_checkpoint(training_args.output_dir, training_args.resume_from_checkpoint)
    check_output_dir(training_args.output_dir, kind, checkpoint, sources, data_files)
    return checkpoint


def check_output_dir(
    folder: str | Path,
    kind: str,
    checkpoint: str | None = None,
    sources: Sequence[str | Path | None] = (),
    data_files: Sequence[str | Path] = (),
) -> None:
    """Check that a run may write into a folder.

    The folder may be new, or hold other files than a run writes, or a finished run of the same kind, which is
    replaced. An unfinished run is only continued.

    Args:
        folder (`str` or `Path`): Output folder of the run.
        kind (`str`): Kind of the run, as in [`~encdec_slm.run_results.RunResults`].
        checkpoint (`str`, *optional*): Checkpoint that the run continues from.
        sources (`Sequence[str]`, *optional*): Folders that the run reads; names on the Hub and `None` are skipped.
        data_files (`Sequence[str]`, *optional*): Files that the run reads.

    Raises:
        ValueError: The folder overlaps a source, holds files of something else or an unfinished run, or a data file
            would be overwritten.
    """
    folder = Path(folder)
    check_no_overlap(folder, [source for source in sources if source is not None])
    for file in map(Path, data_files):
        if file.resolve().parent == folder.resolve() and matches_any(file.name, RUN_FILES):
            raise ValueError(
                f"The run reads {str(file)!r} and would overwrite it. Set `output_dir` to another folder than "
                f"{str(folder)!r}."
            )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` is {str(folder)!r}, which is a file. Give the path of a folder.")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = [name for name in names if matches_any(name, RUN_FILES)]
    earlier = load_results(folder)
    is_continued = contains_checkpoint(folder, checkpoint)
    is_known = earlier.kind == kind if earlier is not None else is_continued
    if not is_continued and (is_known or earlier is None) and has_unfinished_run(folder):
        raise ValueError(
            f"{str(folder)!r} has checkpoints of an unfinished run. Set `resume_from_checkpoint` to true to continue "
            "it, or `output_dir` to another folder."
        )
    if found and not is_known:
        owner = "no earlier run wrote" if earlier is None else f"belong to an earlier run ({earlier.kind})"
        raise ValueError(
            f"{str(folder)!r} holds {format_list(found)}, which this run ({kind}) would overwrite and {owner}. "
            "Nothing was changed. Set `output_dir` to another folder."
        )


def load_results(folder: str | Path) -> RunResults | None:
    """Load the results of the finished run in a folder; `None` if there are none."""
    try:
        return RunResults.load(Path(folder) / RESULTS_NAME)
    except ValueError:
        return None


def contains_checkpoint(folder: str | Path, checkpoint: str | None) -> bool:
    """Return whether a checkpoint is one of those of the run in a folder."""
    return checkpoint is not None and Path(checkpoint).resolve().parent == Path(folder).resolve()


def has_unfinished_run(folder: str | Path) -> bool:
    """Return whether the last checkpoint in a folder is newer than the results, which are written at the end."""
    checkpoint, results = last_complete_checkpoint(folder), Path(folder, RESULTS_NAME)
    if checkpoint is None or not results.is_file():
        return checkpoint is not None
    return Path(checkpoint, STATE_NAME).stat().st_mtime_ns > results.stat().st_mtime_ns


def find_checkpoint(folder: str | Path, resume_from_checkpoint: str | bool | None) -> str | None:
    """Return the checkpoint that `resume_from_checkpoint` means.

    Args:
        folder (`str` or `Path`): Output folder of the run.
        resume_from_checkpoint (`str` or `bool`, *optional*): `True` or `"true"` for the last complete checkpoint in
            `folder`; `"auto"` for the same if there is one, for launchers that restart a run by the same command; or
            the path of a checkpoint.

    Returns:
        `str`: A complete checkpoint; `None` to train from the start.

    Raises:
        ValueError: There is no such checkpoint, or it is incomplete.
    """
    if not is_resumed(resume_from_checkpoint):
        return None
    if str(resume_from_checkpoint).lower() == "auto":
        return last_complete_checkpoint(folder)
    if str(resume_from_checkpoint).lower() != "true":
        if not _is_complete(Path(resume_from_checkpoint)):
            raise ValueError(
                f"`resume_from_checkpoint` is {str(resume_from_checkpoint)!r}, but there is no complete checkpoint. "
                "Give `true` for the last one in the output folder, `auto` to start without one, or the path of a "
                "`checkpoint-*` folder."
            )
        return str(resume_from_checkpoint)
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(
            f"`resume_from_checkpoint` is true, but {str(folder)!r} has no complete checkpoint. Leave it out to train "
            "from the start."
        )
    return checkpoint


def is_resumed(resume_from_checkpoint: str | bool | None) -> bool:
    """Return whether `resume_from_checkpoint` asks for a checkpoint."""
    return str(resume_from_checkpoint).lower() not in ("none", "false", "")


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """Return the complete checkpoint of the highest step; `None` if there is none.

    The Trainer writes its state last, so a checkpoint without a readable state is incomplete.
    """
    complete = [path for path in _find_checkpoints(folder) if _is_complete(path)]
    return str(complete[-1]) if complete else None


def _find_checkpoints(folder):
    """Return the checkpoints in the order of their steps."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    paths = [path for path in Path(folder).glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    return sorted((path for path in paths if path.is_dir()), key=lambda path: int(path.name.removeprefix(prefix)))


def _is_complete(checkpoint):
    try:
        TrainerState.load_from_json(str(checkpoint / STATE_NAME))
    except (OSError, ValueError, TypeError):
        return False
    return True


def remove_checkpoints(folder: str | Path) -> None:
    """Remove the checkpoints of a finished run that is replaced, so that they are not mixed with the new ones."""
    if checkpoints := _find_checkpoints(folder):
        logger.warning(f"The earlier run in {folder} is replaced: its {len(checkpoints)} checkpoint(s) are removed.")
    for path in checkpoints:
        path.unlink() if path.is_symlink() else shutil.rmtree(path)


def refuse_non_finite_weights(model: nn.Module, step: int, folder: str | Path) -> None:
    """Check that all trainable weights are finite before they are saved.

    Raises:
        FloatingPointError: A weight has NaN or infinite values. The message names it and the last good checkpoint.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.detach().isfinite().all():
            checkpoint = last_complete_checkpoint(folder)
            kept = "Nothing has been saved" if checkpoint is None else f"The last good checkpoint is {checkpoint}"
            raise FloatingPointError(
                f"After step {step}, `{name}` has values that are not finite, so it is not saved. {kept}. Continue "
                "from there with a lower learning rate, or look for damaged rows."
            )
