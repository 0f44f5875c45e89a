"""The description on a package index: README.md, whose links lead to the repository there.

`DIST_CONVERT_REPOSITORY` is the address of the repository, such as https://github.com/org/dist_convert; without it,
links stay as they are. All else is in pyproject.toml.
"""

import os
import re
from pathlib import Path

from setuptools import setup

readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
if address := os.environ.get("DIST_CONVERT_REPOSITORY"):
    readme = re.sub(r"(!\[[^]]*\])\((?!https?://|#)", rf"\1({address}/raw/HEAD/", readme)
    readme = re.sub(r"\]\((?!https?://|#)", f"]({address}/blob/HEAD/", readme)
setup(long_description=readme, long_description_content_type="text/markdown")
