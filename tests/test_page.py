"""Pages of HTML are one file, and show text as text."""

import base64

from upreid_ray.page import PageFigure, PageSection, render_page

PNG = b"\x89PNG picture"


def test_markup_in_any_text_is_escaped():
    markup = "<b>&"
    figure = PageFigure(markup, None)
    section = PageSection(
        markup,
        table=[(markup,), (markup,)],
        text=markup,
        figures=[figure],
        thumbnails=[figure],
        preformatted=markup,
    )

    page = render_page(markup, [section])

    assert ("<b>" in page, page.count("&lt;b&gt;&amp;")) == (False, 9)


def test_pictures_are_inside_the_page():
    page = render_page("a", [PageSection(figures=[PageFigure("b", PNG)])])

    encoded = base64.b64encode(PNG).decode()
    assert f'<img src="data:image/png;base64,{encoded}"' in page
    assert "http" not in page


def test_a_figure_without_a_picture_says_so():
    page = render_page("a", [PageSection(thumbnails=[PageFigure("b", None)])])

    assert ("no picture" in page, "<img" in page) == (True, False)


def test_what_is_empty_is_left_out():
    page = render_page("a", [PageSection("heading")])

    body = page.split("<h1>", 1)[1]
    assert [tag for tag in ("<h2>", "<table>", "<p>", "<pre>", "<div") if tag in body] == [
        "<h2>"
    ]
