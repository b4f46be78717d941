"""Lets `PeftModel.from_pretrained` open lingraft's own kinds of adapters after a mere `import lingraft`.

PEFT looks methods up in tables that it fills while it is imported; `lingraft.modules` adds to them, but needs torch and
PEFT, which `import lingraft` must not import. So the addition waits until somebody imports PEFT, before or after
lingraft. Finding PEFT (`importlib.util.find_spec`) imports nothing, and a failure here is logged, never raised: PEFT has to
stay importable for those who want no adapter of ours.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec


class _Finder:
    """Finds PEFT where the finders after it find it, and has it loaded by `_Loader`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> "ModuleSpec | None":
        if name != "peft":
            return None
        # Only those after this one: two hooks that ask all others would ask each other for ever.
        others = [f for f in sys.meta_path[sys.meta_path.index(self) + 1 :] if hasattr(f, "find_spec")]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec and hasattr(spec.loader, "exec_module") and not isinstance(spec.loader, _Loader):
            spec.loader = _Loader(spec.loader)  # pyright: ignore[reportAttributeAccessIssue]
        return spec


class _Loader:
    """PEFT's own loader, and `_register` after it; steps aside for PEFT's own as soon as it runs."""

    own: Any = None

    def __init__(self, own: Any) -> None:
        self.own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self.own
        self.own.exec_module(module)
        _register()


def _register() -> None:
    try:
        modules = import_module("lingraft.modules")
        # It has no such function yet where it was imported first and is what imports PEFT; it registers at its end.
        if hasattr(modules, "register"):
            modules.register()
    except Exception as error:  # noqa: BLE001
        import logging

        logging.getLogger("lingraft").warning("PEFT was not told of lingraft's adapters: %s", error)


def install() -> None:
    """Tells PEFT of lingraft's adapters: now if it is imported, else as soon as it is."""
    if sys.modules.get("peft") is not None:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
