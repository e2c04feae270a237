"""The name of a model -> a folder with its files, downloaded if the name is a repository on the hub."""

import re
from pathlib import Path

from nanovlm.errors import UserError
from nanovlm.files import find_folder, read_json

# Files to download from a repository.
FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
)
TOKENIZER_FILES = tuple(name for name in FILES if "safetensors" not in name)


def find(name: str | Path, files: tuple[str, ...] = FILES) -> Path:
    """Return the folder of this name, or one with the downloaded files of a repository `owner/name[@revision]`."""
    if (folder := find_folder(Path(name))).is_dir():
        return folder
    repository, _, revision = str(name).partition("@")
    nowhere = f"there is no model folder {name}, and no repository on the hub can have that name"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(nowhere)
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=[*files]))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{repository} is gated: accept its terms on the hub, then log in with hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no folder and no public repository {repository}; for a private one log in with hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repository} has no revision {revision}") from error
    except errors.HFValidationError as error:
        raise UserError(nowhere) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"there is no folder {name}, and the hub cannot be reached for a repository of that name: check the "
            f"network, or give a folder that holds its files ({reason})"
        ) from error


def find_weights(folder: Path) -> list[Path]:
    """List the safetensors files of a folder. Raises UserError that names what is missing."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        raise UserError(
            f"{folder} has no model.safetensors and no model.safetensors.index.json"
            + (f"; {', '.join(others)} could run any code when read: convert it to safetensors" if others else "")
        )
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} has no weight_map from tensors to files") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
    return [folder / name for name in names]
