"""Writes the table of presets in docs/export.md, between its two marks.

python tools/preset_docs.py            # writes docs/export.md
python tools/preset_docs.py --print    # on standard output
"""

import sys
from pathlib import Path

from snoopi_rt.export.presets.table import markdown

PAGE = Path(__file__).parents[1] / "docs" / "export.md"
MARKS = ("<!-- presets: python tools/preset_docs.py -->\n", "<!-- end of presets -->\n")


def page() -> str:
    """docs/export.md with the table of the presets."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    return f"{before}{MARKS[0]}\n{markdown()}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"


if __name__ == "__main__":
    if "--print" in sys.argv:
        print(page())
    else:
        PAGE.write_text(page(), encoding="utf-8")
