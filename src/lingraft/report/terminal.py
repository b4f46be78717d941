"""Results in the terminal, with rich."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lingraft.languages import name_of
from lingraft.report.tables import main_table, notes, percent, reference_table


def show(found: dict[str, Any], console: Console) -> None:
    """Prints the main table, the λ curves and the references' likeness."""
    header, rows = main_table(found)
    # The intervals go below their figures: a terminal is narrow.
    table = Table(
        title=escape(f"{found['name']}: accuracy, percent"), header_style="bold", title_justify="left", pad_edge=False
    )
    for column in header:
        table.add_column(escape(_heading(column)), justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(*(Text(cell.replace(" [", "\n[")) for cell in row))
    console.print(table)
    for note in notes(found):
        console.print(Text(f"  {note}"), style="dim")
    if found["selections"]:
        console.print(Text("\nλ on the development languages (gold log-likelihood, accuracy)"), style="bold")
        _curves(found, console)
    if found["references"]:
        header, rows = reference_table(found)
        table = Table(
            title="\nLikeness of the reference updates",
            header_style="bold",
            title_justify="left",
            pad_edge=False,
        )
        for column in header:
            table.add_column(column, justify="left" if column == "language" else "right")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)


def _heading(column: str) -> str:
    return name_of(column) if len(column) == 2 else column


def _curves(found: dict[str, Any], console: Console) -> None:
    for name, selection in found["selections"].items():
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
            figures = f"{point['gold_log_likelihood']:8.4f} {percent(point['accuracy']):>6}"
            console.print(Text(f"    {point['weight']:>5g} {figures}  {bar}{mark}"))


def lines(header: list[str], rows: list[list[str]], console: Console) -> None:
    """Prints a plain table."""
    table = Table(header_style="bold", pad_edge=False)
    for column in header:
        table.add_column(escape(column))
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
