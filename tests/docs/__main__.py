"""Makes the pages and pictures that are generated."""

from __future__ import annotations

from tests.docs.flags_page import flags_page
from tests.docs.pictures import DOCS, commands, resumed

GENERATED = {"flags.md": flags_page, "resumed.svg": resumed, "commands.svg": commands}

if __name__ == "__main__":
    for name, made in GENERATED.items():
        (DOCS / name).write_text(made())
