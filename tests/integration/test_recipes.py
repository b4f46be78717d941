"""Every recipe, end to end: random models of two layers, a dozen made-up items a split, all that a recipe compares."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lingraft.cli import main
from lingraft.config import load_experiment
from tests.conftest import save_tiny_model
from tests.integration.tiny_data import PARALLEL, write_all

ROOT = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix()
    for folder in ("adamergex", "gemma3-270m")
    for path in (ROOT / folder).glob("*.yaml")
)
ARCHITECTURES = {
    "NousResearch/Llama-2-7b-hf": "llama",
    "FacebookAI/xlm-roberta-base": "xlm-roberta",
    "google-t5/t5-base": "t5",
    "google/mt5-base": "mt5",
    "demo": "gemma3_text",
}
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "gemma3_text": {"max_position_embeddings": 2048, "head_dim": 8, "sliding_window": 64},
}
TARGETS = {"xcopa": "[sw, th]", "xnli": "[fr, th]", "mgsm": "[sw, th]", "xquad": "[de, th]", "xlsum": "[sw, th]"}
"""Two targets of every task of the paper."""
METRICS = {"xquad": "exact match", "xquad-tydiqa": "exact match", "xlsum": "ROUGE-L"}
FIGURES = {"exact match": "exact_match", "ROUGE-L": "rouge_l", "accuracy": "accuracy"}

SECOND = [
    ("adamergex/llama2-lora", "mgsm"),
    ("adamergex/llama2-lora", "xlsum"),
    ("adamergex/llama2-lora", "xquad"),
    ("adamergex/llama2-ia3", "xnli"),
    ("adamergex/llama2-lora-references", "xlsum"),
    ("adamergex/llama2-lora-rule", "xquad"),
    ("adamergex/llama2-ia3-rule", "xquad"),
    ("adamergex/llama2-lora-sources", "xlsum"),
    ("adamergex/xlmr-prefix", "xquad"),
    ("adamergex/t5-lora", "xcopa"),
    ("adamergex/mt5-lora", "xlsum"),
]
QUICK = {
    ("adamergex/llama2-lora", "xcopa"),
    ("adamergex/llama2-lora-rule", "xquad"),
    ("adamergex/xlmr-lora", None),
    ("adamergex/t5-lora", None),
    ("gemma3-270m/mgsm", None),
}
"""Those that run with every change: the main comparison, an encoder, an encoder-decoder, extraction and generation."""
PAIRS = [(name, None) for name in RECIPES] + SECOND


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a model is made when it is first asked for."""
    return tmp_path_factory.mktemp("models")


def recipe(name: str) -> Path:
    return (ROOT / name).with_suffix(".yaml")


def overrides(name: str, task: str | None, models: Path) -> list[str]:
    """What makes a recipe small; everything that it is about stays."""
    asked = load_experiment(recipe(name), [] if task is None else [f"task={task}"])
    architecture = ARCHITECTURES[asked.backbone.model]
    folder = models / architecture
    if not folder.exists():
        save_tiny_model(folder, architecture, **CHANGES.get(architecture, {}))
    length = 384 if architecture in ("xlm-roberta", "t5", "mt5") else 640
    changed = [
        *([] if task is None else [f"task={task}"]),
        f"backbone={{model: '{folder}', dtype: float32, device: cpu}}",
        "training.epochs=0.5",
        "training.batch_size=4",
        f"training.max_length={length}",
        "selection.weights=[0.5]",
        "selection.limit=3",
        "evaluation.limit=4",
        "evaluation.new_tokens=6",
    ]
    if asked.protocol == "paper":
        changed.append(f"targets={TARGETS[asked.task]}")
    if asked.task == "xquad":
        changed.append("selection.weight=0.5")  # It has no validation items to choose on.
    if asked.reference_training is not None:
        changed += [
            "reference_training.epochs=0.5",
            "reference_training.batch_size=4",
            f"reference_training.max_length={length}",
        ]
    if not asked.reference.labelled:
        small = {"segment_tokens": 48, "max_segments": 6}
        changed += [f"reference.{key}={value}" for key, value in {"hub": "null", "text": PARALLEL, **small}.items()]
    return changed


def lingraft(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def done(*words: object) -> Result:
    result = lingraft(*words)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
