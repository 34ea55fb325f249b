# SPDX-License-Identifier: Apache-2.0
"""Upload a folder to the Hub: in one commit, in none if nothing has changed, and resumable."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

from ..checkpoints import TOKENIZER_FILES
from ..errors import summarize_error
from ..export_manifest import FORMAT_FOLDERS


logger = logging.getLogger(__name__)

# Files of an earlier commit that would be loaded together with the new ones; other files are the owner's.
REPLACED_ON_THE_HUB = (
    *("*.safetensors", "*.safetensors.index.json", "generation_config.json", *TOKENIZER_FILES),
    *("*processor_config.json", ".eval_results/*", *(f"{folder}/*" for folder in FORMAT_FOLDERS.values())),
)


@dataclass(frozen=True)
class Upload:
    """Where on the Hub a folder was uploaded to."""

    commit: str
    commit_url: str
    pull_request_url: str | None
    is_new: bool


def upload(
    folder: Path, repo_id: str, *, private: bool, revision: str | None, create_pr: bool, message: str
) -> Upload:
    """Upload a folder in one commit; no commit is made if the repository already has this content.

    Args:
        folder (`Path`): Folder to upload completely.
        repo_id (`str`): Repository, created if it does not exist.
        private (`bool`): Whether a repository that is created is private. Does not change an existing one.
        revision (`str`, *optional*): Branch, created from the main branch if it does not exist. `None` is the main
            branch.
        create_pr (`bool`): Open a pull request with the commit.
        message (`str`): Commit message.

    Raises:
        ConnectionError: The Hub cannot be reached, or refuses the upload.
    """
    api = HfApi()
    with _explain_errors(folder, repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision)
        if private and before.private is False:
            logger.warning(f"The repository {repo_id} already exists and is public, so this upload is public too.")
        # `upload_folder` can make several commits with hf_xet. Files that an interrupted call has sent before its
        # commit stay on the Hub and are not sent again.
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
    # `*` of fnmatch also matches slashes.
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


@contextlib.contextmanager
def _explain_errors(folder, repo_id) -> Iterator[None]:
    try:
        yield
    except (HfHubHTTPError, LocalTokenNotFoundError, HTTPError, OSError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        raise ConnectionError(
            f"{str(folder)!r} was written, but could not be uploaded to {repo_id!r}: {summarize_error(cause)}. Log in "
            "with `hf auth login` if you are not logged in, and publish again: files that have arrived are not sent "
            "again."
        ) from error
