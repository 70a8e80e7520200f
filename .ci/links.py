"""Every external link of the README and the pages, one a line. `--ask` asks each, which takes the internet."""

import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXTS = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples/README.md"]
# An address may hold parentheses, in pairs, as the identifiers of Elsevier's older papers do.
LINK = re.compile(r"https?://(?:[^\s()<>`\"']|\([^\s()]*\))+")


def external() -> list[tuple[str, str]]:
    """(file, address) of each."""
    return [
        (text.relative_to(ROOT).as_posix(), address.rstrip(".,;:"))
        for text in TEXTS
        for address in LINK.findall(text.read_text(encoding="utf-8"))
    ]


def answer(address: str) -> int:
    """The status; publishers answer 403 to programs, which is an answer."""
    request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "Mozilla/5.0 (link check)"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


if __name__ == "__main__":
    ask, gone = "--ask" in sys.argv, 0
    for file, address in external():
        status = answer(address) if ask else None
        gone += status in (0, 404, 410)
        print(*([] if status is None else [status]), file, address)
    sys.exit(bool(gone))
