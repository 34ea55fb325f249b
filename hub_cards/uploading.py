# SPDX-License-Identifier: Apache-2.0
"""A folder to a repository on the Hub: one commit, none where nothing has changed, and resumable."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

from ..checkpoint_folders import REPLACED_FILES, first_line


logger = logging.getLogger(__name__)

# Of an earlier commit, these would be read together with the new files. What else lies there is the owner's.
REPLACED_ON_THE_HUB = (*REPLACED_FILES, "*processor_config.json", "ctranslate2/*", "onnx/*", ".eval_results/*")


@dataclass(frozen=True)
class Upload:
    """Where a folder has gone to on the Hub."""

    commit: str
    commit_url: str
    pull_request_url: str | None
    is_new: bool


def upload(
    folder: Path, repo_id: str, *, private: bool, revision: str | None, create_pr: bool, message: str
) -> Upload:
    """Uploads a folder in one commit; where the repository has it already, no commit is made.

    Args:
        folder (`Path`): All of it is uploaded.
        repo_id (`str`): Created if there is none.
        private (`bool`): Of a repository that is created; one that exists stays as it is.
        revision (`str`, *optional*): A branch, created from the main one if there is none. `None` is the main one.
        create_pr (`bool`): Open a pull request with the commit.
        message (`str`): Of the commit.

    Raises:
        ConnectionError: The Hub cannot be reached, or refuses; the message says why and how to go on.
    """
    api = HfApi()
    with _explained(folder, repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision)
        if private and before.private is False:
            logger.warning(f"{repo_id} exists and is public: what is uploaded now will be public too.")
        # Not `upload_folder`: with hf_xet it makes as many commits as it likes. What an interrupted call has sent
        # before its commit stays on the Hub and is not sent again.
        commit = api.create_commit(
            repo_id,
            _operations(folder, api.list_repo_files(repo_id, revision=revision)),
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
        )
    is_new = commit.oid != before.sha
    return Upload(commit.oid, commit.commit_url, commit.pr_url if is_new else None, is_new)


def _operations(folder, names_on_the_hub):
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    stale = [
        name
        for name in names_on_the_hub
        if name not in paths and any(_matches(name, pattern) for pattern in REPLACED_ON_THE_HUB)
    ]
    return [
        *(CommitOperationDelete(name, is_folder=False) for name in stale),
        *(CommitOperationAdd(name, path) for name, path in paths.items()),
    ]


def _matches(name, pattern):
    # `*` of fnmatch goes across folders, but a checkpoint's files lie at the top.
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


@contextlib.contextmanager
def _explained(folder, repo_id) -> Iterator[None]:
    try:
        yield
    except (HfHubHTTPError, LocalTokenNotFoundError, HTTPError, OSError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        raise ConnectionError(
            f"{str(folder)!r} was built, but could not be uploaded to {repo_id!r}: {first_line(cause)}. Log in with "
            "`hf auth login` if that is what is missing, and publish again: what has arrived is not sent twice."
        ) from error
