"""Sharing snapshots on the Hugging Face hub: asked for and checked when a run starts, done when it is complete."""

import os
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from d_emo.errors import InputError, RunError


def prepare_push(repo_id: str | None) -> None:
    """Make sure, before a long run, that its snapshot can be pushed: name, token, and a repository to write to.

    Makes the repository, private, if there is none. Only the main process of a run does anything; None does nothing.

    Raises:
        InputError: The name is malformed, nobody is logged in, or the hub refuses or cannot be reached.
    """
    if repo_id is None or int(os.environ.get("RANK", 0)) != 0:
        return
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"`push_to_hub` {repo_id} is no name of a repository: {_sentence(error)}") from None
    if "/" not in repo_id:
        raise InputError(f"`push_to_hub` wants OWNER/NAME, not {repo_id}")
    if get_token() is None:
        raise InputError("`push_to_hub` needs a token of the Hugging Face hub: log in with `hf auth login` first")
    try:
        HfApi().create_repo(repo_id, private=True, exist_ok=True)
    except HfHubHTTPError as error:
        raise InputError(
            f"the hub does not let you write to {repo_id} ({_sentence(error)}); log in with `hf auth login` and a "
            "token that may write, or choose another name"
        ) from None
    except Exception as error:  # whatever the HTTP library of the day raises without a network
        raise InputError(
            f"the hub cannot be reached ({_sentence(error)}); train without `push_to_hub` and push the snapshot later: "
            f"hf upload {repo_id} SNAPSHOT_FOLDER"
        ) from None


def push_snapshot(folder: str | Path, repo_id: str) -> str:
    """Upload a snapshot, card included, to OWNER/NAME on the hub; returns the repository's address.

    Raises:
        RunError: The hub refused or could not be reached; the sentence says how to push later.
    """
    try:
        address = HfApi().create_repo(repo_id, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"Snapshot {Path(folder).name}")
    except Exception as error:  # HTTP, network and file errors alike must not take the training's result with them
        raise RunError(
            f"the training is done and its snapshot is in {folder}, but it could not be pushed to {repo_id} "
            f"({_sentence(error)}). Push it later: hf upload {repo_id} {folder}"
        ) from error
    return str(address)


def _sentence(error: Exception) -> str:
    """The first line of an error's message."""
    lines = str(error).strip().splitlines()
    return (lines[0].strip().rstrip(".") if lines else type(error).__name__)[:200]
