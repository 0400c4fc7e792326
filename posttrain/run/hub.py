"""The Hugging Face Hub, where a run's model may go: asked at the door, sent at the end.

check_push(config)                     # before anything is loaded: name, token, answer
push_model(folder, config)             # after the model is saved on disk
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import ConfigError, PosttrainError
from posttrain.run.options import say

if TYPE_CHECKING:
    from posttrain.run.settings import RunConfig


class PushError(PosttrainError):
    """A saved model that the Hub did not take."""


def check_push(config: RunConfig) -> None:
    """Refuse what --push_to_hub cannot do, and complete `hub_model_id`; nothing is made there yet.

    Raises ConfigError: no token, one that may not write, a name that cannot be, another's name, or
    no answer.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    flag, name = "--push_to_hub", config.hub_model_id or Path(config.output_dir).name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--hub_model_id: {_line(error)}") from None
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"{flag}: HF_HUB_OFFLINE is set, and under it huggingface_hub sends no request. "
            "Unset it, or leave the flag out."
        )
    if not huggingface_hub.get_token():
        raise ConfigError(
            f"{flag}: expected a token of the Hugging Face Hub, found none. Run `hf auth login`, "
            "or set HF_TOKEN to one that may write."
        )
    try:
        user = huggingface_hub.whoami()
    except Exception as error:
        raise ConfigError(
            f"{flag}: {constants.ENDPOINT} does not take the token: {_line(error)} Run "
            "`hf auth login` again, or leave the flag out."
        ) from None
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConfigError(f"{flag}: expected a token that may write, found one that reads alone.")
    owner, _, _ = name.rpartition("/")
    owners = [user["name"], *(group["name"] for group in user.get("orgs", ()))]
    if owner and owner not in owners:
        raise ConfigError(
            f"--hub_model_id: expected {' or '.join(owners)} before /, found {owner}."
        )
    config.hub_model_id = name if owner else f"{user['name']}/{name}"


def push_model(folder: Path, config: RunConfig) -> None:
    """Send the saved model in `folder` to the Hub in one commit.

    Raises PushError, with the command that sends it later; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api, name = HfApi(), config.hub_model_id
    try:
        made = api.create_repo(name, private=config.hub_private_repo or None, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message="A model trained by posttrain"
        )
    except Exception as error:
        raise PushError(
            f"--push_to_hub: the model is saved in {folder}, and the Hub did not take it: "
            f"{_line(error)} Send it with: hf upload {name} {folder}"
        ) from None
    say(f"hub     {made}")


def _line(error: Exception) -> str:
    """The first line of what a library says, as a sentence."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = text or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
