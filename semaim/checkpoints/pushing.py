"""Pushing an exported folder to the Hugging Face hub, by its own library."""

import os
from pathlib import Path

from semaim.errors import UserError


def check_repository(repository: str) -> None:
    """`UserError` for what is no OWNER/REPO, or if nobody is logged in."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository}: {' '.join(str(error).split())}") from None
    if repository.count("/") != 1:
        raise UserError(f"{repository}: give OWNER/REPO, a repository of the Hugging Face hub")
    if get_token() is None:
        raise UserError("no token of the Hugging Face hub: log in with `hf auth login`, or set HF_TOKEN")


def push(folder: str | os.PathLike, repository: str, private: bool = False) -> str:
    """Upload a folder's files in one commit to a repository, which is created if need be; returns the commit's address.

    Args:
        folder: as `export` writes it.
        repository: OWNER/REPO.
        private: create it as private; one that exists has to be so.

    Raises:
        UserError: no token, no right to write there, no network, or the repository is public and `private` asked for.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_repository(repository)
    api = HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise UserError(
                f"{repository} is there already and public: leave --private out, or name another repository"
            )
        done = api.upload_folder(
            repo_id=repository, folder_path=Path(folder), commit_message="Encoder written by semaim export"
        )
        return str(done.commit_url)
    except HfHubHTTPError as error:
        reason = " ".join((error.server_message or str(error)).split())[:160]
        status = error.response.status_code if error.response is not None else None
        if status == 401:
            reason = f"the hub does not know the token ({reason}): log in with `hf auth login`, or set HF_TOKEN"
        elif status == 403:
            reason = f"the token has no right to write there ({reason}): use one with write access to the repository"
        raise UserError(f"cannot push to {repository}: {reason}") from None
    except UserError:
        raise
    except Exception as error:  # the network's are of many types
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"cannot push to {repository}: {reason}") from None
