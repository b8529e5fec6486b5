"""Pictures beside words: a contact sheet to look at, and a report as one HTML file with its pictures inside."""

import base64
import html
import io
import math

from PIL import Image, ImageDraw, ImageFont

from paddlemix.errors import ImageError
from paddlemix.processors.image import open_image

from .features import written

_STYLE = (
    "body{font:15px/1.4 sans-serif;margin:2em;max-width:75em}table{border-collapse:collapse}td,th{padding:.2em .8em;"
    "text-align:left;border-bottom:1px solid #ddd}figure{display:inline-block;vertical-align:top;margin:.4em;width:11em}"
    "figure img{max-width:11em;max-height:11em}figcaption{font-size:12px;overflow-wrap:anywhere}"
    "figure.wide{width:22em}figure.wide img{max-width:22em;max-height:22em}figcaption{white-space:pre-wrap}"
    ".right{color:#060}.wrong{color:#a00}.bar{background:#eee;width:20em}.bar div{background:#48c;height:1em}"
)
# A page shows what models and data sets say: nothing in it may run or be fetched.
_POLICY = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"


def thumbnail(source, side=160):
    """A small RGB copy of a picture, within a square of ``side`` pixels; grey where it cannot be read."""
    try:
        picture = open_image(source)
    except ImageError:
        return Image.new("RGB", (side, side), (200, 200, 200))
    picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    return picture


def contact_sheet(pictures, columns=5, side=200, heading=None):
    """One picture of many, each with a line of text below.

    Args:
        pictures: list of ``(anything that open_image takes, text)``.
        columns: pictures in a row, at most.
        side: of each, in pixels.
        heading: a line above all.

    Returns:
        PIL image of mode RGB.
    """
    columns = max(1, min(columns, len(pictures)))
    font, gap, line, top = ImageFont.load_default(13), 8, 18, 30 if heading else 8
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (gap + columns * (side + gap), top + rows * (side + line + gap)), (255, 255, 255))
    pencil = ImageDraw.Draw(sheet)
    if heading:
        pencil.text((gap, 7), _fitting(heading, pencil, font, sheet.width - 2 * gap), fill=(0, 0, 0), font=font)
    for i, (source, text) in enumerate(pictures):
        left, upper = gap + i % columns * (side + gap), top + i // columns * (side + line + gap)
        small = thumbnail(source, side)
        sheet.paste(small, (left + (side - small.width) // 2, upper + (side - small.height) // 2))
        pencil.text((left, upper + side + 2), _fitting(text, pencil, font, side), fill=(60, 60, 60), font=font)
    return sheet


def _fitting(text, pencil, font, width):
    """``text`` with its middle left out where it is too wide; the built-in font has Latin letters alone."""
    text = " ".join(str(text).split())[:300].encode("latin-1", "replace").decode("latin-1")
    whole = text
    while len(text) > 4 and pencil.textlength(text, font=font) > width:
        keep = (len(text) - 2) // 2
        text = f"{whole[:keep]}..{whole[len(whole) - keep :]}"
    return text


class Report:
    """Sections of an HTML page, put together as they are known."""

    def __init__(self, title):
        self.title, self._parts = title, []

    def heading(self, text):
        """A heading."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def table(self, header, rows):
        """A table of texts and numbers; nothing where there are no rows."""
        cells = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in header)
        lines = [f"<tr>{cells}</tr>"]
        for row in rows:
            lines.append("<tr>" + "".join(f"<td>{html.escape(_shown(cell))}</td>" for cell in row) + "</tr>")
        self._parts.append(f"<table>{''.join(lines)}</table>")

    def pictures(self, pictures):
        """A row of ``(picture, text, right, wrong or None)``."""
        for source, text, good in pictures:
            self._figure([thumbnail(source)], text, good)

    def examples(self, examples):
        """As :meth:`pictures`, larger, with a list of PIL pictures each."""
        for found, text, good in examples:
            self._figure(found, text, good, " class=wide")

    def _figure(self, found, text, good, kind=""):
        shown = []
        for picture in found:
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=80)
            shown.append(f'<img src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode("ascii")}" alt="">')
        colour = {True: "right", False: "wrong", None: ""}[good]
        caption = f'<figcaption class="{colour}">{html.escape(text)}</figcaption>'
        self._parts.append(f"<figure{kind}>{''.join(shown)}{caption}</figure>")

    def bars(self, rows):
        """A bar a line, of ``(name, share from 0 to 1, text)``."""
        lines = []
        for name, share, text in rows:
            width = 100 * min(1.0, max(0.0, float(share)))
            bar = f'<div class="bar"><div style="width:{width:.1f}%"></div></div>'
            lines.append(f"<tr><td>{html.escape(str(name))}</td><td>{bar}</td><td>{html.escape(str(text))}</td></tr>")
        self._parts.append(f"<table>{''.join(lines)}</table>")

    def write(self, path, scores, settings):
        """Write the page, scores and settings first, whole or not at all."""
        parts, self._parts = self._parts, []
        self.table(("score", ""), scores.items())
        self.table(("setting", ""), settings.items())
        head = f"<!doctype html><html><head><meta charset='utf-8'>{_POLICY}<title>{html.escape(self.title)}</title>"
        head += f"<style>{_STYLE}</style></head>"
        body = f"<body><h1>{html.escape(self.title)}</h1>{''.join(self._parts)}{''.join(parts)}</body></html>\n"
        self._parts = parts
        with written(str(path)) as file:
            file.write((head + body).encode("utf-8", "replace"))


def _shown(value):
    return f"{value:.4f}" if isinstance(value, float) else str(value)
