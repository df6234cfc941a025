"""One HTML page with everything in it: no script, no address of another file."""

import base64
import html
from collections.abc import Iterable, Sequence

import numpy as np

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #8886; }
img { max-width: 100%; background: white; border: 1px solid #8884; border-radius: 4px; }
table { border-collapse: collapse; font-size: .9rem; } td, th { text-align: left; padding: .2rem .8rem .2rem 0;
vertical-align: top; border-bottom: 1px solid #8883; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
p.note { color: #777; font-size: .9rem; } .missing { border-left: 3px solid #d9a400; padding-left: .7rem; }
p.tokens { font-family: ui-monospace, monospace; font-size: .85rem; line-height: 1.7; white-space: pre-wrap; }
"""


class Page:
    """A report in sections.

    Args:
      title: of the page.
    """

    def __init__(self, title: str):
        self._title = title
        self._parts: list[str] = []
        self.pictures: dict[str, bytes] = {}

    def section(self, heading: str, *paragraphs: str) -> None:
        """Begins a section."""
        self._parts.append(f"<h2>{html.escape(heading)}</h2>")
        self._parts += [f"<p>{html.escape(text)}</p>" for text in paragraphs]

    def paragraph(self, text: str, kind: str = "") -> None:
        """Adds text; `kind` is "note" for small print, "missing" for what cannot be shown."""
        self._parts.append(f'<p class="{kind}">{html.escape(text)}</p>' if kind else f"<p>{html.escape(text)}</p>")

    def picture(self, name: str, png: bytes, meaning: str) -> None:
        """Adds a picture, with what it shows in words."""
        self.pictures[name] = png
        data = base64.b64encode(png).decode()
        self._parts.append(f'<p><img alt="{html.escape(meaning)}" src="data:image/png;base64,{data}"></p>')
        self.paragraph(meaning, "note")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str | int | float]]) -> None:
        """Adds a table; numbers are on the right."""
        lines = ["<table><tr>", *(f"<th>{html.escape(name)}</th>" for name in header), "</tr>"]
        for row in rows:
            lines.append("<tr>" + "".join(_cell(value) for value in row) + "</tr>")
        self._parts.append("".join([*lines, "</table>"]))

    def shaded(self, texts: Sequence[str], losses: np.ndarray) -> None:
        """Adds text whose tokens are the darker, the higher their loss."""
        most = max(float(np.nanmax(losses)) if np.isfinite(losses).any() else 0.0, 1e-9)
        spans = []
        for text, loss in zip(texts, losses, strict=True):
            share = 0.0 if np.isnan(loss) else max(0.0, float(loss)) / most
            title = "no prediction" if np.isnan(loss) else f"{loss:.2f} nats"
            style = f"background: rgba(230, 110, 60, {share:.2f})"
            spans.append(f'<span title="{title}" style="{style}">{html.escape(text)}</span>')
        self._parts.append(f'<p class="tokens">{"".join(spans)}</p>')

    def encode(self) -> bytes:
        """The page as UTF-8."""
        head = f'<meta charset="utf-8"><title>{html.escape(self._title)}</title><style>{_STYLE}</style>'
        head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # An icon of its own, or a browser asks the server for one.
        head += '<link rel="icon" href="data:,">'
        body = "\n".join([f"<h1>{html.escape(self._title)}</h1>", *self._parts])
        page = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
        return page.encode("utf-8", "replace")


def _cell(value: str | int | float) -> str:
    if isinstance(value, str):
        return f"<td>{html.escape(value)}</td>"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
    return f'<td class="number">{shown}</td>'
