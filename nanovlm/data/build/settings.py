"""What a run was begun with, by which one that goes on notices another recipe, source or model of the same name."""

import json
from pathlib import Path

from torch import nn

from nanovlm.errors import UserError, printable
from nanovlm.files import read_json, write_file
from nanovlm.objectives.reference import fingerprint


def keep_settings(path: Path, settings: dict, what: str):
    """Write the settings of a run that begins. Raises UserError if one that goes on was begun with `what` is others."""
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        write_file(path, json.dumps(settings, indent=2))
        return
    before = read_json(path)
    if changed := [name for name, value in settings.items() if before.get(name) != value]:
        shown = "; ".join(f"{name}: {show(before.get(name))} against {show(settings[name])}" for name in changed)
        raise UserError(f"{path.parent} was begun with {what} ({shown}): use the same, or remove it")


def show(value) -> str:
    return printable(repr(value), most=200)


def digest_weights(model: nn.Module) -> str:
    """Return what tells the weights of a model from others."""
    return f"{int(fingerprint(model.state_dict())):x}"
