"""The Hugging Face hub: whether it can give a model or data set, asked once and told within seconds."""

from pathlib import Path

import config
from config import UserError

TIMEOUT_S = 5.0


def check_available(repository: str, kind: str, remedy: str) -> None:
    """Raise a UserError of one line, ending in `remedy`, if a "model" or "dataset" can be had neither here nor there.

    The libraries that load it ask again for half a minute before they give up. What is cached needs no hub, but they
    ask it for a newer version: HF_HUB_OFFLINE=1 spares that.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HFValidationError

    try:
        if Path(repository).exists() or is_cached(repository, kind):
            return
    except HFValidationError as error:  # a path
        raise UserError(f"{repository}: neither a folder nor a {kind}'s name on the hub; {remedy}") from error
    if is_offline_mode():
        raise UserError(f"the {kind} {repository} is not cached, and HF_HUB_OFFLINE is set; {remedy}")
    try:
        HfApi(token=config.hf_token).repo_info(repository, repo_type=kind, timeout=TIMEOUT_S)
    except Exception as error:  # huggingface_hub and the network below it each raise their own kinds
        raise unavailable(repository, kind, error, remedy) from error


def unavailable(repository: str, kind: str, error: Exception, remedy: str) -> UserError:
    """The one line for any failure to get something from the hub."""
    reason = " ".join(str(error).split())[:100] or "no reason given"
    return UserError(f"cannot get the {kind} {repository} from the hub ({type(error).__name__}: {reason}); {remedy}")


def is_cached(repository: str, kind: str) -> bool:
    """Whether the hub's cache holds any version of a repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type=kind)
    return any((folder / "snapshots").glob("*"))
