"""Looks the installed packages up in the database of known vulnerabilities, with pip-audit; run by `make test-full`.

    python tools/audit.py [ANSWER]

Findings fail. A database that cannot be reached is said and passes: nothing is known then, and that is not a finding. ANSWER is a
file with an answer of pip-audit's to be judged instead.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = ("-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable")
UNREACHABLE = "not reachable: skipped"
_SIGNS = ("ConnectionError", "Max retries exceeded", "Failed to resolve", "timed out", "Timeout", "ProxyError")


def judged(answer: str, said: str) -> tuple[int, list[str]]:
    """What an answer of pip-audit's amounts to.

    A mirror of the package index without the database answers that it knows none of the packages: that is no clean bill.

    Args:
        answer: Its standard output, JSON.
        said: Its standard error.

    Returns:
        The exit code (0: nothing known, 1: findings, 2: it did not work) and lines to print.
    """
    try:
        packages: list[dict[str, Any]] = json.loads(answer)["dependencies"]
    except (ValueError, KeyError, TypeError):
        if any(sign in said for sign in _SIGNS):
            return 0, [f"audit: the database of vulnerabilities is {UNREACHABLE}"]
        return 2, ["audit: pip-audit did not work", *said.strip().splitlines()[-5:]]
    looked_up = [p for p in packages if "vulns" in p]
    if not looked_up:
        return 0, [f"audit: the database of vulnerabilities is {UNREACHABLE} (it answers for none of the packages)"]
    found = [
        f"{p['name']} {p.get('version')}: {v['id']}, mended in {', '.join(v.get('fix_versions') or ['no version yet'])}"
        for p in looked_up
        for v in p["vulns"]
    ]
    skipped = [p["name"] for p in packages if "vulns" not in p]
    said_of = [f"audit: not in the database: {', '.join(skipped)}"] if skipped else []
    if found:
        return 1, [*(f"audit: {line}" for line in found), *said_of]
    return 0, [f"audit: {len(looked_up)} packages, no known vulnerability", *said_of]


def main(arguments: list[str]) -> int:
    """Asks, judges and says."""
    if arguments:
        code, lines = judged(Path(arguments[0]).read_text(encoding="utf-8"), "")
    else:
        asked = subprocess.run([sys.executable, *COMMAND], capture_output=True, text=True, timeout=600, check=False)
        code, lines = judged(asked.stdout, asked.stderr)
    sys.stdout.write("\n".join(lines) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
