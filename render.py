"""A report is a list of blocks; Markdown and one self-contained HTML page are two ways to write it."""

import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

import jinja2
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

import plots

TEMPLATE = Path(__file__).with_name("report_template.html")


@dataclass(frozen=True)
class Block:
    """A piece of a report: a heading (level 1 to 3), a text, a list (one item a row), a table or a picture."""

    kind: str
    text: str = ""  # the heading, the paragraph, or the caption
    level: int = 0
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    picture: str = ""  # an <svg> element
    file: str = ""  # the same picture as PNG, beside report.md


class Gallery:
    """Draws pictures into a folder, as PNG and as a block for the page."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix

    def __call__(self, name: str, figure: Figure, caption: str) -> Block:
        file = f"{self.prefix}{name}.png"
        plots.save_png(figure, self.folder / file)
        block = Block("picture", caption, picture=plots.to_svg(figure, self.prefix + name), file=file)
        plt.close(figure)
        return block


def markdown(blocks: list[Block]) -> str:
    """The blocks as Markdown."""
    parts = []
    for block in blocks:
        if block.kind == "heading":
            parts.append(f"{'#' * block.level} {block.text}")
        elif block.kind == "text":
            parts.append(block.text)
        elif block.kind == "list":
            parts.append("\n".join(f"- {row[0]}" for row in block.rows))
        elif block.kind == "picture":
            parts.append(f"![{block.text}]({quote(block.file)})")
        else:
            lines = [block.head, ("---",) * len(block.head), *block.rows]
            parts.append("\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines))
    return "\n\n".join(parts) + "\n"


def html(blocks: list[Block]) -> str:
    """The blocks as one page that needs no other file."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["marks"] = _marks
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(blocks=blocks)


def _marks(text: str) -> str:
    """Markdown's **bold** and `code` as HTML, everything else escaped."""
    escaped = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", escaped)
