"""What a page of a big run weighs, how long it takes to write, and how soon a browser has it: 1,000 cells, 100,000 predictions.

    python benchmarks/report_page.py            # writes benchmarks/results/report-page.json and .md
    python benchmarks/report_page.py --quick    # a small page, nothing written: shows only that all of it runs

The run is made up (every script, no model), the page is written by the library's own functions, and Chromium opens it from disk,
at its own speed and with the processor slowed down four times.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

sys.path.insert(0, str(common.HERE.parent))
LOOK = """() => new Promise((done) => {
  const [moved] = performance.getEntriesByType("navigation");
  const paint = performance.getEntriesByName("first-contentful-paint")[0];
  done({loaded: moved.domContentLoadedEventEnd, painted: paint ? paint.startTime : null, tasks: window.tasks || []});
})"""
WATCH = "window.tasks=[];new PerformanceObserver(l=>l.getEntries().forEach(e=>tasks.push(e.duration))).observe({type:'longtask'})"
FILTER = """([id, value]) => new Promise((done) => {
  const control = document.getElementById(id), began = performance.now();
  control.value = value;
  control.dispatchEvent(new Event("input", {bubbles: true}));
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - began)));
})"""
FILTERS = [
    ("ex-language", ""),
    ("ex-mode", "all"),
    ("ex-search", "health"),
    ("ex-mode", "pair"),
    ("ex-language", "ar"),
    ("ex-search", ""),
]


def written(contents: dict[str, Any], path: Path, rounds: int) -> dict[str, Any]:
    """Seconds to write the page, once unmeasured before, and its size."""
    from lingraft.replacing import write_text
    from lingraft.report.page.rendering import page

    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        write_text(path, page(contents))
        seconds.append(time.perf_counter() - began)
    return {"megabytes": path.stat().st_size / 1e6, "first_s": seconds[0], **common.spread(seconds[1:] or seconds)}


def opened(path: Path, slower: int, rounds: int) -> dict[str, float]:
    """Milliseconds in Chromium, medians: until the page is loaded and painted, the longest task, and a filter's change."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    found: list[dict[str, float]] = []
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(rounds + 1):
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            page = context.new_page()
            context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": slower})
            page.add_init_script(WATCH)
            page.goto(path.as_uri())
            page.wait_for_selector("#items li")
            page.wait_for_timeout(500)
            times = page.evaluate(LOOK)
            filters = [page.evaluate(FILTER, list(change)) for change in FILTERS]
            found.append(
                {
                    "loaded_ms": times["loaded"],
                    "painted_ms": times["painted"] or 0.0,
                    "longest_task_ms": max(times["tasks"], default=0.0),
                    "filter_median_ms": statistics.median(filters),
                    "filter_longest_ms": max(filters),
                }
            )
            context.close()
        browser.close()
    return {name: statistics.median(round_[name] for round_ in found[1:]) for name in found[0]}


def markdown(found: dict[str, Any]) -> str:
    """The result as a page of Markdown."""
    page, machine = found["written"], found["machine"]
    names = {
        "loaded_ms": "until DOMContentLoaded has ended",
        "painted_ms": "until the first content is painted",
        "longest_task_ms": "the longest task while opening",
        "filter_median_ms": "from a filter's change to the next frame, median of six",
        "filter_longest_ms": "the same, the longest of six",
    }
    rows = [
        [title, *(f"{found['opened'][slower][name]:.0f}" for slower in found["opened"])]
        for name, title in names.items()
    ]
    return "\n".join(
        [
            "# A big page",
            "",
            f"{found['cells']:,} cells, {found['predictions']:,} predictions in {found['languages']} languages: "
            f"{page['megabytes']:.1f} MB, written in {page['median_s']:.1f} s ({page['first_s']:.1f} s the first time).",
            "",
            common.table(
                [
                    "milliseconds, medians",
                    *(f"processor slowed {n} times" if n != "1" else "as it is" for n in found["opened"]),
                ],
                rows,
            ),
            "",
            f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; Python {machine['python']}; commit "
            f"{found['commit']}; {found['rounds']} rounds. `python benchmarks/report_page.py` measures it again.",
            "",
        ]
    )


def main() -> None:
    """Measures, and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small page; nothing is written")
    parser.add_argument("--threads", type=int, default=common.cores())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "report-page.json")
    options = parser.parse_args()
    from tests.unit import pages

    size = (4, 4, 10) if options.quick else (25, 40, 100)
    contents = pages.many(*size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.html"
        found = common.heading(
            options,
            cells=size[0] * size[1],
            predictions=size[0] * size[1] * size[2],
            languages=size[1],
            written=written(contents, path, options.rounds),
            opened={str(slower): opened(path, slower, options.rounds) for slower in (1, 4)},
        )
    print(markdown(found))
    if not options.quick:
        common.write(options.out, found)
        options.out.with_suffix(".md").write_text(markdown(found), encoding="utf-8")


if __name__ == "__main__":
    main()
