"""Letters, forms and receipts, with the questions that DocVQA asks (arXiv 2007.00398): each answer is in the picture.

A function draws what is to be said in the manner of one template, and returns kind, question and answer.
"""

from nanovlm.data.documents.page import MARGIN, Page
from nanovlm.data.documents.words import Words, money

Asked = list[tuple[str, str, str]]


# --- letters ------------------------------------------------------------------------------------------------------

MORE = (
    "All prices include delivery.",
    "The goods remain ours until they are paid.",
    "You will receive a confirmation within a week.",
    "We hope to hear from you soon.",
    "A copy of this message has been sent to the office.",
)


def _letter(words: Words) -> dict[str, str]:
    form = words.rng.randrange(4)
    return {
        "company": words.company(),
        "street": words.street(),
        "city": words.one("city"),
        "phone": words.phone(),
        "date": words.date(form, (2015, 2022)),
        "to": words.person(),
        "from": words.person(),
        "job": words.one("job"),
        "reference": words.code(),
        "subject": f"{words.one('color').capitalize()} {words.one('goods').lower()} {words.one('topic')}",
        "amount": money(words.rng.randint(1000, 99999)),
        "due": words.date(form, (2023, 2029)),
        "contact": words.person(),
        "place": words.one("city"),
        "hour": words.time(),
        "more": words.rng.choice(MORE),
    }


def _body(said: dict[str, str]) -> str:
    return (
        f"thank you for your message. The amount of {said['amount']} is due on {said['due']}. "
        f"Please write the reference on your payment. {said['more']} Our contact in {said['place']} is "
        f"{said['contact']}, who can be reached every day from {said['hour']} on."
    )


def _ask_letter(said: dict[str, str], more: Asked) -> Asked:
    return [
        ("letter", "what is the date of the document?", said["date"]),
        ("letter", "to whom is the document addressed?", said["to"]),
        ("letter", "who wrote the document?", said["from"]),
        ("letter", "what is the subject?", said["subject"]),
        ("letter", "what is the reference?", said["reference"]),
        ("letter", "what amount is due?", said["amount"]),
        ("letter", "when is the amount due?", said["due"]),
        ("letter", f"who is the contact in {said['place']}?", said["contact"]),
        ("letter", "from what time on can the contact be reached?", said["hour"]),
        *more,
    ]


def letter_block(page: Page, words: Words) -> Asked:
    said = _letter(words)
    page.put(said["company"], bold=True, scale=1.3)
    page.put(f"{said['street']}, {said['city']}. Phone {said['phone']}", skip=1.2)
    page.rule(page.y, ink=page.accent, width=2)
    page.y += page.step // 2
    page.put(said["date"], skip=1.4)
    page.put(said["to"])
    page.put(f"Reference: {said['reference']}", skip=1.4)
    page.put(f"Subject: {said['subject']}", bold=True, skip=1.4)
    page.wrap(f"Dear {said['to'].split()[0]}, {_body(said)}")
    page.y += page.step // 2
    page.put("Yours sincerely,", skip=1.2)
    page.put(said["from"])
    page.put(said["job"])
    more = [
        ("letter", "which company sent the letter?", said["company"]),
        ("letter", "what is the phone number?", said["phone"]),
        ("letter", "what is the job of the writer?", said["job"]),
    ]
    return _ask_letter(said, more)


def letter_memo(page: Page, words: Words) -> Asked:
    said = _letter(words)
    page.put("MEMORANDUM", bold=True, scale=1.4, x=page.width / 2, align="m", skip=1.2)
    for name, key in (("TO", "to"), ("FROM", "from"), ("DATE", "date"), ("SUBJECT", "subject"), ("REF", "reference")):
        page.write(MARGIN, page.y, f"{name}:", 100, bold=True)
        page.put(said[key], x=MARGIN + 105, room=page.right - MARGIN - 105)
    page.y += page.step // 3
    page.rule(page.y, width=2)
    page.y += page.step // 2
    page.wrap(f"{said['to'].split()[0]}, {_body(said)}")
    return _ask_letter(said, [])


def letter_email(page: Page, words: Words) -> Asked:
    """A message in a window: the bar, who and when on one line, the subject large."""
    said = _letter(words)
    page.box(0, 0, page.width, page.step + 10, fill=page.accent)
    page.write(MARGIN, 5, "Inbox", 100, ink=(255, 255, 255), bold=True)
    page.write(page.right, 5, said["company"], 320, ink=(255, 255, 255), align="r")
    page.y = page.step + 22
    page.put(said["subject"], scale=1.35, skip=1.2)
    page.write(page.right, page.y, said["date"], 180, align="r", ink=page.accent)
    page.put(f"From {said['from']}", room=270)
    page.put(f"To {said['to']}", skip=1.5)
    page.wrap(f"Hello {said['to'].split()[0]}, {_body(said)}")
    page.y += page.step // 2
    top = page.y
    page.y += page.step // 3
    page.put(f"Ref. {said['reference']}", x=MARGIN + 10, room=150)
    page.box(MARGIN, top, MARGIN + 170, page.y + page.step // 4, outline=page.accent)
    return _ask_letter(said, [("letter", "which company is named at the top?", said["company"])])


# --- forms --------------------------------------------------------------------------------------------------------

TITLES = ("APPLICATION FORM", "REGISTRATION FORM", "PATIENT RECORD", "MEMBER DETAILS", "BOOKING FORM")
OPTIONS = {
    "membership": ("basic", "silver", "gold"),
    "payment": ("cash", "card", "transfer"),
    "contact": ("phone", "mail", "letter"),
}


def _form(words: Words) -> tuple[list[tuple[str, str]], str, str, Asked]:
    """Return labels with values, the name of the options, the one that is ticked, and the questions."""
    first, last = words.one("first"), words.one("last")
    form = words.rng.randrange(4)
    fields = [
        ("Date of birth", words.date(form, (1940, 2006))),
        ("Street", words.street()),
        ("City", words.one("city")),
        ("Phone", words.phone()),
        ("Occupation", words.one("job")),
        ("Number", words.code()),
        ("Valid until", words.date(form)),
    ]
    fields = [("First name", first), ("Last name", last), *words.rng.sample(fields, 4)]
    options = words.rng.choice(list(OPTIONS))
    ticked = words.rng.choice(OPTIONS[options])
    asked = [("form", f"what is written in the field {label.lower()}?", value) for label, value in fields]
    return fields, options, ticked, [*asked, ("form", f"which {options} is ticked?", ticked)]


def _tick(page: Page, x: float, options: str, ticked: str, room: float):
    """Draw the name of the options and a box for each, of which one is ticked; each has a third of the room."""
    page.put(f"{options.capitalize()}:", x=x, room=room)
    side, wide = page.size, room / 3
    for number, option in enumerate(OPTIONS[options]):
        left, top = x + number * wide, page.y + 2
        page.box(left, top, left + side, top + side, outline=page.ink)
        if option == ticked:
            for ends in ((0, 0, 1, 1), (0, 1, 1, 0)):
                corners = [a + 3 + e * (side - 6) for a, e in zip((left, top) * 2, ends, strict=True)]
                page.canvas.line(corners, fill=page.ink, width=2)
        page.write(left + side + 6, page.y, option, wide - side - 10)
    page.y += page.step


def form_lines(page: Page, words: Words) -> Asked:
    fields, options, ticked, asked = _form(words)
    page.put(words.rng.choice(TITLES), bold=True, scale=1.3, skip=1.5)
    for label, value in fields:
        page.write(MARGIN, page.y, f"{label}:", 130)
        page.rule(page.y + page.size + 5, left=MARGIN + 135)
        page.put(value, x=MARGIN + 142, room=page.right - MARGIN - 150, ink=page.accent, skip=1.35)
    page.y += page.step // 3
    _tick(page, MARGIN, options, ticked, page.right - MARGIN)
    return asked


def form_boxes(page: Page, words: Words) -> Asked:
    fields, options, ticked, asked = _form(words)
    page.put(words.rng.choice(TITLES), bold=True, scale=1.2, x=page.width / 2, align="m", skip=1.3)
    high, half = round(2.5 * page.step), (page.right - MARGIN) / 2
    for number, (label, value) in enumerate(fields):
        left, top = MARGIN + number % 2 * half, page.y + number // 2 * high
        page.box(left, top, left + half, top + high, outline=page.ink)
        page.write(left + 6, top + 3, label, half - 12, scale=LABEL, ink=page.accent)
        page.write(left + 6, top + page.step + 6, value, half - 12, bold=True)
    page.y += (len(fields) + 1) // 2 * high + page.step // 2
    _tick(page, MARGIN, options, ticked, page.right - MARGIN)
    return asked


def form_card(page: Page, words: Words) -> Asked:
    """A card as one carries it: a band with the title, a drawn portrait, values to the right of their labels."""
    fields, options, ticked, asked = _form(words)
    band = round(1.9 * page.step)
    page.box(0, 0, page.width, band, fill=page.accent)
    page.write(page.right, band / 2 - page.size * 0.75, words.rng.choice(TITLES), 330, scale=1.2, align="r",
               ink=(255, 255, 255))  # fmt: skip
    page.y = band + page.step // 2
    top, left = page.y, MARGIN + 122
    for label, value in fields:
        page.write(left + 105, page.y, label, 105, align="r", ink=page.accent)
        page.put(value, x=left + 116, room=page.right - left - 116, bold=True, skip=1.2)
    page.box(MARGIN, top, MARGIN + 100, top + 120, fill=page.tint(0.15), outline=page.accent)
    page.canvas.ellipse((MARGIN + 30, top + 22, MARGIN + 70, top + 66), fill=page.tint(0.5))
    page.canvas.chord((MARGIN + 14, top + 74, MARGIN + 86, top + 164), 180, 360, fill=page.tint(0.5))
    page.y = max(page.y, top + 128)
    _tick(page, MARGIN, options, ticked, page.right - MARGIN)
    return asked


LABEL = 0.9  # size of a label beside its value

# --- receipts -----------------------------------------------------------------------------------------------------


def _receipt(words: Words) -> tuple[dict[str, str], list[tuple[str, int, int]], Asked]:
    """Return what a receipt says, its items with number and price in cents, and the questions."""
    rng = words.rng
    names = words.some("product", rng.randint(3, 5))
    prices = words.numbers(len(names), 100, 2000, 5)
    items = [(name, rng.choice((1, 1, 2, 3)), cents) for name, cents in zip(names, prices, strict=True)]
    subtotal = sum(number * cents for _name, number, cents in items)
    tax = (subtotal * rng.choice((5, 8, 10)) + 50) // 100
    said = {
        "shop": words.company(),
        "street": words.street(),
        "date": words.date(),
        "time": words.time(),
        "subtotal": money(subtotal),
        "tax": money(tax),
        "total": money(subtotal + tax),
        "paid": rng.choice(("Cash", "Card", "Voucher")),
        "number": words.code(),
    }
    name, number, cents = rng.choice(items)
    asked = [
        ("receipt", "what is the total?", said["total"]),
        ("receipt", "how much is the tax?", said["tax"]),
        ("receipt", "what is the name of the shop?", said["shop"]),
        ("receipt", "what is the date?", said["date"]),
        ("receipt", f"what is the amount for {name.lower()}?", money(number * cents)),
        ("receipt", f"how many {name.lower()} were bought?", str(number)),
        ("receipt", "how was it paid?", said["paid"]),
    ]
    return said, items, asked


def _sums(page: Page, said: dict[str, str], left: float, last_scale: float):
    for name, key in (("Subtotal", "subtotal"), ("Tax", "tax"), ("TOTAL", "total")):
        bold, scale = key == "total", last_scale if key == "total" else 1.0
        page.write(page.right, page.y, said[key], 110, bold=bold, scale=scale, align="r")
        page.put(name, x=left, room=page.right - left - 115, bold=bold, scale=scale)


def receipt_till(page: Page, words: Words) -> Asked:
    said, items, asked = _receipt(words)
    middle = {"x": page.width / 2, "align": "m"}
    page.put(said["shop"], bold=True, scale=1.2, **middle)
    page.put(said["street"], **middle)
    page.put(f"{said['date']}  {said['time']}", skip=1.3, **middle)
    page.rule(page.y)
    page.y += page.step // 3
    for name, number, cents in items:
        page.write(page.right, page.y, money(number * cents), 90, align="r")
        page.put(f"{number} x {name}", room=page.right - MARGIN - 95)
    page.rule(page.y + page.step // 4)
    page.y += page.step // 2
    _sums(page, said, MARGIN, 1.2)
    page.put(f"{said['paid']}  -  Thank you!", **middle)
    return asked


def receipt_invoice(page: Page, words: Words) -> Asked:
    said, items, asked = _receipt(words)
    page.write(page.right, page.y, "INVOICE", 150, bold=True, scale=1.3, align="r", ink=page.accent)
    page.put(said["shop"], bold=True, scale=1.2, room=290)
    page.put(said["street"])
    page.put(f"Invoice {said['number']}", room=200)
    page.put(f"Date {said['date']}", skip=1.5)
    ends = (MARGIN + 60, page.right - 190, page.right - 100, page.right - 4)
    page.box(MARGIN, page.y - 3, page.right, page.y + page.step - 2, fill=page.tint(0.25))
    for row in [("Qty", "Item", "Price", "Amount")] + [
        (str(number), name, money(cents), money(number * cents)) for name, number, cents in items
    ]:
        bold = row[0] == "Qty"
        page.write(ends[0] - 16, page.y, row[0], 42, align="r", bold=bold)
        page.write(ends[0], page.y, row[1], ends[1] - ends[0] - 5, bold=bold)
        for end, cell in zip(ends[2:], row[2:], strict=True):
            page.write(end, page.y, cell, 84, align="r", bold=bold)
        page.y += page.step
    page.rule(page.y)
    page.y += page.step // 3
    _sums(page, said, page.width / 2, 1.0)
    page.put(f"Paid by: {said['paid']}")
    return asked


def receipt_bill(page: Page, words: Words) -> Asked:
    """The bill of a restaurant: dots lead from each item to its amount, the number of each stands in brackets."""
    said, items, asked = _receipt(words)
    page.box(5, 5, page.width - 6, 11, fill=page.accent)
    page.y += 4
    page.put(f"{said['time']} - Bill {said['number']}", x=page.right, align="r")
    page.put(said["shop"], scale=1.3, bold=True, skip=1.1)
    page.put(said["date"], skip=1.4)
    for name, number, cents in items:
        amount = page.write(page.right, page.y, money(number * cents), 90, align="r")
        item = page.write(MARGIN, page.y, f"{name} ({number})", page.right - MARGIN - 100)
        for x in range(round(item[2]) + 8, round(amount[0]) - 6, 6):
            page.box(x, page.y + page.size - 2, x + 1, page.y + page.size - 1, fill=page.ink)
        page.y += page.step
    page.y += page.step // 3
    _sums(page, said, page.width / 2 - 40, 1.1)
    page.put(said["paid"], x=page.right, align="r")
    return asked


# Kind -> split -> template -> the function that draws it, and the width of its page.
PAPERS = {
    "letter": {
        "train": {"block": (letter_block, 512), "memo": (letter_memo, 480)},
        "test": {"email": (letter_email, 500)},
    },
    "form": {"train": {"lines": (form_lines, 440), "boxes": (form_boxes, 480)}, "test": {"card": (form_card, 460)}},
    "receipt": {
        "train": {"till": (receipt_till, 320), "invoice": (receipt_invoice, 480)},
        "test": {"bill": (receipt_bill, 340)},
    },
}
