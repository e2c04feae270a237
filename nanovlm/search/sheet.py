"""What was found -> a picture to look at: the query, then the pictures with their scores, the best first."""

import io

from PIL import Image, ImageDraw, ImageFont, ImageOps

COLUMNS, SIDE, GAP, LINE = 5, 192, 12, 16


def draw_sheet(query: str, asked: Image.Image | None, found: list[tuple[Image.Image, str, float]]) -> bytes:
    """Draw pictures with their names and scores below the query, a text or the name of the picture `asked`, as PNG."""
    font = ImageFont.load_default(13)
    columns = min(COLUMNS, max(3, len(found)))
    rows, top = (len(found) + columns - 1) // columns, GAP + LINE + GAP + (SIDE + GAP if asked else 0)
    size = columns * (SIDE + GAP) + GAP, top + rows * (SIDE + 2 * LINE + GAP)
    sheet = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(sheet)
    canvas.text((GAP, GAP), cut(font, query, size[0] - 2 * GAP), fill="black", font=font)
    if asked is not None:
        sheet.paste(fit(asked), (GAP, GAP + LINE + GAP))
    for i, (image, name, score) in enumerate(found):
        x, y = GAP + i % columns * (SIDE + GAP), top + i // columns * (SIDE + 2 * LINE + GAP)
        sheet.paste(fit(image), (x, y))
        canvas.text((x, y + SIDE + 1), f"{i + 1}   {score:.4f}", fill=(0, 90, 160), font=font)
        canvas.text((x, y + SIDE + 1 + LINE), cut(font, name, SIDE), fill=(90, 90, 90), font=font)
    png = io.BytesIO()
    sheet.save(png, "PNG")
    return png.getvalue()


def fit(image: Image.Image) -> Image.Image:
    """Bring a picture into a square; a small one is enlarged so that its pixels are seen."""
    method = Image.Resampling.NEAREST if max(image.size) < SIDE else Image.Resampling.LANCZOS
    return ImageOps.pad(image, (SIDE, SIDE), method, color=(235, 235, 235))


def cut(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str, width: int) -> str:
    """Leave out the beginning of a text that is too wide."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    while font.getlength(shown) > width:
        shown = "..." + shown.removeprefix("...")[1:]
    return shown
