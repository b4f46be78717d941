"""The command line: verbs, their options, and exit codes. A verb's code is imported when the verb is used."""

import functools
import importlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from lingraft import __version__, processes
from lingraft.commands import terminals
from lingraft.errors import Interrupted, LingraftError, UserError, nearest
from lingraft.escaping import printable

EPILOG = "Exit codes: 0 done, 1 failed or interrupted, 2 a mistake in the request. docs/command-line.md says more."
FOLDER = click.Path(path_type=Path)


class _Lines(click.Group):
    """Verbs in the order of the work, not of the alphabet; a misspelt one is told the nearest."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.get_command(ctx, args[0])
        near = nearest(args[0], self.commands)
        if known is None and near and not args[0].startswith("-"):
            raise click.UsageError(f"No such command '{args[0]}'. Did you mean '{near}'?", ctx)
        return super().resolve_command(ctx, args)


class _Root(_Lines):
    """All of the command line: mistakes in it are JSON where JSON is asked for, and a reader may stop reading."""

    def main(self, args: Sequence[str] | None = None, *others: Any, standalone_mode: bool = True, **more: Any) -> Any:
        terminals.prepare()
        given = list(sys.argv[1:] if args is None else args)
        options = given[: given.index("--")] if "--" in given else given
        try:
            if not standalone_mode or "--json" not in options:
                return super().main(args, *others, standalone_mode=standalone_mode, **more)
            sys.exit(_asked_in_json(lambda: super(_Root, self).main(args, *others, standalone_mode=False, **more)))
        except BrokenPipeError:
            if not standalone_mode:
                raise
            terminals.stop_writing()
            sys.exit(1)


def _asked_in_json(run: Callable[[], Any]) -> int:
    """Runs the command line; what click has to say against it is JSON."""
    try:
        code = run()
    except click.ClickException as error:
        ctx = getattr(error, "ctx", None)
        path = ctx.command_path if ctx is not None else "lingraft"
        known = UserError(error.format_message() or "nothing was asked for", remedy=f"see {path} --help")
        click.echo(terminals.json_text(known.as_dict()))
        return known.exit_code
    return code if isinstance(code, int) else 0


def _values(name: str) -> Callable[[click.Context, click.Parameter, str], Any]:
    """Completes a value; the module that knows how is imported by a shell that asks."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> Any:
        return getattr(importlib.import_module("lingraft.commands.completing"), name)(ctx, param, incomplete)

    return complete


@click.group(
    cls=_Root,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=EPILOG,
)
@click.version_option(__version__, prog_name="lingraft")
def main() -> None:
    """Graft what a language model can do in one language onto another.

    Train small adapters on a frozen model, merge them across languages (AdaMergeX), and compare honestly.
    Begin with: lingraft quickstart
    """


_LAUNCHED = ("quickstart", "run", "train", "evaluate")
"""Verbs that the processes of a launcher carry out together; of any other each would do all, in each other's way."""


def _check_alone(name: str) -> None:
    if processes.world() == 1:
        return
    with processes.said_once():
        raise UserError(
            f"'{name.replace('_', ' ')}' is for one process, and a launcher started {processes.world()} (RANK, WORLD_SIZE)",
            remedy=f"run it without the launcher; {', '.join(_LAUNCHED)} are for several",
        )


def verb(function: Callable[..., Any]) -> Callable[..., None]:
    """Gives a verb `--json` and `--debug`, and turns errors into one clear message and an exit code."""

    @click.option("--json", "as_json", is_flag=True, help="Print the result, or the error, as JSON.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(function)
    def wrapped(as_json: bool, debug: bool, **options: Any) -> None:
        try:
            _messages()
            _heed_sigterm()
            if function.__name__ not in _LAUNCHED:
                _check_alone(function.__name__)
            result = function(as_json=as_json, **options)
            if as_json and result is not None:
                click.echo(terminals.json_text(result, 2))
        except LingraftError as error:
            _fail(error, as_json, debug)
        except KeyboardInterrupt:
            _fail(
                Interrupted("interrupted", remedy="run the same command again: what was finished is kept"),
                as_json,
                debug,
            )
        except (click.ClickException, BrokenPipeError):
            raise
        except Exception as error:  # noqa: BLE001 - a bug: said in one line, the traceback kept for --debug
            known = LingraftError(
                f"unexpected {type(error).__name__}: {error}",
                remedy="run again with --debug and report the traceback",
            )
            known.__cause__ = error
            _fail(known, as_json, debug)

    return wrapped


def _heed_sigterm() -> None:
    """A polite end (SIGTERM) is one like Ctrl-C: it is said what was interrupted, and exit code 1."""

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # A second one ends it at once.
        raise KeyboardInterrupt

    alone = threading.current_thread() is threading.main_thread() and processes.world() == 1
    if alone and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        with suppress(ValueError, OSError):
            signal.signal(signal.SIGTERM, end)


def _messages() -> None:
    import logging
    import warnings

    class Shown(logging.Handler):
        """Writes where standard error is now: above what is drawn, while something is."""

        def emit(self, record: logging.LogRecord) -> None:
            with suppress(OSError, ValueError):
                click.echo(printable(record.getMessage()), err=True)

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if category.__module__.startswith("lingraft"):
            click.echo(f"warning: {printable(str(message))}", err=True)

    warnings.showwarning = show
    log = logging.getLogger("lingraft")
    if not log.handlers:
        log.addHandler(Shown())
        log.setLevel(logging.INFO)


def _fail(error: LingraftError, as_json: bool, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    if as_json:
        click.echo(terminals.json_text(error.as_dict()))
    else:
        click.echo(f"error: {error}", err=True)
    sys.exit(error.exit_code)


def _check_address(on: str, address: str | None) -> None:
    if address is not None and on != "ray":
        raise UserError(
            f"--ray-address {address} is of a Ray cluster, and steps would be made here", remedy="add --on ray"
        )


def _run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--store",
            help="Folder of finished steps, shared by runs, or a URL such as s3://bucket/folder.  [default: `store` beside --out]",
        ),
        click.option(
            "--ray-address",
            help="With --on ray: a running cluster, such as auto or host:6379.  [default: one is started here]",
        ),
        click.option(
            "--on", default="local", show_default=True, type=click.Choice(["local", "ray"]), help="Where to run."
        ),
        click.option(
            "--dry-run", is_flag=True, help="Say what would run, about how long, and what it needs; do nothing."
        ),
    ):
        function = option(function)
    return function


@main.command()
@click.option("--out", type=FOLDER, default=Path("runs/quickstart"), show_default=True)
@click.option("--short", is_flag=True, help="A few training steps only, to see that everything works.")
@_run_options
@verb
def quickstart(
    out: Path, short: bool, store: str | None, on: str, ray_address: str | None, dry_run: bool, as_json: bool
) -> Any:
    """The main job on a real model with bundled data: labels in English, adapters for three languages out."""
    from lingraft.commands import experiments

    if dry_run:
        _check_alone("quickstart --dry-run")
    _check_address(on, ray_address)
    recipe = Path(__file__).parent / "recipes" / "quickstart.yaml"
    where = experiments.Where(store, on, ray_address)
    return experiments.run_experiment(
        recipe, experiments.SHORT if short else (), None, out, where, as_json, dry_run=dry_run
    )


@main.command()
@click.argument("experiment", type=FOLDER, shell_complete=_values("experiments"))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=_values("overrides"))
@click.option("--data-dir", help="Upstream files of the data sets; 'bundled' for lingraft's own.")
@click.option("--out", type=FOLDER, help="Folder of the results.  [default: runs/<name>]")
@click.option(
    "--gpu",
    default="H100",
    show_default=True,
    type=click.Choice(["A100", "H100", "H200"]),
    help="With --dry-run and --export: for which GPU.",
)
@click.option(
    "--export", type=click.Choice(["slurm"]), help="Write the plan as Slurm's array jobs below --out, and run nothing."
)
@click.option(
    "--slurm",
    "slurm_settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="With --export: an option of sbatch, such as account=nlp, or gpu.partition=a100 for one sort of job. Repeated.",
)
@click.option(
    "--steps-per-task",
    default=8,
    show_default=True,
    type=click.IntRange(min=1),
    help="With --export: evaluations or merges that one task makes.",
)
@click.option(
    "--at-once", type=click.IntRange(min=1), help="With --export: tasks of an array at the same time, at most."
)
@click.option(
    "--max-array",
    default=1000,
    show_default=True,
    type=click.IntRange(min=1),
    help="With --export: tasks of an array, at most (MaxArraySize).",
)
@click.option(
    "--only",
    metavar="KEY[,KEY]...",
    help="Make these steps of the plan and nothing else; what they need must be finished.",
)
@_run_options
@verb
def run(
    experiment: Path,
    overrides: tuple[str, ...],
    data_dir: str | None,
    gpu: str,
    export: str | None,
    slurm_settings: tuple[str, ...],
    steps_per_task: int,
    at_once: int | None,
    max_array: int,
    only: str | None,
    out: Path | None,
    store: str | None,
    on: str,
    ray_address: str | None,
    dry_run: bool,
    as_json: bool,
) -> Any:
    """Carry out an experiment (YAML): train, choose λ, merge, evaluate, report. Run again, it goes on where it stopped."""
    from lingraft.commands import experiments

    if dry_run or export:
        _check_alone("run --export" if export else "run --dry-run")
    _check_address(on, ray_address)
    where = experiments.Where(store, on, ray_address, () if only is None else tuple(only.split(",")))
    options = None
    if slurm_settings and not export:
        raise UserError(
            "--slurm is of the jobs that --export writes", remedy="add --export slurm, or leave --slurm out"
        )
    if export:
        if dry_run or where.only or on != "local":
            raise UserError(
                "--export writes all steps that are left as jobs, and runs nothing",
                remedy="leave --dry-run, --only and --on out",
            )
        from lingraft.slurm import Options

        options = Options(slurm_settings, steps_per_task, at_once, max_array, device=gpu)
    return experiments.run_experiment(
        experiment, overrides, data_dir, out, where, as_json, dry_run=dry_run, device=gpu, export=options
    )


@main.command()
@click.argument("experiment", type=FOLDER, shell_complete=_values("experiments"))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=_values("overrides"))
@click.option("--data-dir", help="Upstream files of the data sets; 'bundled' for lingraft's own.")
@click.option("--store", help="Folder of finished steps, shared with runs, or a URL.  [default: runs/store]")
@verb
def tune(experiment: Path, overrides: tuple[str, ...], data_dir: str | None, store: str | None, as_json: bool) -> Any:
    """Try the weights of an experiment's methods on its development languages. No target's item is read."""
    from lingraft.commands import experiments

    return experiments.tune_experiment(experiment, overrides, data_dir, store, as_json)


def _model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--tasks", "tasks_file", type=FOLDER, help="YAML with your own tasks (a `tasks:` mapping)."),
        click.option("--data-dir", help="Folder of the data; 'bundled' for lingraft's own; absent: the hub."),
        click.option(
            "--dtype",
            default="bfloat16",
            show_default=True,
            type=click.Choice(["bfloat16", "float16", "float32"]),
        ),
        click.option("--device", default="auto", show_default=True),
        click.option(
            "--quantization",
            default="none",
            show_default=True,
            type=click.Choice(["none", "nf4", "int8"]),
            help="Base weights in 4 or 8 bits, on a GPU (bitsandbytes).",
        ),
        click.option(
            "--prompt",
            default="default",
            show_default=True,
            shell_complete=_values("prompts"),
            help="The task's wording: default, paper, xlt, xlt-adamergex.",
        ),
        click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with the model."),
        click.option("--revision", help="Commit of a hub model."),
        click.option(
            "--language", required=True, shell_complete=_values("languages"), help="Language code, such as sw."
        ),
        click.option(
            "--task",
            required=True,
            shell_complete=_values("tasks"),
            help="A task (lingraft tasks), or plain text: clm, mlm, prefix-lm, span-corruption.",
        ),
        click.option("--model", required=True, help="'demo', a folder, a .gguf file, or a hub id."),
    ):
        function = option(function)
    return function


def _source_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--missing",
            type=click.Choice(["error", "skip"]),
            help="What becomes of items without counterpart: an error, or they are left out.  [default: error]",
        ),
        click.option(
            "--source-data",
            type=FOLDER,
            help="File with the counterparts instead of the task's own: its rows in the source language (.jsonl, .tsv, .csv), "
            "with the items' ids.",
        ),
        click.option(
            "--source-language",
            shell_complete=_values("languages"),
            help="Of two languages: that of the items' counterparts, paired by id.  [default: the adapter's own, or en]",
        ),
    ):
        function = option(function)
    return function


@main.command()
@_model_options
@click.option("--text", help="For plain text: path of the text below --data-dir, with {language} in it.")
@click.option(
    "--adapter",
    default="lora",
    show_default=True,
    type=click.Choice(["lora", "ia3", "prefix", "bottleneck", "sparse"]),
    help="The adapter's structure; adapter.… values set the rest.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--start-from", type=FOLDER, shell_complete=_values("adapters"), help="An adapter to go on from.")
@click.option(
    "--beneath",
    type=FOLDER,
    shell_complete=_values("adapters"),
    multiple=True,
    help="An adapter that stays on the base, frozen, while this one is trained on top of it: a language adapter (MAD-X) or a "
    "sparse difference (LF-SFT). Repeated: the lowest first.",
)
@click.option(
    "--first-stage",
    type=FOLDER,
    shell_complete=_values("adapters"),
    help="A LoRA, on top of which a second stage is trained that reads two languages.",
)
@click.option(
    "--second",
    type=click.Choice(["lora", "concatenated", "fused", "fused-mt", "mixup"]),
    help="The second stage: plain LoRA, LoRA that reads both texts in one input, FLARE (fused), FLARE-MT with a translation "
    "encoder, or X-Mixup.  [default: fused]",
)
@_source_options
@click.option("--out", type=FOLDER, required=True)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@verb
def train(**options: Any) -> Any:
    """Train an adapter on a task's labels, or on plain text (--task clm, mlm, prefix-lm, span-corruption).

    With --first-stage: train a second stage on a task's labels in the target language (FLARE). The adapter that comes out has
    its first stage in it.

    KEY=VALUE sets training.…, adapter.…, reference.…, fusion.…, mixup.… or speed.… values, for example training.epochs=1.
    """
    from lingraft.commands import models

    return models.train_adapter(**options)


@main.command()
@_model_options
@click.option(
    "--adapter",
    type=FOLDER,
    shell_complete=_values("adapters"),
    multiple=True,
    help="Folder of an adapter; repeated: a stack, the lowest first (language adapter, then task adapter). Absent: the base model "
    "alone.",
)
@click.option("--split", default="test", show_default=True)
@click.option("--limit", type=click.IntRange(min=1), help="So many items, the same in every language.")
@click.option(
    "--scoring",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "first_token", "sequence", "generation"]),
    help="Candidates by their likelihood, or what the model writes.",
)
@click.option("--normalised", is_flag=True, help="Likelihood of a candidate's token, not of the whole (sequence).")
@click.option(
    "--max-length", type=click.IntRange(min=8), default=1024, show_default=True, help="Tokens of prompt and answer."
)
@_source_options
@click.option("--no-source", is_flag=True, help="Ask an adapter of two languages without counterparts, as plain LoRA.")
@click.option("--out", type=FOLDER, required=True)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@verb
def evaluate(**options: Any) -> Any:
    """Score a model, with or without an adapter: by label likelihood, or by what it writes.

    An adapter of two languages is asked with the items' counterparts in the source language, as it was trained.

    KEY=VALUE sets speed.compile, speed.attention or speed.kernels, which change how fast it is computed.
    """
    from lingraft.commands import models

    return models.evaluate_model(**options)


@main.command()
@click.option(
    "--target-ref",
    type=FOLDER,
    shell_complete=_values("adapters"),
    required=True,
    help="Reference adapter of the target language.",
)
@click.option(
    "--source-ref",
    type=FOLDER,
    shell_complete=_values("adapters"),
    required=True,
    help="Reference adapter of the source language.",
)
@click.option("--out", type=FOLDER, required=True)
@verb
def divergence(target_ref: Path, source_ref: Path, out: Path, as_json: bool) -> Any:
    """Save how two languages differ, once, to be grafted onto every task. Needs no base model."""
    from lingraft.commands import adapters

    return adapters.save_divergence(target_ref, source_ref, out, as_json)


@main.command()
@click.argument("adapters", nargs=-1, metavar="[ADAPTER=WEIGHT]...", shell_complete=_values("adapters"))
@click.option("--task", type=FOLDER, shell_complete=_values("adapters"), help="The task's adapter.")
@click.option(
    "--target-ref", type=FOLDER, shell_complete=_values("adapters"), help="Reference adapter of the target language."
)
@click.option(
    "--source-ref", type=FOLDER, shell_complete=_values("adapters"), help="Reference adapter of the source language."
)
@click.option(
    "--divergence",
    "divergence_dir",
    type=FOLDER,
    shell_complete=_values("adapters"),
    help="A saved divergence, instead of the two references.",
)
@click.option("--weight", type=float, help="λ: how much of the divergence is added.")
@click.option(
    "--weight-of",
    "rules",
    multiple=True,
    metavar="SITES=λ",
    help="A λ of their own for some sites: feed_forward=0, layer:0-5=0.3, 'layer:6-11&attention=1'. Later ones win.",
)
@click.option(
    "--method",
    type=click.Choice(["transfer", "cross", "arimerge", "arimerge-add", "linear", "cat", "ties", "dare", "knots"]),
    help="With --task: transfer, the structure's own rule; cross, the other kind's; arimerge, λT + (1 − λ)(R_t − R_s) as in Zhang "
    "et al. 2023, so that 1 is the task; arimerge-add, λT + (1 − λ)R_t. With ADAPTER=WEIGHT: linear, number by number; cat, "
    "effects added exactly; ties, dare, knots, whose weights multiply.  [default: transfer, or linear]",
)
@click.option(
    "--space",
    type=click.Choice(["factors", "product", "layer", "flat", "literal", "ratio", "inverse", "difference", "cross"]),
    help="Where it is merged. LoRA: factors (the paper's) or product (exact); prefix: layer, flat or literal.",
)
@click.option(
    "--modules",
    default="all",
    show_default=True,
    help="Which sites, the others stay the task's: names, roles, layers, with commas: q_proj,attention.value&layer:0-5",
)
@click.option("--out-rank", type=click.IntRange(min=1), help="Compress to this rank (LoRA, product space).")
@click.option("--floor", type=float, help="Least size of a denominator, where the rule divides.")
@click.option("--bound", type=float, help="Greatest size of a ratio, where the rule divides.")
@click.option("--rcond", type=float, help="Singular values below this share of the greatest count as zero.")
@click.option("--density", type=float, help="ties, knots: share of numbers kept.  [default: 0.2]")
@click.option("--drop", type=float, help="dare: share of numbers dropped.  [default: 0.9]")
@click.option("--seed", type=int, help="dare: draws what is dropped.  [default: 0]")
@click.option(
    "--verify",
    is_flag=True,
    help="Print ‖out − expected‖ / ‖expected‖ against float64 (of weight updates ΔW for LoRA); after --out-rank that is what "
    "the compression lost.",
)
@click.option("--out", type=FOLDER, required=True)
@verb
def merge(**options: Any) -> Any:
    """Graft a divergence onto a task, T + λ(R_t − R_s), or combine any number of adapters.

    Needs no base model; the result opens in PEFT. Heads come from the task's adapter, or the first one.
    """
    from lingraft.commands import adapters

    return adapters.merge_adapters(**options)


@main.command()
@click.argument("difference", type=FOLDER, metavar="PYTORCH_DIFF_OR_FOLDER")
@click.option("--out", type=FOLDER, required=True, help="The new adapter's folder.")
@click.option("--base", "model", help="Name of the base model, for PEFT.")
@click.option("--task-type", help="PEFT's name of the task, such as TOKEN_CLS.")
@verb
def convert(difference: Path, out: Path, model: str | None, task_type: str | None, as_json: bool) -> Any:
    """Make an adapter of a sparse difference of composable-sft (LT-SFT); nothing of the file is executed."""
    from lingraft.commands.converting import convert_difference

    return convert_difference(difference, out, model, task_type, as_json)


@main.command()
@click.argument("folders", nargs=-1, type=FOLDER, required=True, shell_complete=_values("adapters"))
@verb
def inspect(folders: tuple[Path, ...], as_json: bool) -> Any:
    """Show an adapter or divergence; of two adapters how alike they are, by layer; of more each with each."""
    from lingraft.commands import adapters

    return adapters.inspect_folders(folders, as_json)


@main.command()
@click.argument("run_dir", metavar="RUN", type=FOLDER, shell_complete=_values("runs"))
@click.option(
    "--beside",
    type=click.Choice(["paper"]),
    help="The AdaMergeX or FLARE paper's figures beside ours, where it has any.",
)
@click.option("--html", type=FOLDER, metavar="FILE", help="Write all of it as one page that needs no network, too.")
@verb
def report(run_dir: Path, beside: str | None, html: Path | None, as_json: bool) -> Any:
    """Show a run's results, and write them as Markdown, CSV and JSON into its folder; with --html as a page to look at."""
    from lingraft.commands import reporting

    return reporting.show_report(run_dir, as_json, beside=beside, html=html)


@main.command()
@click.argument("run_dir", metavar="RUN", type=FOLDER, shell_complete=_values("runs"))
@click.option("--once", is_flag=True, help="Say how it stands, and end.")
@verb
def watch(run_dir: Path, once: bool, as_json: bool) -> Any:
    """Show a running experiment: its steps, the time left, the losses. Ctrl-C ends the watching, not the run.

    RUN is the --out folder of `lingraft run`, of one process or of several. --json says how it stands, once.
    Exit code 1 where the run has failed, was interrupted or was killed.
    """
    from lingraft.commands import following

    return following.watch_run(run_dir, once, as_json)


@main.group(cls=_Lines)
def store() -> None:
    """Look into a store of finished steps, verify it, clean it up."""


STORE = click.argument("where", metavar="[STORE]", default="runs/store")


@store.command("ls")
@STORE
@click.option("--kind", help="Steps of this kind only, such as train.")
@verb
def store_ls(where: str, kind: str | None, as_json: bool) -> Any:
    """List the finished steps of STORE, a folder or a URL.  [default: runs/store]"""
    from lingraft.commands import storing

    return storing.list_store(where, kind, as_json)


@store.command("verify")
@STORE
@click.option("--repair", is_flag=True, help="Set damaged steps aside, so that they are made anew.")
@verb
def store_verify(where: str, repair: bool, as_json: bool) -> Any:
    """Read everything in STORE and compare it with its hashes; exit code 1 where something damaged is left."""
    from lingraft.commands import storing

    found, well = storing.verify_store(where, repair, as_json)
    if as_json:
        click.echo(terminals.json_text(found, 2))
    if not well:
        sys.exit(1)


@store.command("gc")
@STORE
@click.option(
    "--keep",
    type=FOLDER,
    shell_complete=_values("runs"),
    multiple=True,
    metavar="RUN",
    help="A run's folder; repeated. Finished steps that none of these runs needs are removed, too. Without it no finished step is.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be removed; remove nothing.")
@verb
def store_gc(where: str, keep: tuple[Path, ...], dry_run: bool, as_json: bool) -> Any:
    """Remove what was left in STORE by runs that were interrupted, and what was set aside; never what is being made."""
    from lingraft.commands import storing

    return storing.collect_garbage(where, keep, dry_run, as_json)


@main.command()
@click.argument("folder", metavar="ADAPTER", type=FOLDER, shell_complete=_values("adapters"))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private/--public", default=True, show_default=True, help="Who sees a repository that is new.")
@click.option("--revision", help="Branch to push to.  [default: main]")
@click.option("--message", help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="Say what would be pushed, and what speaks against it; push nothing.")
@verb
def push(**options: Any) -> Any:
    """Put an adapter on the Hugging Face hub, with its model card."""
    from lingraft.commands import publishing

    return publishing.push_adapter(**options)


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@verb
def completion(shell: str, as_json: bool) -> Any:
    """Print what makes SHELL complete verbs, options, and values such as tasks, languages, adapters and runs.

    \b
    bash:  lingraft completion bash > ~/.local/share/bash-completion/completions/lingraft
    zsh:   lingraft completion zsh > ~/.zfunc/_lingraft      (~/.zshrc: fpath+=~/.zfunc; autoload -U compinit; compinit)
    fish:  lingraft completion fish > ~/.config/fish/completions/lingraft.fish

    Make the folder first, and start the shell anew.
    """
    from lingraft.commands import completing

    return completing.show_script(shell, as_json)


@main.command()
@verb
def tasks(as_json: bool) -> Any:
    """List the tasks."""
    from lingraft.commands import listings

    return listings.list_tasks(as_json)


@main.command()
@verb
def methods(as_json: bool) -> Any:
    """List the methods an experiment can compare."""
    from lingraft.commands import listings

    return listings.list_methods(as_json)


@main.command()
@verb
def schema(as_json: bool) -> Any:
    """Print the JSON schema of an experiment."""
    from lingraft.config import Experiment

    click.echo(terminals.json_text(Experiment.model_json_schema(), 2))


if __name__ == "__main__":
    main()
