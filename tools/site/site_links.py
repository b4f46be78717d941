"""Where a file of the repository stands in the site, and links to it."""

import posixpath
import re
from collections.abc import Callable, Mapping
from urllib.parse import unquote

FENCE = re.compile(r"^(?: {0,3})(```+|~~~+)")
LINK = re.compile(r"(?<!\\)(\]\()([^()\s]+)((?:\s+\"[^\"]*\")?\))")
ALONE = "#-"
UNLINKED = re.compile(r"\[([^\]]*)\]\(#-\)")
ELSEWHERE = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|#|//)")


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Changes the lines of a Markdown text that are not in a fenced or indented block, and of these what is not in backticks."""
    lines, fence, blank = [], None, True
    for line in text.split("\n"):
        mark = FENCE.match(line)
        if fence is not None:
            fence = None if mark and line.strip().startswith(fence) and line.strip().strip(fence[0]) == "" else fence
            lines.append(line)
        elif mark:
            fence = mark.group(1)
            lines.append(line)
        elif blank and line.startswith("    ") and not line.lstrip().startswith(("-", "*", "|")):
            lines.append(line)
            continue  # an indented block goes on until a line is less indented
        else:
            lines.append(change(line))
        blank = not line.strip()
    return "\n".join(lines)


def relative(target: str, page: str) -> str:
    """The way from one page of the site to another."""
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


def mended(text: str, origin: str, page: str, places: Mapping[str, str], missing: Callable[[str, str], bool]) -> str:
    """A Markdown text whose relative links lead to the site's pages instead of the repository's files.

    Args:
        text: The page.
        origin: The file of the repository that it is, such as `docs/tasks.md`.
        page: Where it stands in the site, such as `tasks.md`.
        places: Where files and folders of the repository stand in the site.
        missing: Told of a link that leads to nothing that the site has, and of the file it means; says whether its text
            then stands alone.
    """

    def one(found: re.Match[str]) -> str:
        begin, link, end = found.groups()
        if ELSEWHERE.match(link):
            return found.group()
        path, hash_, anchor = link.partition("#")
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(origin), unquote(path)))
        if wanted in places:
            return f"{begin}{relative(places[wanted], page)}{hash_}{anchor}{end}"
        alone = missing(link, wanted)
        return f"]({ALONE})" if alone else found.group()

    return outside_code(text, lambda line: UNLINKED.sub(r"\1", LINK.sub(one, line)))
