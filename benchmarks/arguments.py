"""The command line of a benchmark: fields of a dataclass, as options, or as they are in one JSON object.

`--json '{"repeats": 3}'` is how one script here starts another. It needs no tyro, which a machine that is lent for
minutes may not have.
"""

import json
import sys
from collections.abc import Sequence


def read(config_class: type, description: str, args: Sequence[str] | None = None):
    """Build a config from the command line."""
    args = sys.argv[1:] if args is None else list(args)
    if args[:1] == ["--json"]:
        return config_class(**json.loads(args[1]))
    import tyro

    return tyro.cli(config_class, args=args, description=description)
