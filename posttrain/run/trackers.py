"""Trackers of runs: those that transformers' Trainer writes to, asked for by name.

check_trackers("wandb,mlflow")         # before anything is loaded
"""

from __future__ import annotations

import importlib.util
import os
from netrc import NetrcParseError, netrc
from urllib.parse import urlsplit

from posttrain.errors import ConfigError
from posttrain.run.sources import did_you_mean

# Trackers that transformers knows, and the package of each.
TRACKERS = {
    "azure_ml": "azureml",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet_ml",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}


def check_trackers(report_to: str) -> None:
    """Raise ConfigError for a tracker that is unknown, not installed, or would ask for a login."""
    names = [] if report_to == "none" else report_to.replace(" ", "").split(",")
    for name in names:
        _check(name)


def _check(name: str) -> None:
    if name not in TRACKERS:
        near = did_you_mean(name, TRACKERS)
        raise ConfigError(f"report_to: expected none or {', '.join(TRACKERS)}, found {name}.{near}")
    if importlib.util.find_spec(TRACKERS[name]) is None:
        raise ConfigError(
            f"report_to: expected the package {TRACKERS[name]} for {name}, which is not installed. "
            f"Install it with: pip install {TRACKERS[name]}"
        )
    if name == "wandb" and not _wandb_needs_no_login():
        raise ConfigError(
            "report_to: wandb has no key and would ask for one. Run `wandb login`, set "
            "WANDB_API_KEY, or set WANDB_MODE=offline."
        )


def _wandb_needs_no_login() -> bool:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc(os.environ.get("NETRC")).authenticators(str(host)) is not None
    except (OSError, NetrcParseError):
        return False
