"""Pages from the templates beside this file: one self-contained HTML file each, without network or
script, for phone and desktop, light and dark."""

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from bridgeblip import InputError
from bridgeblip.data.pictures import open_picture
from bridgeblip.data.questions import letter

THUMBNAIL_SIDE = 256  # pixels
THUMBNAIL_QUALITY = 70


def render(template: str, **values: Any) -> str:
    """Return a page. All text is escaped; a value that the template lacks is an error."""
    pages = Environment(
        loader=PackageLoader("bridgeblip.evidence"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {
        "flat": flat,
        "letter": letter,
        "number": number,
        "percent": "{:.1%}".format,
        "points": points,
        "svg": svg,
        "thumbnail": thumbnail,
    }
    return pages.get_template(f"{template}.html.jinja").render(values)


class Inline:
    """A page as a notebook shows it: within the notebook, with a button that downloads it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def _repr_html_(self) -> str:
        page = base64.b64encode(self.path.read_bytes()).decode()
        frame = escape(self.path.read_text(encoding="utf-8"))
        return (
            f'<a download="{self.path.name}" href="data:text/html;base64,{page}">'
            f"<button>download {self.path.name}</button></a>"
            f'<iframe srcdoc="{frame}" sandbox style="width:100%;height:40rem"></iframe>'
        )


def points(value: float) -> str:
    """A difference of shares, signed."""
    return f"{100 * value:+.1f}"


def number(value: Any) -> str:
    """A number with commas, or any other value as it stands."""
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def flat(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    """Name and value of all that facts hold, those of inner ones with the outer name before it."""
    return list(pd.json_normalize(facts, sep=": ").iloc[0].items())


def svg(drawing: Figure) -> str:
    """Return a figure as the URI of an SVG."""
    file = io.BytesIO()
    drawing.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def thumbnail(path: Path) -> str | None:
    """Return a picture as the URI of a small JPEG; None if it can't be read."""
    try:
        small = open_picture(path)
    except InputError:
        return None
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=THUMBNAIL_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
