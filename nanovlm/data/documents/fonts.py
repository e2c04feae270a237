"""Font families, each of one split: what a test page is written in never occurs in training.

The families of FAMILIES come with matplotlib and Pillow, so they are the same on any machine. Others are those of files
and folders that the user names; a family of theirs goes to the split of the one of ours with whose name it begins, such
as "DejaVu Sans Light", and else to the split that a hash of its name gives, wherever its files are.
"""

import hashlib
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import ImageFont

from nanovlm.errors import UserError

# What pages are written with. The fonts of TeX have other signs in the places of " < > \ ^ _ { | } ~.
CHARACTERS = "".join(map(chr, range(33, 127))).translate({ord(c): None for c in '"<>\\^_`{|}~'})
# What is measured, so that no font needs more room than one of ours.
GROUPS = ("0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
SUFFIXES = (".ttf", ".otf")
TEST_SHARE = 0.25  # of the families that a user names
PLAIN_STYLES = ("regular", "book", "roman", "normal", "medium", "text")


@dataclass(frozen=True)
class Family:
    """A family of fonts: the path or the bytes of its regular and of its bold font, and matplotlib's name for formulas.

    `bold` is the regular font where there is no other, `math` is empty where there is none.
    """

    name: str
    regular: Path | bytes
    bold: Path | bytes
    math: str = ""

    @property
    def path(self) -> Path:
        """The file of the regular font, as matplotlib needs one."""
        return self.regular if isinstance(self.regular, Path) else store(self.regular)


@cache
def own_families() -> dict[str, tuple[Family, ...]]:
    """Return the families that packages ship which are always there, by split."""
    import matplotlib  # takes half a second

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    shipped = {
        split: tuple(
            Family(name, folder / f"{regular}.ttf", folder / f"{bold or regular}.ttf", math)
            for name, regular, bold, math in families
        )
        for split, families in FAMILIES.items()
    }
    aileron = ImageFont.load_default(LOADED)
    assert isinstance(aileron, ImageFont.FreeTypeFont)
    shipped["test"] += (Family("Aileron", aileron.font_bytes, aileron.font_bytes, "stixsans"),)
    return shipped


@cache
def store(font: bytes) -> Path:
    """Write a font to a file, which is there as long as this process."""
    file = Path(kept_folder().name) / f"{hashlib.sha256(font).hexdigest()[:16]}.ttf"
    file.write_bytes(font)
    return file


@cache
def kept_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="nanovlm-fonts-")


def read_families(paths: Sequence[str]) -> tuple[dict[str, tuple[Family, ...]], dict[str, str]]:
    """Return our families and those of font files and folders, by split; `system` names the folders of the system.

    Beside them, the files that are left out and why: a font that cannot write CHARACTERS, is slanted or wider than all
    of ours, or is not needed. Raises UserError for a path without any font.
    """
    families, left_out = dict(own_families()), {}
    found: dict[str, list[tuple[bool, bool, str, Path]]] = {}
    for path in paths:
        files = _find_files(path)
        if not files:
            raise UserError(f"--fonts {path} names no font: give a file {' or '.join(SUFFIXES)}, a folder, or system")
        for file in files:
            font = "it is one of ours" if is_own(file) else _describe(file)
            if isinstance(font, str):
                left_out[file.name] = font
            elif (*font[1:], file) not in found.setdefault(font[0], []):
                found[font[0]].append((*font[1:], file))
    for name, fonts in sorted(found.items()):
        regular = [font for font in sorted(fonts) if not font[0]]
        if name in own_names() or not regular:
            why, used = "it is one of ours" if name in own_names() else f"{name} has no regular style", ()
        else:
            bold = [font for font in sorted(fonts) if font[0] and font[1] == regular[0][1]]
            why, used = f"another style of {name} is used", (regular[0][-1], (bold or regular)[0][-1])
            families[split_of(name)] += (Family(name, used[0], used[1]),)
        left_out |= {font[-1].name: why for font in fonts if font[-1] not in used}
    return families, dict(sorted(left_out.items()))


@cache
def own_names() -> dict[str, str]:
    """Return the names of our families and of their files, as some fonts call themselves, with their splits."""
    own = [(split, family) for split, families in own_families().items() for family in families]
    files = [(split, file) for split, family in own for file in (family.regular, family.bold) if isinstance(file, Path)]
    return {family.name: split for split, family in own} | {file.stem: split for split, file in files}


def is_own(file: Path) -> bool:
    """Return whether a file is of the folder of ours, of which some write symbols in the places of letters."""
    own = (family.regular for families in own_families().values() for family in families)
    return file.parent in {regular.parent.resolve() for regular in own if isinstance(regular, Path)}


def split_of(name: str) -> str:
    """Return the split that a family belongs to, by its name alone."""
    for own, split in own_names().items():
        if name.startswith(own):
            return split
    return "test" if hashlib.sha256(name.encode()).digest()[0] < 256 * TEST_SHARE else "train"


def _find_files(path: str) -> list[Path]:
    if path == "system":
        from matplotlib.font_manager import findSystemFonts

        return sorted({Path(x).resolve() for x in findSystemFonts() if x.lower().endswith(SUFFIXES)})
    place = Path(path)
    files = place.rglob("*") if place.is_dir() else [place] if place.is_file() else []
    return sorted(file.resolve() for file in files if file.suffix.lower() in SUFFIXES)


def _describe(file: Path) -> tuple[str, bool, bool, str] | str:
    """Return family, whether it is bold, whether it is a variant, and style; of a font that is no use the reason."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(str(file))
        letters = font.get_charmap()
        style = font.style_name.lower()
        is_wide = any(own > most for own, most in zip(_widths(file), widest(), strict=True))
    except (RuntimeError, OSError, UnicodeError):  # damaged, or of pixels
        return "it cannot be read"
    words = style.split()
    if lacking := "".join(c for c in CHARACTERS if ord(c) not in letters):
        return f"it lacks the letters {lacking}"
    if "italic" in style or "oblique" in style:
        return "it is slanted"
    if is_wide:
        return "it is wider than all of ours"
    return font.family_name, "bold" in words, not {*words} <= {"bold", *PLAIN_STYLES}, style


@cache
def widest() -> list[float]:
    """Return the most room that each of GROUPS takes in a font of ours."""
    own = [family for families in own_families().values() for family in families]
    return [max(widths) for widths in zip(*(_widths(x) for f in own for x in (f.regular, f.bold)), strict=True)]


def _widths(file: Path | bytes) -> list[float]:
    return [load_font(file, MEASURED).getlength(letters) for letters in GROUPS]


@cache
def load_font(file: Path | bytes, size: int) -> ImageFont.FreeTypeFont:
    """Open a font; letters are set one by one, without the shaping that only some builds of Pillow have."""
    source = io.BytesIO(file) if isinstance(file, bytes) else str(file)
    return ImageFont.truetype(source, size, layout_engine=ImageFont.Layout.BASIC)


MEASURED = 100  # size at which widths are compared
LOADED = 10  # size at which Pillow's own font is opened, of which only the bytes are used

# By split: name, regular font, bold font if there is one, matplotlib's fontset for formulas.
FAMILIES = {
    "train": (
        ("DejaVu Sans", "DejaVuSans", "DejaVuSans-Bold", "dejavusans"),
        ("DejaVu Serif", "DejaVuSerif", "DejaVuSerif-Bold", "dejavuserif"),
        ("DejaVu Sans Mono", "DejaVuSansMono", "DejaVuSansMono-Bold", ""),
        ("Computer Modern", "cmr10", "cmb10", "cm"),
        ("Computer Modern Sans", "cmss10", "", ""),
        ("Computer Modern Typewriter", "cmtt10", "", ""),
    ),
    "test": (("STIX", "STIXGeneral", "STIXGeneralBol", "stix"),),
}
