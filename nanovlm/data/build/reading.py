"""How the records of a source are read: the settings that recipes and commands share."""

import dataclasses

from nanovlm.config import pick
from nanovlm.data.columns import parse_fields
from nanovlm.data.layouts import LAYOUTS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadConfig:
    # How records are laid out, and the names of their columns, as data.layout and data.fields of train.py.
    layout: str = ""
    fields: tuple[str, ...] = ()
    # Fetch pictures that records name by an http or https address.
    allow_urls: bool = False

    @property
    def options(self) -> dict:
        """The keyword arguments of records.check."""
        return {"layout": self.layout, "fields": parse_fields(self.fields)}

    def check_reading(self, where: str = ""):
        """Raise UserError for a layout or a field that does not exist; `where` stands before their names."""
        if self.layout:
            pick(LAYOUTS, self.layout, f"{where}layout")
        parse_fields(self.fields)
