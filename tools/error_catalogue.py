"""Every error and warning of lingraft with what to do about it, read from the source by its syntax tree: nothing is imported.

`python tools/error_catalogue.py` prints the page; the documentation's build calls `markdown`.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src" / "lingraft"
GROUPS: tuple[tuple[str, str, str], ...] = (
    ("The command line", "Options, arguments, folders of a request.", "cli commands errors"),
    (
        "Experiments and settings",
        "What a YAML file or `key=value` says.",
        "config methods prompts roles languages plan",
    ),
    (
        "Data and tasks",
        "Files and data sets that are read, items, labels, answers.",
        "tasks answers predictions metrics reading checking selecting significance",
    ),
    (
        "Base models",
        "Finding and loading a model, and what its architecture allows.",
        "locating backbones serving encoding transduction likelihood generation causal heads speeding translation costs "
        "architectures caching protocols",
    ),
    (
        "Adapters and merging",
        "Adapter folders, whether they fit together, and how they are combined.",
        "adapter algebra divergence families fitting layouts merging stacks tensors structures atlas composable unpickling "
        "attaching live modules prefixes differences lanes cards",
    ),
    ("Two languages fused", "FLARE, X-Mixup, source states.", "fusion"),
    (
        "Training and evaluating",
        "What happens while a model computes.",
        "training stepping losses batching packing lottery evaluation checkpoints memory dropping rows",
    ),
    ("Running experiments", "Steps, runs, reports.", "runner execution session schedule manifests report journal"),
    ("The store", "Finished steps, on a disk or behind a URL.", "store remote leases digests replacing"),
    ("Several processes and clusters", "Launchers, Ray.", "processes workers"),
    ("Slurm", "Plans written as job arrays.", "slurm"),
)
INTERNAL = {
    "AlreadyMade": "the runner takes it for a finished step: nobody is told",
    "DamagedCheckpoint": "the training sets the checkpoint aside, warns, and begins anew",
}
"""Classes that no user sees, and why."""
SAID = {
    "suggestion": "the message names the nearest known word, or all of them",
    "_nearest": "the message names the nearest known word, or all of them",
}
"""What functions say that make a part of a message from what is known only then."""


@dataclass(frozen=True)
class Entry:
    """An error or a warning.

    Attributes:
        what: The message; what is filled in stands as ‹name›.
        remedy: What to do; empty: it does not say.
        kind: The class.
        exit_code: Of a command that ends with it; None: a warning.
        module: Where it comes from.
        line: Its line there.
    """

    what: str
    remedy: str
    kind: str
    exit_code: int | None
    module: str
    line: int


@dataclass
class _Module:
    name: str
    tree: ast.Module
    constants: dict[str, ast.expr] = field(default_factory=dict)
    calls: list[tuple[ast.FunctionDef | None, ast.Call]] = field(default_factory=list)
    imports: set[tuple[str, str]] = field(default_factory=set)


@cache
def entries(source: Path = SOURCE) -> tuple[Entry, ...]:
    """All errors and warnings, by module and line."""
    classes = _classes(ast.parse((source / "errors.py").read_text(encoding="utf-8")))
    modules = [_module(path, source) for path in sorted(source.rglob("*.py"))]
    for module in modules:
        # Classes that modules derive for themselves.
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and module.name != "errors":
                bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
                if bases:
                    classes[node.name] = classes[bases[0]]
    found: list[Entry] = []
    for module in modules:
        for owner, call in module.calls:
            name = _called(call)
            if name in classes and name not in INTERNAL and (owner is None or owner.name != "_again"):
                found += _errors(call, owner, module, modules, classes)
            elif (
                name == "ValueError"
                and module.name == "config"
                and owner is not None
                and owner.decorator_list
                and call.args
            ):
                # What a setting's own check says becomes a ConfigError.
                remedy = _render(module.constants["_SEE"], _Env(module, None))[0]
                texts = _render(call.args[0], _Env(module, owner))
                found += [Entry(text, remedy, "ConfigError", 2, module.name, call.lineno) for text in texts]
            elif name == "warn" and call.args:
                texts = _render(call.args[0], _Env(module, owner))
                found += [Entry(text, "", "warning", None, module.name, call.lineno) for text in texts]
    unique = {(e.what, e.remedy, e.kind, e.module): e for e in found if e.what.strip("‹›… ")}
    return tuple(sorted(unique.values(), key=lambda e: (e.module, e.line, e.what)))


def markdown(source: Path = SOURCE) -> str:
    """The page: errors by what one was doing, each with its remedy."""
    found = [entry for entry in entries(source) if not is_passed_on(entry)]
    lines = [
        "# Errors and what to do about them",
        "",
        "Every message says what is wrong, where, and what to do. Below are all of them, made from the source; what is filled in",
        "stands as ‹name›. Exit code 2 is a mistake in the request, 1 a failure of something that was rightly asked for. `--json`",
        "gives the same as `error`, `where`, `remedy` and `exit_code`, `--debug` the traceback.",
        "",
    ]
    left = list(found)
    for title, says, names in GROUPS:
        some = [e for e in left if e.module.split(".")[0] in names.split() and e.exit_code is not None]
        left = [e for e in left if e not in some]
        if some:
            lines += [f"## {title}", "", says, "", *_listed(some)]
    warned = [e for e in left if e.exit_code is None]
    rest = [e for e in left if e.exit_code is not None]
    if rest:
        lines += ["## Other", "", *_listed(rest)]
    if warned:
        lines += [
            "## Warnings",
            "",
            "The work goes on.",
            "",
            *(f"- {_plain(e.what)} <small>`lingraft.{e.module}`</small>" for e in warned),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def _listed(some: Sequence[Entry]) -> list[str]:
    lines: list[str] = []
    for entry in sorted(some, key=lambda e: (e.what.lstrip("‹'").lower(), e.module)):
        lines.append(f"- **{_plain(entry.what)}**<br>")
        if entry.remedy:
            lines.append(f"  To do: {_plain(entry.remedy)}<br>")
        lines.append(f"  <small>exit code {entry.exit_code} · {entry.kind} · `lingraft.{entry.module}`</small>")
    return [*lines, ""]


def _plain(text: str) -> str:
    """Text in Markdown, as text."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in "\\`*_[]{}#|":
        text = text.replace(sign, f"\\{sign}")
    return text


def _classes(tree: ast.Module) -> dict[str, tuple[int, str]]:
    """The classes of errors: their exit code and, where the class itself has one, their remedy."""
    found: dict[str, tuple[int, str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        base = next((found[b.id] for b in node.bases if isinstance(b, ast.Name) and b.id in found), (1, ""))
        code, remedy = base
        for inner in ast.walk(node):
            if isinstance(inner, ast.Assign) and getattr(inner.targets[0], "id", "") == "exit_code":
                code = int(ast.literal_eval(inner.value))
            if isinstance(inner, ast.keyword) and inner.arg == "remedy" and not isinstance(inner.value, ast.Name):
                remedy = _render(inner.value, _Env(_Module("errors", tree), None))[0]
        found[node.name] = (code, remedy)
    return found


def _module(path: Path, source: Path) -> _Module:
    parts = path.relative_to(source).with_suffix("").parts
    name = ".".join(part for part in parts if part != "__init__") or "lingraft"
    module = _Module(name, ast.parse(path.read_text(encoding="utf-8")))
    for node in module.tree.body:
        target = (
            node.targets[0]
            if isinstance(node, ast.Assign)
            else node.target
            if isinstance(node, ast.AnnAssign)
            else None
        )
        if isinstance(target, ast.Name) and isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            module.constants[target.id] = node.value
    module.calls = list(_calls(module.tree))
    for inner in ast.walk(module.tree):
        if isinstance(inner, ast.ImportFrom):
            module.imports |= {(inner.module or "", alias.name) for alias in inner.names}
    return module


def _calls(tree: ast.AST, owner: ast.FunctionDef | None = None) -> Iterator[tuple[ast.FunctionDef | None, ast.Call]]:
    """All calls with the function that they stand in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            yield owner, node
        yield from _calls(node, node if isinstance(node, ast.FunctionDef) else owner)


def _called(call: ast.Call) -> str:
    return (
        call.func.id
        if isinstance(call.func, ast.Name)
        else call.func.attr
        if isinstance(call.func, ast.Attribute)
        else ""
    )


@dataclass
class _Env:
    """What names stand for where a message is made."""

    module: _Module
    owner: ast.FunctionDef | None
    values: Mapping[str, list[str]] = field(default_factory=dict)


def _errors(
    call: ast.Call,
    owner: ast.FunctionDef | None,
    module: _Module,
    modules: Sequence[_Module],
    classes: Mapping[str, tuple[int, str]],
) -> list[Entry]:
    """The errors that a call makes: of a function that is given the message, one for each of its own calls."""
    kind = _called(call)
    code, own = classes[kind]
    what = _what(call, kind)
    if what is None:
        return []
    remedy = next((k.value for k in call.keywords if k.arg == "remedy"), None)
    found: list[Entry] = []
    for env, line, where in _environments([n for n in (what, remedy) if n is not None], owner, module, modules):
        whats = _render(what, env)
        remedies = _render(remedy, env) if remedy is not None else [own]
        if kind == "MissingExtra":
            values = [_render(argument, env)[0] for argument in call.args]
            if len(values) == 2:
                whats = [f"this needs the package '{values[0]}', which is not installed"]
                remedies = [f"pip install 'lingraft[{values[1]}]'"]
        pairs = (
            list(zip(whats, remedies, strict=True))
            if len(whats) == len(remedies)
            else [(w, r) for w in whats for r in remedies]
        )
        found += [Entry(w, r, kind, code, where, line) for w, r in pairs]
    return found


def is_passed_on(entry: Entry) -> bool:
    """Whether the message is another's: what it says is known only then."""
    return re.sub("‹[^›]*›", "", entry.what).strip(" .:,;") == ""


def _what(call: ast.Call, kind: str) -> ast.expr | None:
    place = 2 if kind == "Damaged" else 0
    named = next((k.value for k in call.keywords if k.arg == "what"), None)
    positional = [argument for argument in call.args if not isinstance(argument, ast.Starred)]
    return positional[place] if len(positional) > place else named


def _environments(
    parts: Sequence[ast.expr], owner: ast.FunctionDef | None, module: _Module, modules: Sequence[_Module]
) -> list[tuple[_Env, int, str]]:
    """What a message's names stand for: rows of a table that is gone through, or what a helper's callers give it."""
    line = parts[0].lineno
    here = [(_Env(module, owner), line, module.name)]
    if owner is None:
        return here
    used = {n.id for part in parts for n in ast.walk(part) if isinstance(n, ast.Name)}
    rows = _rows(owner, module, used)
    if rows:
        return [(_Env(module, owner, row), line, module.name) for row in rows]
    names = [a.arg for a in (*owner.args.posonlyargs, *owner.args.args, *owner.args.kwonlyargs)]
    given = used & set(names)
    plain = [part for part in parts if isinstance(part, ast.Name) and part.id in given]
    if not plain and not (
        given and owner.name.lstrip("_").startswith(("refuse", "refused", "wrong", "error", "unreadable"))
    ):
        return here
    found: list[tuple[_Env, int, str]] = []
    for other in modules:
        if other is not module and not _imports(other, owner.name, module):
            continue
        for caller, call in other.calls:
            if _called(call) != owner.name or caller is owner:
                continue
            skipped = 1 if names[:1] in (["self"], ["cls"]) else 0
            bound = dict(zip(names[skipped:], call.args, strict=False)) | {
                k.arg: k.value for k in call.keywords if k.arg
            }
            env = _Env(other, caller)
            values = _defaults(owner, module, given)
            values |= {name: _render(bound[name], env) for name in given if name in bound}
            found.append((_Env(module, owner, values), call.lineno, other.name))
    return found or here


def _defaults(owner: ast.FunctionDef, module: _Module, names: set[str]) -> dict[str, list[str]]:
    """What a helper takes where its caller says nothing."""
    arguments = [*owner.args.posonlyargs, *owner.args.args]
    pairs = [*zip(reversed(arguments), reversed(owner.args.defaults), strict=False)]
    pairs += [(a, d) for a, d in zip(owner.args.kwonlyargs, owner.args.kw_defaults, strict=True) if d is not None]
    return {a.arg: _render(d, _Env(module, None)) for a, d in pairs if a.arg in names}


def _imports(module: _Module, name: str, source: _Module) -> bool:
    return (f"lingraft.{source.name}", name) in module.imports


def _rows(owner: ast.FunctionDef, module: _Module, used: set[str]) -> list[dict[str, list[str]]]:
    """`for … , what, remedy in TABLE` and `what, remedy = TABLE[…]`: one environment for each row."""
    for node in ast.walk(owner):
        target = source = None
        if isinstance(node, ast.For):
            target, source = node.target, node.iter
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            target, source = node.targets[0], node.value.value
        if not isinstance(target, ast.Tuple) or source is None:
            continue
        names = [element.id if isinstance(element, ast.Name) else "" for element in target.elts]
        if not used & set(names):
            continue
        table = _tables(source, owner, module)
        rows = [row.elts for row in table if isinstance(row, ast.Tuple) and len(row.elts) == len(names)]
        if rows:
            env = _Env(module, None)
            return [{n: _render(cell, env) for n, cell in zip(names, row, strict=True) if n in used} for row in rows]
    return []


def _tables(node: ast.expr, owner: ast.FunctionDef, module: _Module) -> list[ast.expr]:
    """The rows of a table that is written down: a tuple, a list, a dictionary's values, sums of these."""
    if isinstance(node, ast.Tuple | ast.List):
        return list(node.elts)
    if isinstance(node, ast.Dict):
        return list(node.values)
    if isinstance(node, ast.BinOp):
        return _tables(node.left, owner, module) + _tables(node.right, owner, module)
    if isinstance(node, ast.IfExp):
        return _tables(node.body, owner, module)
    if isinstance(node, ast.Name):
        value = _assigned(node.id, owner) or module.constants.get(node.id)
        return _tables(value, owner, module) if value is not None else []
    return []


def _assigned(name: str, owner: ast.FunctionDef | None) -> ast.expr | None:
    """What a name is given in a function, where that happens once."""
    found = [
        node.value
        for node in (ast.walk(owner) if owner is not None else ())
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
    ]
    return found[0] if len(found) == 1 else None


def _render(node: ast.expr, env: _Env, depth: int = 0) -> list[str]:
    """The texts that an expression may be, with ‹name› for what is known only then."""
    if isinstance(node, ast.Constant):
        return [str(node.value) if node.value is not None else ""]
    if isinstance(node, ast.JoinedStr):
        texts = [""]
        for part in node.values:
            inner = part.value if isinstance(part, ast.FormattedValue) else part
            choices = _render(inner, env, depth + 1)
            choices = choices if len(choices) * len(texts) <= 4 else [_placeholder(inner)]
            texts = [text + choice for text in texts for choice in choices]
        return texts
    if isinstance(node, ast.IfExp):
        return list(dict.fromkeys([*_render(node.body, env, depth + 1), *_render(node.orelse, env, depth + 1)]))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in _render(node.left, env, depth + 1) for b in _render(node.right, env, depth + 1)][:4]
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
        return _render(node.values[0], env, depth + 1)
    if isinstance(node, ast.Call) and _called(node) in SAID:
        return [SAID[_called(node)]]
    if isinstance(node, ast.Name):
        if node.id in env.values:
            return env.values[node.id]
        value = _assigned(node.id, env.owner) or env.module.constants.get(node.id)
        if isinstance(value, ast.Constant | ast.JoinedStr | ast.IfExp | ast.Call) and depth < 5:
            texts = _render(value, env, depth + 1)
            if not isinstance(value, ast.Call) or _called(value) in SAID:
                return texts
    return [_placeholder(node)]


def _placeholder(node: ast.expr) -> str:
    """A name for what is filled in: the expression's own, as far as it has one."""
    if isinstance(node, ast.Name):
        return f"‹{node.id.strip('_')}›"
    if isinstance(node, ast.Attribute):
        return "‹type›" if node.attr == "__name__" else f"‹{node.attr.strip('_')}›"
    if isinstance(node, ast.Subscript | ast.Starred):
        return _placeholder(node.value)
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Attribute) and node.func.attr == "join" and node.args:
            return _placeholder(node.args[0])
        if node.args:
            return _placeholder(node.args[0])
        return _placeholder(node.func.value) if isinstance(node.func, ast.Attribute) else _placeholder(node.func)
    if isinstance(node, ast.GeneratorExp | ast.ListComp | ast.SetComp):
        return _placeholder(node.generators[0].iter)
    if isinstance(node, ast.BinOp):
        return _placeholder(node.left)
    if isinstance(node, ast.BoolOp):
        return _placeholder(node.values[0])
    return "‹…›"


if __name__ == "__main__":
    sys.stdout.write(markdown())
