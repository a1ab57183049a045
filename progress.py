"""How far a long computation is: a bar at a terminal, a line now and then in a log."""

import math
import sys

from tqdm.auto import tqdm

from config import say

EVERY_S = 15.0


class _Lines:
    """What tqdm writes, as lines of their own on stderr."""

    def write(self, text: str) -> None:
        if text := text.strip():
            say(text)

    def flush(self) -> None:
        pass


def progress_bar(total: int | None, what: str) -> tqdm:
    """A bar over `total` rows where stderr is a terminal; else a line every 15 s, so none for what is short."""
    if sys.stderr.isatty():
        return tqdm(total=total, desc=what, unit="row")
    pace = {"mininterval": EVERY_S, "maxinterval": math.inf, "delay": EVERY_S, "miniters": 1}
    return tqdm(total=total, desc=what, unit="row", file=_Lines(), ncols=100, ascii=True, **pace)
