"""A YAML file -> the mapping in it, or the config that it holds: a recipe, a taxonomy."""

from pathlib import Path

import yaml

from nanovlm.config import from_dict
from nanovlm.config.fields import check
from nanovlm.errors import UserError


class Loader(yaml.SafeLoader):
    """Reads plain data, whose keys are texts; YAML's own would keep the last of two values of a key in silence."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _value in node.value:
            if key.tag != "tag:yaml.org,2002:merge":  # whose keys may be there, too
                name, line = self.construct_object(key, deep=True), key.start_mark.line + 1
                check(isinstance(name, str), f"the key {name!r} in line {line} is no text: put it in quotes")
                check(name not in seen, f"the key {name!r} is there again in line {line}: leave one of the two out")
                seen.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str) -> dict:
    """Read a mapping. Raises UserError that names the file and the place that is wrong, or `what` it must hold."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from error
    check(isinstance(data, dict), f"{path} must hold {what}")
    return data


def to_config(path: Path, cls, data: dict):
    """Make a config of what a file holds. Raises UserError that names the file, and the field that is wrong."""
    try:
        return from_dict(cls, data)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
