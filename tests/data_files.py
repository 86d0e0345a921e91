"""The files of files/layouts/, and the reviews in them."""

import re
from pathlib import Path

LAYOUTS = Path(__file__).parent / "files" / "layouts"
SUBJECTS = re.split(
    ", ",
    "red fox, blue garden, green island, quick desert, slow library, old bridge, young kitchen, warm river, "
    "cold castle, bright village, dark valley, heavy teacher, light window, gentle theatre, rough mountain, "
    "silent market, loud harbour, simple city, clever painter, brave forest, calm ocean, eager engine, "
    "fancy station, jolly museum",
)
TEXTS = [f"the {name} was a {('bore', 'joy')[n % 2]} to see , take {n}" for n, name in enumerate(SUBJECTS)]
WORDS = ("negative", "positive")
