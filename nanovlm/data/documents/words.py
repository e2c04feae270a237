"""What documents say: names, things and numbers. One word in five is for tests alone, the others for training alone.

`rng` alone decides, never what a font measures, so that a document says the same on any machine.
"""

from random import Random

MONTHS = "January February March April May June July August September October November December".split()


class Words:
    """Draws words of one split."""

    def __init__(self, rng: Random, split: str):
        self.rng, self.split = rng, split

    def some(self, name: str, number: int) -> list[str]:
        """Return different words of a list."""
        return self.rng.sample(words_of(name, self.split), number)

    def one(self, name: str) -> str:
        return self.some(name, 1)[0]

    def person(self) -> str:
        return f"{self.one('first')} {self.one('last')}"

    def company(self) -> str:
        return f"{self.one('last')} {self.rng.choice(('Ltd', 'Inc', 'and Sons', 'Group', 'Partners'))}"

    def street(self) -> str:
        return f"{self.rng.randint(1, 199)} {self.one('street')} {self.rng.choice(('Street', 'Road', 'Lane'))}"

    def phone(self) -> str:
        return f"{self.rng.randint(200, 989)}-{self.rng.randint(100, 999)}-{self.rng.randint(1000, 9999)}"

    def code(self) -> str:
        letters = "ABCDEFGHJKLMNPRSTUVWXYZ"
        return f"{self.rng.choice(letters)}{self.rng.choice(letters)}-{self.rng.randint(1000, 9999)}"

    def date(self, form: int | None = None, years: tuple[int, int] = (2015, 2029)) -> str:
        """Return a date in one of four forms; those of one document share theirs."""
        day, month, year = self.rng.randint(1, 28), self.rng.randint(1, 12), self.rng.randint(*years)
        forms = (
            f"{day} {MONTHS[month - 1]} {year}",
            f"{MONTHS[month - 1]} {day}, {year}",
            f"{year}-{month:02}-{day:02}",
            f"{day:02}/{month:02}/{year}",
        )
        return forms[self.rng.randrange(4) if form is None else form]

    def time(self) -> str:
        return f"{self.rng.randint(8, 21):02}:{self.rng.randint(0, 59):02}"

    def numbers(self, number: int, low: int, high: int, step: int = 1) -> list[int]:
        """Return different multiples of `step` between two of them."""
        return [step * x for x in self.rng.sample(range(low // step, high // step + 1), number)]


def words_of(name: str, split: str) -> list[str]:
    return [word for i, word in enumerate(LISTS[name].split()) if (i % 5 == 4) == (split == "test")]


def money(cents: int) -> str:
    return f"${cents // 100}.{cents % 100:02}"


LISTS = {
    "first": """Anna Ben Clara David Emma Frank Grace Henry Iris Jack Karen Leo Maria Noah Olga Peter Quinn Rosa Simon
        Tara Umar Vera Walter Xenia Yusuf Zoe Alan Bella Carl Dora Erik Fiona George Hanna Ivan Julia Kurt Laura Max
        Nina Oscar Paula Ralph Sara Tom Ursula Victor Wendy Aaron Beth""",
    "last": """Abbott Baker Carter Dalton Ellis Foster Garcia Harris Irving Jensen Keller Larsen Miller Norton Olsen
        Palmer Quigley Rossi Schmidt Turner Underwood Vargas Weber Young Ziegler Adler Bishop Conrad Duncan Evans
        Fischer Gibson Hughes Ibarra Jordan Kramer Lambert Moreno Nolan Ortega Porter Reyes Santos Tanaka Ulrich Vogel
        Walsh Yamada Zimmer Archer""",
    "street": """Oak Maple River Church Station Mill Garden Park Hill Lake Bridge Castle Meadow Forest Harbor Market
        School Spring Valley Sunset Willow Cedar Elm Pine Birch Chapel Canal Field Orchard Summit""",
    "city": """Austin Berlin Cairo Dublin Essen Florence Geneva Houston Istanbul Jakarta Kyoto Lisbon Madrid Nairobi
        Oslo Paris Quito Riga Seoul Tokyo Utrecht Vienna Warsaw York Zurich Athens Boston Chicago Dallas Edinburgh
        Fresno Ghent Hanoi Incheon Jaipur Krakow London Mumbai Naples Osaka""",
    "product": """Apples Bread Coffee Dates Eggs Flour Grapes Honey Icing Juice Kiwis Lemons Milk Noodles Olives Pears
        Quinoa Rice Salt Tea Umbrella Vinegar Walnuts Yogurt Zucchini Almonds Butter Cheese Donuts Figs Garlic Ham Jam
        Ketchup Leeks Mango Nuts Onions Pasta Radish""",
    "goods": """Lamp Chair Table Mirror Clock Carpet Pillow Blanket Kettle Toaster Mixer Blender Camera Printer Scanner
        Monitor Keyboard Headset Speaker Charger Wallet Jacket Gloves Scarf Sandals Helmet Bicycle Tent Backpack
        Lantern Drill Hammer Ladder Shovel Bucket Guitar Violin Piano Drum Flute""",
    "job": """Engineer Teacher Nurse Pilot Baker Lawyer Farmer Painter Driver Writer Chemist Dentist Florist Plumber
        Surgeon Architect Carpenter Designer Librarian Mechanic Musician Optician Pharmacist Sculptor Translator""",
    "topic": """budget contract delivery inspection invoice lease meeting membership order payment policy project
        proposal renewal repair report request safety schedule shipment survey training transfer upgrade warranty""",
    "measure": """sales visitors exports imports orders profits rainfall output costs demand deliveries members students
        patients tickets repairs flights downloads signups bookings loans returns harvest traffic turnover""",
    "color": "red blue green white black silver brown yellow orange grey purple pink beige gold teal",
    "word": """able acid amber anchor apple arrow autumn badge basket beach beyond bold bottle branch breeze bright
        bronze button cabin candle carbon castle center chance circle clever cloud coast copper corner cotton crystal
        danger dawn desert distant dragon early eagle earth echo engine evening famous feather figure flame forest
        fresh frozen garden gentle glass golden grand harbor hidden honest hunter island ivory jacket journey jungle
        kettle kitchen ladder lantern legend letter lively lucky magnet marble meadow melody mirror modern moment
        mountain narrow native needle ocean open orbit oyster paper pepper picture planet pocket power quick quiet
        rabbit random ribbon river rocket royal saddle salmon season secret shadow shelter signal silent silver simple
        spider spring station stone storm summer sunset temple thunder timber travel tunnel urban valley velvet violet
        voyage wagon water weather whisper winter wisdom wonder yellow zebra""",
}  # fmt: skip
