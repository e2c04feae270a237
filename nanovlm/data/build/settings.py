"""What a run was begun with, by which one that goes on notices another recipe, source or model of the same name."""

import json
from pathlib import Path

from torch import nn

from nanovlm.errors import UserError
from nanovlm.files import changes, read_json, write_file
from nanovlm.objectives.reference import fingerprint


def keep_settings(path: Path, settings: dict, what: str, has_written: bool):
    """Write the settings of a run that begins, or has written nothing yet, so that a mistake in them can be corrected.

    Raises UserError if one that goes on was begun with `what` is others.
    """
    settings = json.loads(json.dumps(settings))
    if not path.exists() or not has_written:
        write_file(path, json.dumps(settings, indent=2))
        return
    if changed := changes(read_json(path), settings):
        raise UserError(f"{path.parent} was begun with {what} ({changed}): use the same, or remove it")


def digest_weights(model: nn.Module) -> str:
    """Return what tells the weights of a model from others."""
    return f"{int(fingerprint(model.state_dict())):x}"
