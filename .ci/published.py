"""The README and pyproject.toml as they are published: links absolute, and the project with its addresses.

`python .ci/published.py https://github.com/OWNER/NAME v1.2.3` rewrites both files in place. A release runs it: PyPI
shows the README without the files beside it, and only the repository that releases knows its address.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#:\s]+)(?=[)#])")


def absolute(text: str, address: str, tag: str) -> str:
    """Markdown whose links to files lead to the repository at this tag; pictures to the files themselves."""
    kinds = {True: "raw", False: "blob"}
    return LINK.sub(lambda m: f"{m[1]}{address}/{kinds[m[1][0] == '!']}/{tag}/{m[2]}", text)


def addressed(text: str, address: str, tag: str) -> str:
    """pyproject.toml with the project's addresses."""
    places = {
        "Repository": address,
        "Documentation": f"{address}/tree/{tag}/docs",
        "Changelog": f"{address}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }
    urls = "\n".join(f'{name} = "{place}"' for name, place in places.items())
    return text.replace("[project.scripts]", f"[project.urls]\n{urls}\n\n[project.scripts]", 1)


if __name__ == "__main__":
    for name, change in (("README.md", absolute), ("pyproject.toml", addressed)):
        file = ROOT / name
        file.write_text(change(file.read_text(encoding="utf-8"), *sys.argv[1:3]), encoding="utf-8")
