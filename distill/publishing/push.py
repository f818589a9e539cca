"""The upload of a saved student to the Hugging Face hub, or another one that `HF_ENDPOINT` names."""

import json
from pathlib import Path
from typing import Any

from distill.data.seen_rows import FILE
from distill.data.trained_on import SPLIT
from distill.errors import DistillError
from distill.storage.adapters import ADAPTERS
from distill.storage.files import MANIFEST

LEFT_OUT = [FILE, SPLIT, MANIFEST, ".*", "**/.*"]
"""Files of a saved student that are not uploaded: fingerprints of the rows that it was trained on, the split that held
out others, the checksums of all files here, and leftovers."""


def check_repo(repo: str) -> None:
    """Refuse, before a training, a repository that nothing could be uploaded to.

    Args:
        repo: its id, as "organisation/name".

    Raises:
        DistillError: no id, no hub (offline), or no login.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise DistillError(f"{repo!r} is no name on a hub ({_first_line(error)}); write e.g. 'name/student'.") from None
    if constants.is_offline_mode():
        raise DistillError(
            f"{repo!r} cannot be uploaded, as HF_HUB_OFFLINE is set; unset it, or leave push out and upload later: "
            f"hf upload {repo} FOLDER."
        )
    try:
        HfApi().whoami()
    except Exception as error:
        raise _refusal(repo, error, "log in first: hf auth login, or set HF_TOKEN") from None


def push_folder(folder: Path, repo: str, *, private: bool = True, token: str | None = None) -> str:
    """Upload the folder of a saved student as one commit, and return the address of the repository.

    The repository is made if need be. An existing one stays as public or private as it is.

    Args:
        folder: of the student: weights, configuration, tokenizer, card.
        repo: the id of the repository, as "organisation/name".
        private: whether a new repository is private.
        token: of the hub; None takes that of the login.

    Raises:
        DistillError: the hub cannot be reached or refuses; the message says how to upload the folder later.
    """
    from huggingface_hub import HfApi

    if not folder.is_dir():
        raise DistillError(f"{folder} does not exist, so there is nothing to upload; save the student there first.")
    base = _base_of(folder)
    if Path(base).is_absolute():
        raise DistillError(
            f"{folder} holds adapters for the model in {base}, which is on this machine alone; merge them before, "
            f"student.merge_and_unload().save_pretrained(…), or name a base on the hub in {folder / ADAPTERS}."
        )
    api: Any = HfApi(token=token)
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        message = "Upload a student trained with distill"
        api.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=LEFT_OUT, commit_message=message)
    except Exception as error:
        raise _refusal(repo, error, f"upload it later: hf upload {repo} {folder}") from None
    return str(made)


def _base_of(folder: Path) -> str:
    """Return the model that adapters in a folder belong to; an empty text where there are none."""
    file = folder / ADAPTERS
    return str(json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")) if file.is_file() else ""


def _refusal(repo: str, error: Exception, way_out: str) -> DistillError:
    """Return the error that explains why a repository could not be used."""
    return DistillError(f"{repo!r} cannot be uploaded: {type(error).__name__}: {_first_line(error)}; {way_out}.")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else "no reason was given"
