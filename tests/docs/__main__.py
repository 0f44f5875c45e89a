"""Makes the pages and pictures that are generated."""

from __future__ import annotations

from tests.benchmarks.chart import pairs_chart, peers_chart
from tests.docs.flags_page import flags_page
from tests.docs.pictures import DOCS, commands, resumed

GENERATED = {
    "flags.md": flags_page,
    "resumed.svg": resumed,
    "commands.svg": commands,
    "speed.svg": lambda: pairs_chart((DOCS / "speed.md").read_text()),
    "peers.svg": lambda: peers_chart((DOCS / "speed.md").read_text()),
}

if __name__ == "__main__":
    for name, made in GENERATED.items():
        (DOCS / name).write_text(made())
