"""lingraft: graft what a language model can do in one language onto another.

The names below are imported when they are first used, so that `import lingraft` stays light: arithmetic on adapters
needs neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lingraft import _peft_hook

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from lingraft.adapter import Adapter as Adapter
    from lingraft.algebra import transfer as transfer
    from lingraft.backbones import Backbone as Backbone
    from lingraft.config import load_experiment as load_experiment
    from lingraft.divergence import Divergence as Divergence
    from lingraft.evaluation import evaluate as evaluate
    from lingraft.live import grafted as grafted
    from lingraft.merging import Combination as Combination
    from lingraft.merging import Graft as Graft
    from lingraft.runner import run as run
    from lingraft.training import train as train

_HOMES = {
    "Adapter": "adapter",
    "Backbone": "backbones",
    "Combination": "merging",
    "Divergence": "divergence",
    "Graft": "merging",
    "evaluate": "evaluation",
    "grafted": "live",
    "load_experiment": "config",
    "run": "runner",
    "train": "training",
    "transfer": "algebra",
}

__all__ = [
    "Adapter",
    "Backbone",
    "Combination",
    "Divergence",
    "Graft",
    "__version__",
    "evaluate",
    "grafted",
    "load_experiment",
    "run",
    "train",
    "transfer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lingraft' has no attribute '{name}'")
    return getattr(import_module(f"lingraft.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


_peft_hook.install()
