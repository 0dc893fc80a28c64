"""Pages of HTML that need no other file: tables, figures and preformatted text."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import Environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("page.html")
Mark = Literal["", "right", "wrong", "asked", "junk"]


@dataclass(frozen=True)
class PageFigure:
    """A picture with a caption.

    Attributes:
        caption: Text below the picture.
        image: Encoded image, PNG or JPEG; None shows "no picture" in its place.
        mark: How the picture is framed: green if right, red if wrong, blue if it is asked for;
            junk is pale.
    """

    caption: str
    image: bytes | None
    mark: Mark = ""

    @property
    def source(self) -> str | None:
        """The image as a data URL; None without an image."""
        if self.image is None:
            return None
        kind = "png" if self.image.startswith(b"\x89PNG") else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(self.image).decode()}"


@dataclass(frozen=True)
class PageSection:
    """A part of a page; empty fields are left out.

    Attributes:
        heading: Heading of the section.
        table: Rows of a table; the first row holds the names of the columns.
        text: Paragraph below the table.
        figures: Figures, one below the other.
        thumbnails: Figures that are small and stand side by side.
        preformatted: Text that keeps its spaces and line breaks.
    """

    heading: str = ""
    table: Sequence[Sequence[str]] = ()
    text: str = ""
    figures: Sequence[PageFigure] = ()
    thumbnails: Sequence[PageFigure] = ()
    preformatted: str = ""


def png(figure: "Figure", **options: Any) -> bytes:  # noqa: ANN401, those of ``savefig``
    """Return a figure of matplotlib as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **options)
    return buffer.getvalue()


def render_page(title: str, sections: Sequence[PageSection]) -> str:
    """Return a page of HTML; markup in the texts is escaped."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(title=title, sections=sections)
