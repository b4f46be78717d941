"""Results in the terminal, with rich."""

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lingraft.escaping import printable
from lingraft.report.tables import (
    METRICS,
    also_tables,
    average_tables,
    labelled,
    language_table,
    notes,
    percent,
    reference_table,
    weight_table,
)
from lingraft.report.tables import Table as Figures


def show(found: dict[str, Any], console: Console, published: Figures | None = None) -> None:
    """Prints the metric, the averages against Eng-FT, the λ curves and the references' likeness."""
    header, rows = language_table(found)
    # An interval goes below its figure, and is left out where the terminal is too narrow for it.
    if console.width < 24 + 14 * (len(header) - 1):
        rows = [[cell.split(" [")[0] for cell in row] for row in rows]
    _table(f"{found['name']}: {METRICS[found['metric']]}, percent", header, rows, console)
    for title, table in also_tables(found):
        _table(f"\n{title}, percent", *table, console)
    for table in average_tables(found):
        _table("\nLanguages together", *table, console)
    if published:
        _table("\nBeside the paper", *published, console)
    for note in notes(found):
        console.print(Text(f"· {printable(note)}"), style="dim")
    weights = weight_table(found)
    if weights[1]:
        _table("\nλ without labels", *weights, console)
    if labelled(found):
        console.print(
            Text("\nλ on the development languages (gold log-likelihood, accuracy where answers were compared)"),
            style="bold",
        )
        _curves(found, console)
    if found["references"]:
        _table("\nLikeness of the reference updates", *reference_table(found), console)


def _table(title: str, header: list[str], rows: list[list[str]], console: Console) -> None:
    table = Table(
        title=escape(printable(title)),
        title_style="bold",
        header_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for number, column in enumerate(header):
        table.add_column(escape(printable(column)), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell).replace(" [", "\n[")) for cell in row))
    console.print(table)


def show_tuning(found: dict[str, Any], titles: dict[str, str], console: Console) -> None:
    """Prints how every method's weights do on the development languages."""
    from lingraft.report.tuning import tuning_table  # Only a plan's figures need what plans are made with.

    header, rows = tuning_table(found, titles)
    _table("Development languages: gold log-likelihood, nats; differences with 95 % intervals", header, rows, console)


def show_cost(found: dict[str, Any], console: Console) -> None:
    """Prints what the steps to do would take on a GPU."""
    rows = [
        [kind, str(row["count"]), _amount(row["tokens"]), _amount(row["written"]), f"{row['gpu_hours']:.1f}"]
        for kind, row in found["steps"].items()
    ]
    lines(["to do", "steps", "tokens read", "tokens written", "GPU hours"], rows, console)
    console.print(
        f"on one {found['device']}, estimated: {found['gpu_hours']:.1f} GPU hours, {found['memory'] / 2**30:.1f} GiB of memory",
        highlight=False,
    )
    if found["unknown"]:
        console.print(
            printable(
                f"not fully reckoned, their data or a model's sizes are not known: {', '.join(found['unknown'])}"
            ),
            style="dim",
            markup=False,
        )


def _amount(number: float) -> str:
    """A number of tokens, short."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _curves(found: dict[str, Any], console: Console) -> None:
    for name, selection in labelled(found).items():
        console.print(Text(f"  {found['methods'][name]['title']}"))
        if not selection["curve"]:
            console.print(Text(f"    {selection['weight']:g}  as given"))
            continue
        values = [point["gold_log_likelihood"] for point in selection["curve"]]
        low, high = min(values), max(values)
        for point in selection["curve"]:
            share = (point["gold_log_likelihood"] - low) / (high - low) if high > low else 1.0
            bar = "█" * (1 + round(23 * share))
            mark = "  ← chosen" if point["weight"] == selection["weight"] else ""
            figures = f"{point['gold_log_likelihood']:8.4f} {percent(point.get('accuracy')):>6}"
            console.print(Text(f"    {point['weight']:>5g} {figures}  {bar}{mark}"))


def lines(header: list[str], rows: list[list[str]], console: Console) -> None:
    """Prints a plain table; what is in it may come out of anybody's files."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD)
    for column in header:
        table.add_column(escape(printable(column)))
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)
