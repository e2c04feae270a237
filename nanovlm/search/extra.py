"""What the extra `search` installs."""

import importlib

from nanovlm.errors import UserError


def needed(module: str):
    """Import a package of the extra. Raises UserError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f'documents need the package {error.name}: pip install -e ".[search]"') from error
