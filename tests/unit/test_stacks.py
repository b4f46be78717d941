"""Stacks and sparse differences: what is refused, what is said, LF-SFT against plain training, and trainings that were killed."""

import copy
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lingraft import attaching, lottery, training
from lingraft.adapter import Adapter, AdapterWarning
from lingraft.attaching import peft_config, tensors_of
from lingraft.backbones import Backbone
from lingraft.batching import steps_of, text_sequences
from lingraft.config import AdapterConfig, BackboneConfig, TrainingConfig
from lingraft.differences import trainable_weights
from lingraft.encoding import masked_sequences
from lingraft.errors import AdapterError, LingraftError, UserError
from lingraft.fusion.stages import SecondStage
from lingraft.heads import Head
from lingraft.locating import locate
from lingraft.modules.sparse import SparseLayer, parted
from lingraft.reading import of_items
from lingraft.stacks import is_stack, load_stack, parts_of, stack_digest
from lingraft.stepping import learning_rate, length_of, schedule
from lingraft.structures import fresh
from lingraft.tasks.items import Example
from lingraft.training import train
from lingraft.transduction import prefix_lm_sequences
from tests.conftest import save_tiny_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"tie_word_embeddings": True, "head_dim": 8}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "bert": ("bert", {}),
    "xlm-roberta": ("xlm-roberta", {}),
    "distilbert": ("distilbert", {}),
    "modernbert": ("modernbert", {}),
    "t5": ("t5", {}),
    "mt5": ("mt5", {"tie_word_embeddings": False}),
}
LANGUAGE = AdapterConfig(family="bottleneck", reduction=2, positions="madx", invertible=True)
TASK = AdapterConfig(family="bottleneck", reduction=4, positions="madx")
FAST = TrainingConfig(learning_rate=0.01, epochs=2, batch_size=4, clip=5, warmup=0)
STILL = TrainingConfig(epochs=0)
TWO = Head("classification", 2)
TEXTS = {
    "en": [f"the cat sat on the mat and saw the dog {'!' * n}" for n in range(8)],
    "sw": [f"paka alikaa juu ya mkeka akamwona mbwa {'?' * n}" for n in range(8)],
}
EXAMPLES = [
    Example(str(n), f"Text: {word}{'.' * n}\nTopic:", (" yes", " no"), n % 2, parts=(f"{word}{'.' * n}",))
    for n, word in enumerate(["cat", "dog", "mat", "hat", "sun", "fog", "ox", "ray"])
]


def opened(folder: Path, name: str, dtype: str = "float32") -> Backbone:
    """A tiny model, made where it is not there yet."""
    architecture, changes = MODELS[name]
    if not (folder / name).exists():
        save_tiny_model(folder / name, architecture, **changes)
    return Backbone(locate(BackboneConfig(model=str(folder / name), dtype=dtype, device="cpu")))  # pyright: ignore[reportArgumentType]


def plain_text(backbone: Backbone, language: str) -> list[Any]:
    """Language modelling on sentences of a language."""
    segments = [backbone.encode(text) for text in TEXTS[language]]
    makers = {"decoder": lambda b, s: text_sequences(s), "encoder": masked_sequences}
    return list(makers.get(backbone.kind, prefix_lm_sequences)(backbone, segments))


def head(backbone: Backbone) -> Head | None:
    return TWO if backbone.kind == "encoder" else None


def labelled(backbone: Backbone) -> list[Any]:
    """The sequences of a task with two labels."""
    return list(of_items(backbone, EXAMPLES, FAST, head(backbone))[0])


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


class Trace:
    """All there is to a base model, to be compared with what there is later.

    Args:
        backbone: The base model; of an encoder its head for two labels is looked at as well.
    """

    def __init__(self, backbone: Backbone) -> None:
        models: list[Any] = [backbone.model]
        if backbone.kind == "encoder":
            models.append(backbone.headed(TWO).model)
        self.models = models
        self.before = [self._look(model) for model in models]

    @staticmethod
    def _look(model: Any) -> dict[str, Any]:
        modules = dict(model.named_modules())
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        return {
            "modules": {name: id(module) for name, module in modules.items()},
            "tensors": {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors.items()},
            "bytes": {n: t.detach().reshape(-1).view(torch.uint8).clone() for n, t in tensors.items() if t.numel()},
            "frozen": not any(p.requires_grad or p.grad is not None for p in model.parameters()),
            "asleep": not any(module.training for module in modules.values()),
            "flags": {n: m.sparse for n, m in modules.items() if isinstance(m, nn.Embedding)},
            "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules.items()},
            "tensor hooks": {n: len(getattr(t, "_post_accumulate_grad_hooks", None) or ()) for n, t in tensors.items()},
            "notes": sorted(model.__dict__),
            "config": model.config.to_dict(),
            "kept": (modules, tensors),  # Alive, so that no other object gets its number.
        }

    def check(self) -> None:
        """Makes sure that the base is the one it was: the same objects, and the same bits in them."""
        for model, before in zip(self.models, self.before, strict=True):
            now = self._look(model)
            assert now["frozen"] and now["asleep"]
            for what in before.keys() - {"kept", "bytes"}:
                assert now[what] == before[what], what
            changed = [n for n, bits in before["bytes"].items() if not torch.equal(bits, now["bytes"][n])]
            assert not changed


# What is refused, and what is said. One base, adapters of every kind on it that have learned nothing.


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return opened(tmp_path_factory.mktemp("base"), "tied")


@pytest.fixture(scope="module")
def place(base: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters on one base, and a LoRA on another."""
    folder = tmp_path_factory.mktemp("adapters")
    sparse = AdapterConfig(family="sparse", entries=50)
    texts = plain_text(base, "en")

    def write(name: str, config: AdapterConfig, backbone: Backbone = base, beneath: Sequence[str] = ()) -> None:
        below = load_stack([folder / one for one in beneath])
        train(backbone, texts, made(folder / name), adapter=config, training=STILL, beneath=below)

    write("en", LANGUAGE)
    write("sw", LANGUAGE)
    write("task", TASK, beneath=["en"])
    write("alone", TASK)
    write("lora", AdapterConfig(rank=2))
    write("prefix", AdapterConfig(family="prefix", tokens=2))
    write("sft-en", sparse)
    write("sft-sw", sparse)
    write("sft-task", sparse, beneath=["sft-en"])
    write("both", LANGUAGE, beneath=["sft-en"])
    write("top", TASK, beneath=["sft-en", "both"])
    save_tiny_model(folder / "model", "llama", tie_word_embeddings=True, rope_theta=5000.0)
    write("other", TASK, Backbone(locate(BackboneConfig(model=str(folder / "model"), dtype="float32", device="cpu"))))
    (folder / "second").mkdir()
    first = Adapter.load(folder / "lora")
    stage = SecondStage(first, "lora", None, None, "sw", form="alone", source="en")
    train(base, texts, folder / "second", adapter=AdapterConfig(rank=2), training=STILL, second=stage)
    return folder


def test_a_stack_folder_gives_its_parts_in_order(place: Path) -> None:
    assert is_stack(place / "en") and not is_stack(place / "en/bottleneck") and not is_stack(place / "task")
    assert parts_of(place / "en") == [place / "en/invertible", place / "en/bottleneck"]
    found = load_stack([place / "sw", place / "task"])
    assert [one.path for one in found] == [place / "sw/invertible", place / "sw/bottleneck", place / "task"]
    assert load_stack([]) == ()
    noted = found[-1].sidecar["beneath"]
    assert [note["structure"] for note in noted] == ["invertible", "bottleneck"]


def test_the_digest_of_a_stack_is_that_of_its_numbers(place: Path, tmp_path: Path) -> None:
    # Two trainings of nothing, from one seed.
    assert stack_digest(place / "en") == stack_digest(place / "sw")
    for part in ("invertible", "bottleneck"):
        shutil.copytree(place / "en", tmp_path / part)
        path = tmp_path / part / part / "adapter_model.safetensors"
        changed = bytearray(path.read_bytes())
        changed[-4] ^= 1
        (tmp_path / part / "metrics.jsonl").write_text("{}\n")
        assert stack_digest(tmp_path / part) == stack_digest(place / "en")
        path.write_bytes(bytes(changed))
    assert (
        len({stack_digest(folder) for folder in (place / "en", tmp_path / "invertible", tmp_path / "bottleneck")}) == 3
    )


@pytest.mark.parametrize(
    "parts",
    [
        ["../x"], ["..", "invertible"], ["/tmp"], ["invertible/../../x"], "invertible", [], None, {}, 7, [1], [None],
        ["bottleneck", 3], [["invertible"]], [{"invertible": 1}], ["metrics"],
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_note_of_a_stack(place: Path, tmp_path: Path, parts: Any) -> None:
    shutil.copytree(place / "en", tmp_path / "en")
    shutil.copytree(place / "en/bottleneck", tmp_path / "x")  # Where `../x` would lead.
    note = json.loads((tmp_path / "en/lingraft.json").read_text())
    (tmp_path / "en/lingraft.json").write_text(json.dumps({**note, "parts": parts}))
    for look in (parts_of, stack_digest, lambda folder: load_stack([folder])):
        with pytest.raises(AdapterError, match="parts of this stack") as caught:
            look(tmp_path / "en")
        assert "lingraft.json" in (caught.value.where or "")


def test_parts_that_are_missing(place: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        load_stack([tmp_path / "none"])
    assert str(tmp_path / "none") in str(caught.value)
    shutil.copytree(place / "en", tmp_path / "en")
    shutil.rmtree(tmp_path / "en/invertible")
    for look in (lambda folder: load_stack([folder]), stack_digest):
        with pytest.raises(LingraftError) as caught:
            look(tmp_path / "en")
        assert "invertible" in str(caught.value)


@pytest.mark.parametrize(
    "stack", ["en", "sw task", "en task", "alone", "sft-en", "sft-sw sft-task", "sft-sw both", "sft-en both top"]
)
def test_a_stack_like_the_one_in_training_is_taken_without_a_word(place: Path, stack: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_stack([place / name for name in stack.split()])


@pytest.mark.parametrize(
    ("stack", "then", "now"),
    [
        ("task", "invertible, bottleneck", "nothing"),
        ("sft-en task", "invertible, bottleneck", "sparse"),
        ("en alone", "nothing", "invertible, bottleneck"),
        ("en/bottleneck task", "invertible, bottleneck", "bottleneck"),
        ("sft-task", "sparse", "nothing"),
        ("both", "sparse", "invertible"),
        ("task en", "nothing", "bottleneck, invertible"),
        ("en sw", "nothing", "invertible, bottleneck, invertible"),
    ],
)
def test_a_stack_unlike_the_one_in_training_is_warned_of(place: Path, stack: str, then: str, now: str) -> None:
    with pytest.warns(AdapterWarning, match=f"trained on top of {then}, and stands on {now}$"):
        load_stack([place / name for name in stack.split()])


def refused(compute: Callable[[], Any], said: str) -> str:
    """The one message that a mistake is answered with: what, and where or what to do."""
    with pytest.raises(LingraftError) as caught:
        compute()
    assert isinstance(caught.value, UserError) and said in caught.value.what, caught.value
    assert caught.value.remedy or caught.value.where
    return str(caught.value)


SPARSE = AdapterConfig(family="sparse", entries=9)


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (AdapterConfig(family="sparse", entries=10**7), {}, "10000000 entries shall change, and the modules have"),
        (AdapterConfig(family="sparse", entries=9000, modules=("q_proj", "k_proj")), {}, "the modules have 3072"),
        (SPARSE, {"training": TrainingConfig(weight_decay=0.1)}, "without weight decay"),
        (SPARSE, {"start_from": "sft-en"}, "a sparse difference starts anew"),
        (LANGUAGE, {"start_from": "alone"}, "a language adapter with a coupling starts anew"),
        (SPARSE, {"beneath": ["en"]}, "only others of its kind can be beneath"),
        (SPARSE, {"beneath": ["lora"]}, "only others of its kind can be beneath"),
        (LANGUAGE, {"beneath": ["en"]}, "a coupling behind the embeddings already"),
        (TASK, {"beneath": ["prefix"]}, "nothing can stand on a prefix"),
        (TASK, {"beneath": ["prefix", "en"]}, "nothing can stand on a prefix"),
        (AdapterConfig(family="prefix"), {"beneath": ["prefix"]}, "nothing can stand on a prefix"),
        (TASK, {"beneath": ["second"]}, "a second stage stands on its first one alone"),
        (TASK, {"beneath": ["en", "second"]}, "a second stage stands on its first one alone"),
        (AdapterConfig(rank=2), {"beneath": ["en"], "second": True}, "a second stage stands on its first one alone"),
        (TASK, {"beneath": ["other"]}, "belongs to another base model"),
        (TASK, {"beneath": ["en", "other"]}, "different base models"),
        (TASK, {"beneath": ["en", "sft-en"]}, "cannot stand on bottleneck"),
        (SPARSE.model_copy(update={"modules": ("no_such",)}), {}, "no_such"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::lingraft.adapter.AdapterWarning")
def test_what_cannot_be_trained_is_said_before_anything_is(
    base: Backbone, place: Path, tmp_path: Path, config: AdapterConfig, options: dict[str, Any], said: str
) -> None:
    trace, steps = Trace(base), []
    given = dict(options)
    # Given as they are, so that it is training that refuses what opening a stack would have refused, too.
    given["beneath"] = [Adapter.load(p) for name in options.get("beneath", ()) for p in parts_of(place / name)]
    if "start_from" in options:
        given["start_from"] = place / options["start_from"]
    if "second" in options:
        given["second"] = SecondStage(Adapter.load(place / "lora"), "lora", None, None, "sw", form="alone", source="en")
    watch = {"progress": lambda *step: steps.append(step)}
    refused(lambda: train(base, plain_text(base, "en"), tmp_path, adapter=config, **watch, **given), said)
    assert not steps and not list(tmp_path.rglob("*.safetensors"))
    trace.check()


@pytest.mark.parametrize(
    ("stack", "said"),
    [
        ("en sft-en", "cannot stand on bottleneck"),
        ("task sft-task", "cannot stand on bottleneck"),
        ("prefix task", "nothing can stand on a prefix"),
        ("en second", "a second stage stands on its first one alone"),
        ("second task", "a second stage stands on its first one alone"),
        ("en other", "different base models"),
    ],
)
@pytest.mark.filterwarnings("ignore::lingraft.adapter.AdapterWarning")
def test_what_cannot_stand_on_one_another(base: Backbone, place: Path, stack: str, said: str) -> None:
    trace = Trace(base)
    refused(lambda: load_stack([place / name for name in stack.split()]), said)
    parts = [Adapter.load(part) for name in stack.split() for part in parts_of(place / name)]
    refused(lambda: base.with_adapter(parts).__enter__(), said)
    trace.check()


def test_an_adapter_of_another_base_at_any_place(base: Backbone, place: Path) -> None:
    other = Adapter.load(place / "other")
    unnamed = [Adapter.load(part) for part in parts_of(place / "en")]
    refused(lambda: base.with_adapter(other).__enter__(), "belongs to another base model")
    refused(lambda: base.with_adapter([*unnamed, other]).__enter__(), "different base models")


def test_a_part_that_does_not_fit_leaves_the_base_as_it_was(base: Backbone, place: Path, tmp_path: Path) -> None:
    """Parts below are on the model already when the next one turns out not to fit."""
    trace = Trace(base)
    shutil.copytree(place / "task", tmp_path / "task")
    config = json.loads((tmp_path / "task/adapter_config.json").read_text())
    (tmp_path / "task/adapter_config.json").write_text(json.dumps({**config, "target_modules": ["no_such"]}))
    with pytest.raises(LingraftError), base.with_adapter(load_stack([place / "en", tmp_path / "task"])):
        pass
    trace.check()


def test_a_model_of_odd_width_takes_no_coupling(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "odd", "t5", d_model=33)
    backbone = Backbone(locate(BackboneConfig(model=str(tmp_path / "odd"), dtype="float32", device="cpu")))
    trace, texts = Trace(backbone), plain_text(backbone, "en")
    said = refused(lambda: train(backbone, texts, made(tmp_path / "a"), adapter=LANGUAGE, training=STILL), "even width")
    assert "33" in said and not list(tmp_path.joinpath("a").rglob("*.safetensors"))
    trace.check()
    without = LANGUAGE.model_copy(update={"invertible": False})
    train(backbone, texts, made(tmp_path / "b"), adapter=without, training=STILL)


@pytest.mark.parametrize("name", ["llama", "bert", "modernbert", "t5"])
def test_the_last_layer_is_left_out_of_every_stack_of_layers(tmp_path: Path, name: str) -> None:
    config = LANGUAGE.model_copy(update={"leave_out_last": True, "invertible": False})
    backbone = opened(tmp_path, name)
    kept, all_of_them = (
        set(fresh(backbone, one, 0, Head("masked_lm") if backbone.kind == "encoder" else None)[0]["target_modules"])
        for one in (config, config.model_copy(update={"leave_out_last": False}))
    )
    assert len(all_of_them) == 2 * len(kept) == (4 if name == "t5" else 2)
    assert all({"0"} == set(module.split(".")) & {"0", "1"} for module in kept if name != "t5")
    assert all(module.split(".")[2] == "0" for module in kept if name == "t5")
    one = {"llama": "num_hidden_layers", "bert": "num_hidden_layers", "modernbert": "num_hidden_layers"}
    sizes = {one[name]: 1} if name in one else {"num_layers": 1, "num_decoder_layers": 1}
    save_tiny_model(tmp_path / "one", MODELS[name][0], **{**MODELS[name][1], **sizes})
    single = Backbone(locate(BackboneConfig(model=str(tmp_path / "one"), dtype="float32", device="cpu")))
    texts = plain_text(single, "en")
    refused(lambda: train(single, texts, made(tmp_path / "a"), adapter=config, training=STILL), "no layer left")


# LF-SFT against plain training of whole weights.


def difference(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Indices and values by site."""
    adapter = Adapter.load(folder)
    found = {}
    for site in adapter.modules:
        tensors = adapter.site(site).tensors
        found[site] = (tensors["indices"], tensors["values"])
    return found


def start_values(model: Any, beneath: Sequence[Path] = ()) -> dict[str, torch.Tensor]:
    """The weights that may change, whole, with differences added in; by site, flat."""
    found = {s: w.parameter.detach().float().reshape(-1).clone() for s, w in trainable_weights(model).items()}
    for folder in beneath:
        for site, (indices, values) in difference(folder).items():
            found[site][torch.from_numpy(indices)] += torch.from_numpy(values)
    return found


def dense_model(model: Any, weights: Mapping[str, torch.Tensor]) -> tuple[Any, dict[str, nn.Parameter]]:
    """A plain copy of a model, its output embedding not tied, with these weights in it, and its parameters by site."""
    twin = copy.deepcopy(model)
    output = twin.get_output_embeddings() if hasattr(twin, "get_output_embeddings") else None
    if output is not None:
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
    found: dict[str, nn.Parameter] = {}
    for site, values in weights.items():
        module, kind = parted(site)
        old = getattr(twin.get_submodule(module), kind)
        new = nn.Parameter(values.view(old.shape).clone())
        for other in twin.modules():  # An encoder-decoder reads one table in two places.
            if other is not output and getattr(other, kind, None) is old:
                setattr(other, kind, new)
        found[site] = new
    return twin, found


def plain_loss(backbone: Backbone, model: Any, chosen: Sequence[Any]) -> torch.Tensor:
    """The mean cross-entropy, one example at a time."""
    total, count = torch.zeros(()), 0
    for one in chosen:
        if backbone.kind == "encoder":
            row = one.rows[0]
            more = {"token_type_ids": torch.tensor([row.types])} if model.config.model_type == "bert" else {}
            logits = model(input_ids=torch.tensor([row.ids]), **more).logits
            total, count = total + nn.functional.cross_entropy(logits, torch.tensor(one.target)), count + 1
            continue
        if backbone.kind == "decoder":
            ids = torch.tensor([one.ids])
            logits, wanted = model(input_ids=ids).logits[0, one.start - 1 : -1], ids[0, one.start :]
        else:
            wanted = torch.tensor(one.target)
            shifted = torch.tensor([[model.config.decoder_start_token_id, *one.target[:-1]]])
            logits = model(input_ids=torch.tensor([one.source]), decoder_input_ids=shifted).logits[0]
        total = total + nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")
        count += len(wanted)
    return total / count


def plain_training(
    backbone: Backbone,
    weights: Mapping[str, torch.Tensor],
    sequences: Sequence[Any],
    config: TrainingConfig,
    l1: float = 0.0,
    support: Mapping[str, np.ndarray] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Whole weights trained with AdamW, their gradients masked where there is a support.

    Returns:
        By site how much each entry moved, flat; and the head as it is at the end, by its names in the model.
    """
    model: Any = backbone.model if backbone.kind != "encoder" else backbone.headed(TWO).model
    size = sum(p.numel() for p in model.parameters())
    twin, parameters = dense_model(model, weights)
    heads: dict[str, nn.Parameter] = {}
    if backbone.kind == "encoder":
        initial = fresh(backbone, SPARSE, 0, TWO)[1]
        for path in backbone.headed(TWO).modules:
            for name, parameter in twin.get_submodule(path).named_parameters():
                parameter.data.copy_(initial[f"base_model.model.{path}.{name}"])
                heads[f"{path}.{name}"] = parameter.requires_grad_(True)
    masks = None
    if support is not None:
        masks = {site: torch.zeros(len(flat)) for site, flat in weights.items()}
        for site, indices in support.items():
            masks[site][torch.from_numpy(indices)] = 1
    everything = [*parameters.values(), *heads.values()]
    optimizer = torch.optim.AdamW(everything, lr=1.0, weight_decay=0)
    total = steps_of(len(sequences), config)
    twin.train()
    for step, indices in schedule([length_of(s) for s in sequences], config, 0, 0, total):
        optimizer.zero_grad()
        plain_loss(backbone, twin, [sequences[i] for i in indices]).backward()
        for site, parameter in parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            moved = parameter.detach().reshape(-1) - weights[site]
            gradient = gradient + (l1 / size * moved.sign()).view_as(gradient)
            parameter.grad = gradient if masks is None else gradient * masks[site].view_as(gradient)
        nn.utils.clip_grad_norm_(everything, config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, config)
        optimizer.step()
    moved = {site: p.detach().reshape(-1) - weights[site] for site, p in parameters.items()}
    return moved, {name: p.detach() for name, p in heads.items()}


def largest_by_sorting(values: Mapping[str, torch.Tensor], k: int) -> tuple[dict[str, set[int]], float]:
    """The K entries of greatest magnitude over all sites, by a plain stable sort, and the K-th's magnitude."""
    sites = sorted(values)
    flat = torch.cat([values[site].abs() for site in sites]).numpy()
    order = np.argsort(-flat, kind="stable")[:k]
    ends = np.cumsum([0, *(len(values[site]) for site in sites)])
    chosen = {s: {int(i - ends[n]) for i in order if ends[n] <= i < ends[n + 1]} for n, s in enumerate(sites)}
    return chosen, float(flat[order[-1]])


def check_chosen(found: Mapping[str, tuple[np.ndarray, Any]], scores: Mapping[str, torch.Tensor], k: int) -> None:
    """What was chosen is the K greatest; entries that are equally great to rounding may change places."""
    expected, threshold = largest_by_sorting(scores, k)
    assert sum(len(indices) for indices, _ in found.values()) == k
    swapped = 0
    for site in scores:
        mine = set(found[site][0].tolist()) if site in found else set()
        for index in mine ^ expected[site]:
            assert float(scores[site][index].abs()) == pytest.approx(threshold, rel=1e-3, abs=1e-6), (site, index)
            swapped += 1
    assert swapped <= k // 20


LEARNING = TrainingConfig(learning_rate=0.01, epochs=3, batch_size=4, clip=0.7, warmup=0.2)


@pytest.mark.parametrize("name", ["llama", "tied", "gemma3", "bert", "xlm-roberta", "t5"])
@pytest.mark.parametrize("beneath", [False, True], ids=["base", "beneath"])
def test_a_sparse_difference_is_that_of_plain_training(tmp_path: Path, name: str, beneath: bool) -> None:
    """Full fine-tuning, sorting, the weights put back, training with a mask."""
    backbone = opened(tmp_path, name)
    trace, k, l1 = Trace(backbone), 300, 20.0
    lower = [tmp_path / "en"] if beneath else []
    if beneath:
        config = AdapterConfig(family="sparse", entries=500)
        train(backbone, plain_text(backbone, "en"), made(lower[0]), adapter=config, training=FAST)
    sequences = labelled(backbone)
    config = AdapterConfig(family="sparse", entries=k, l1=l1, first_epochs=2)
    options: dict[str, Any] = {"adapter": config, "training": LEARNING, "beneath": load_stack(lower)}
    summary = train(backbone, sequences, made(tmp_path / "out"), head=head(backbone), **options)
    trace.check()

    first = LEARNING.model_copy(update={"epochs": 2})
    steps = [steps_of(len(sequences), config) for config in (first, LEARNING)]
    assert (summary["first"]["steps"], summary["steps"]) == (steps[0], sum(steps)) == (4, 10)
    weights = start_values(backbone.model if backbone.kind != "encoder" else backbone.headed(TWO).model, lower)
    whole, _ = plain_training(backbone, weights, sequences, first, l1)
    found = difference(tmp_path / "out")
    # The key's bias has no effect; what little gradient it has is noise, which Adam enlarges.
    noise = [s for s in whole if s.endswith(("key.bias", "k_proj.bias"))]
    assert not any(len(found[s][0]) for s in noise if s in found) or name in ("bert", "xlm-roberta")
    if not any(s in found for s in noise):
        check_chosen(found, {s: v for s, v in whole.items() if s not in noise}, k)
    assert sum(len(values) for _, values in found.values()) == k

    support = {site: indices for site, (indices, _) in found.items()}
    masked, heads = plain_training(backbone, weights, sequences, LEARNING, l1, support)
    assert {site for site, moved in masked.items() if moved.any()} <= set(found)
    for site, (indices, values) in found.items():
        if site not in noise:
            np.testing.assert_allclose(values, masked[site].numpy()[indices], rtol=0, atol=1e-5)
    assert max(float(np.abs(values).max()) for _, values in found.values()) > 0.01
    others = {n.removeprefix("base_model.model."): read() for n, read in Adapter.load(tmp_path / "out").others.items()}
    assert set(others) == set(heads)
    for path, value in heads.items():
        np.testing.assert_allclose(others[path], value.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["tied", "bert", "mt5"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_entries_are_chosen_by_summed_gradients_at_the_start(tmp_path: Path, name: str, dtype: str) -> None:
    backbone = opened(tmp_path, name, dtype)
    trace, k, sequences = Trace(backbone), 200, labelled(backbone)
    config = AdapterConfig(family="sparse", entries=k, select="gradient", first_epochs=1.5)
    options: dict[str, Any] = {"adapter": config, "training": LEARNING, "head": head(backbone)}
    summary = train(backbone, sequences, made(tmp_path / "out"), **options)
    trace.check()
    first = LEARNING.model_copy(update={"epochs": 1.5})
    steps = steps_of(len(sequences), first)
    assert summary["first"]["steps"] == steps == 3

    model: Any = backbone.model if backbone.kind != "encoder" else backbone.headed(TWO).model
    weights = start_values(model)
    twin, parameters = dense_model(model.float() if dtype == "bfloat16" else model, weights)
    if backbone.kind == "encoder":
        initial = fresh(backbone, SPARSE, 0, TWO)[1]
        for path in backbone.headed(TWO).modules:
            for n, parameter in twin.get_submodule(path).named_parameters():
                parameter.data.copy_(initial[f"base_model.model.{path}.{n}"])
    sums = {site: torch.zeros(len(flat)) for site, flat in weights.items()}
    for _, indices in schedule([length_of(s) for s in sequences], first, 0, 0, steps):
        twin.zero_grad()
        plain_loss(backbone, twin, [sequences[i] for i in indices]).backward()
        for site, parameter in parameters.items():
            sums[site] += 0 if parameter.grad is None else parameter.grad.reshape(-1).abs()
    found = difference(tmp_path / "out")
    if dtype == "float32":
        check_chosen(found, sums, k)
    else:  # Gradients in eight bits: nearly the same entries, none of them small.
        expected, threshold = largest_by_sorting(sums, k)
        mine = {(site, int(i)) for site, (indices, _) in found.items() for i in indices}
        assert len(mine) == k and len(mine & {(s, i) for s, chosen in expected.items() for i in chosen}) > 0.8 * k
        assert min(float(sums[site][i]) for site, i in mine) > threshold / 2


@pytest.mark.parametrize("name", [*MODELS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_k_entries_change_and_none_of_norms_and_the_output_embedding(tmp_path: Path, name: str, dtype: str) -> None:
    backbone = opened(tmp_path, name, dtype)
    trace, k = Trace(backbone), 700
    base = {n: t.detach().clone() for n, t in backbone.model.state_dict().items()}
    config = AdapterConfig(family="sparse", entries=k, l1=0.1)
    for language in TEXTS:
        train(backbone, plain_text(backbone, language), made(tmp_path / language), adapter=config, training=FAST)
        found = difference(tmp_path / language)
        assert sum(len(indices) for indices, _ in found.values()) == k
        assert all((np.diff(indices) > 0).all() for indices, _ in found.values())
        configured = json.loads((tmp_path / language / "adapter_config.json").read_text())
        assert configured["entries"] == {site: len(indices) for site, (indices, _) in found.items()}
        assert not Adapter.load(tmp_path / language).others
        # What is changed of a model in 32 bits is just these entries.
        with backbone.with_adapter(Adapter.load(tmp_path / language)):
            model: Any = backbone.model
            for site, weight in trainable_weights(model).items():
                module, kind = parted(site)
                start = base[f"{module}.{kind}"].reshape(-1).float().clone()
                if site in found:
                    start[found[site][0]] += torch.from_numpy(found[site][1])
                assert torch.equal(weight.parameter.reshape(-1), start.to(backbone.dtype)), site
            output = model.get_output_embeddings()
            assert torch.equal(
                output.weight, base[f"{next(n for n, m in model.named_modules() if m is output)}.weight"]
            )
            norms = [n for n in base if "norm" in n.lower()]
            now = {n.replace(".base_layer", ""): t for n, t in model.state_dict().items()}
            assert norms and all(torch.equal(now[n], base[n]) for n in norms)
        trace.check()
    assert {s: v[1].tobytes() for s, v in difference(tmp_path / "en").items()} != {
        s: v[1].tobytes() for s, v in difference(tmp_path / "sw").items()
    }


@pytest.mark.parametrize("name", ["tied", "gemma3", "xlm-roberta", "mt5"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_task_beneath_which_lies_a_language_is_dense_addition(tmp_path: Path, name: str, dtype: str) -> None:
    """θ0 + φ_language + φ_task, whichever language it is, each rounded where the base's type is narrow."""
    backbone = opened(tmp_path, name, dtype)
    trace = Trace(backbone)
    config = AdapterConfig(family="sparse", entries=900)
    for language in TEXTS:
        options: dict[str, Any] = {"adapter": config, "training": FAST}
        train(backbone, plain_text(backbone, language), made(tmp_path / language), **options)
    below = load_stack([tmp_path / "en"])
    options = {"adapter": config, "training": FAST, "head": head(backbone), "beneath": below}
    train(backbone, labelled(backbone), made(tmp_path / "task"), **options)
    assert [note["structure"] for note in Adapter.load(tmp_path / "task").sidecar["beneath"]] == ["sparse"]
    model: Any = backbone.model if backbone.kind != "encoder" else backbone.headed(TWO).model
    shared = 0
    for language in TEXTS:
        expected = {s: w.parameter.detach().reshape(-1).clone() for s, w in trainable_weights(model).items()}
        touched: dict[str, list[np.ndarray]] = {}
        for folder in (tmp_path / language, tmp_path / "task"):
            for site, (indices, values) in difference(folder).items():
                flat = expected[site]
                flat[indices] = (flat[indices].float() + torch.from_numpy(values)).to(flat.dtype)
                touched.setdefault(site, []).append(indices)
        shared += sum(len(np.intersect1d(*both)) for both in touched.values() if len(both) == 2)
        twin, _ = dense_model(model, expected)
        for path in backbone.headed(TWO).modules if backbone.kind == "encoder" else ():
            own = {n: t for n, t in tensors_of(Adapter.load(tmp_path / "task")).items() if f".{path}." in n}
            state = {n.removeprefix(f"base_model.model.{path}."): t for n, t in own.items()}
            twin.get_submodule(path).load_state_dict(state)
        with backbone.with_adapter(load_stack([tmp_path / language, tmp_path / "task"])) as wrapped:
            for site, weight in trainable_weights(wrapped.get_base_model()).items():
                assert torch.equal(weight.parameter.reshape(-1), expected[site]), site
            ids = {"input_ids": torch.tensor([[1, 20, 30, 40, 50]])}
            ids |= {"decoder_input_ids": torch.tensor([[0, 33]])} if backbone.kind == "encoder-decoder" else {}
            with torch.no_grad(), backbone.autocast():
                torch.testing.assert_close(wrapped(**ids).logits, twin(**ids).logits, rtol=1e-5, atol=1e-5)
        trace.check()
    assert shared, "no entry is changed by both: the order was not tried"


def test_the_second_phase_starts_from_the_start(tmp_path: Path) -> None:
    """A first phase of another length changes what is chosen, and nothing else of the second phase's beginning."""
    backbone = opened(tmp_path, "llama")
    losses: dict[float, list[float]] = {}
    for epochs in (0.5, 6.0):
        config = AdapterConfig(family="sparse", entries=40, first_epochs=epochs)
        out = made(tmp_path / str(epochs))
        train(backbone, plain_text(backbone, "en"), out, adapter=config, training=FAST)
        losses[epochs] = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        first = [json.loads(line)["loss"] for line in (out / "first/metrics.jsonl").read_text().splitlines()]
        assert len(first) == (1 if epochs < 1 else 12) and len(losses[epochs]) == 4
        # Both phases read the same batch first, at the same weights.
        assert first[0] == losses[epochs][0]
        if epochs > 1:
            assert first[-1] < losses[epochs][0] - 0.1
    assert losses[0.5][0] == losses[6.0][0]


# Trainings that were killed.


class Stop(Exception):
    pass


def files(folder: Path) -> dict[str, bytes]:
    """All that lies there, to the last bit."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stopping(at: int, error: type[BaseException] = Stop) -> Callable[[int, int, float], None]:
    def progress(done: int, total: int, loss: float) -> None:
        if done == at:
            raise error

    return progress


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


SMALL = TrainingConfig(learning_rate=0.01, epochs=3, batch_size=4, warmup=0)


def learning(folder: Path, name: str, select: str) -> tuple[Backbone, Callable[..., dict[str, Any]]]:
    """A training of six steps twice, the second on top of a language, and a function that carries it out."""
    backbone = opened(folder, name)
    config = AdapterConfig(family="sparse", entries=250, l1=1.0, select=select)  # pyright: ignore[reportArgumentType]
    below = folder / f"{name}-en"
    if not below.exists():
        train(backbone, plain_text(backbone, "en"), made(below), adapter=config, training=FAST)
    options: dict[str, Any] = {"adapter": config, "training": SMALL, "head": head(backbone)}
    options |= {"beneath": load_stack([below]), "checkpoint_seconds": 0.0}
    sequences = labelled(backbone)
    return backbone, lambda out, **more: train(backbone, sequences, out, **{**options, **more})


@pytest.mark.parametrize("select", ["change", "gradient"])
@pytest.mark.parametrize("name", ["tied", "bert"])
def test_a_difference_whose_training_was_killed_is_the_same(
    killed: Path, tmp_path: Path, name: str, select: str
) -> None:
    backbone, learn = learning(killed, name, select)
    trace = Trace(backbone)
    whole = learn(made(tmp_path / "whole"))
    expected = files(tmp_path / "whole")
    assert whole["steps"] == 12
    leftovers = [name for name in expected if "checkpoint" in name or "selection" in name]
    assert not leftovers
    for at, error in ((1, Stop), (4, KeyboardInterrupt), (6, Stop), (7, Stop), (10, KeyboardInterrupt), (12, Stop)):
        out = made(tmp_path / f"at{at}")
        with pytest.raises(error):
            learn(out, progress=stopping(at, error))
        trace.check()
        assert not (out / "adapter_model.safetensors").exists()
        reached: list[int] = []
        found = learn(out, progress=lambda done, total, loss, r=reached: r.append(done))
        assert reached == list(range(at, 13))
        assert files(out) == expected
        assert {k: found[k] for k in ("steps", "tokens", "loss")} == {k: whole[k] for k in ("steps", "tokens", "loss")}
        assert {k: v for k, v in found["first"].items() if k != "seconds"} == {
            k: v for k, v in whole["first"].items() if k != "seconds"
        }
        trace.check()


def test_a_training_killed_again_and_again(killed: Path, tmp_path: Path) -> None:
    """Every step in a process of its own, so to say."""
    _, learn = learning(killed, "tied", "change")
    learn(made(tmp_path / "whole"))
    out = made(tmp_path / "out")
    for at in range(2, 13):
        with pytest.raises(Stop):
            learn(out, progress=stopping(at))
    learn(out)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("select", ["change", "gradient"])
@pytest.mark.parametrize("moment", ["selected", "chosen", "learned", "writing", "saving"])
def test_killed_between_the_steps(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, select: str
) -> None:
    """After the selection is written, after it is read, when the second phase is over, and within the writing of files."""
    backbone, learn = learning(killed, "tied", select)
    trace = Trace(backbone)
    learn(made(tmp_path / "whole"))
    out = made(tmp_path / "out")

    def then_stop(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            function(*given, **named)
            raise Stop

        return called

    def at_once(*given: Any, **named: Any) -> Any:
        raise Stop

    with monkeypatch.context() as patched:
        if moment == "selected":
            patched.setattr(lottery, "_keep", then_stop(lottery._keep))
        elif moment == "chosen":
            patched.setattr(lottery, "_kept", then_stop(lottery._kept))
        elif moment == "learned":
            patched.setattr(training, "_write", at_once)
        elif moment == "writing":
            patched.setattr(training, "_write_config", at_once)
        with pytest.raises(Stop):
            learn(out, progress=stopping(3) if moment == "saving" else None)
    trace.check()
    if moment == "saving":  # Half of the next checkpoint.
        (out / "first/.checkpoint.safetensors").write_bytes(b"half of it")
    reached: list[int] = []
    # Without further checkpoints: nothing that was left over is written again, and so taken away, by chance.
    learn(out, progress=lambda done, total, loss: reached.append(done), checkpoint_seconds=1e9)
    assert reached[0] == {"selected": 7, "chosen": 7, "learned": 12, "writing": 12, "saving": 3}[moment]
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("name", ["tied", "bert", "t5"])
def test_a_language_adapter_whose_training_was_killed_is_the_same(tmp_path: Path, name: str, at: int) -> None:
    backbone = opened(tmp_path, name)
    trace, texts = Trace(backbone), plain_text(backbone, "en")
    options: dict[str, Any] = {"adapter": LANGUAGE, "training": FAST, "checkpoint_seconds": 0.0}
    train(backbone, texts, made(tmp_path / "whole"), **options)
    out = made(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        train(backbone, texts, out, progress=stopping(at, KeyboardInterrupt), **options)
    trace.check()
    assert not is_stack(out)
    reached: list[int] = []
    train(backbone, texts, out, progress=lambda done, total, loss: reached.append(done), **options)
    assert reached == list(range(at, 5))
    assert files(out) == files(tmp_path / "whole")
    here = {"README.md", "invertible", "bottleneck", "lingraft.json", "metrics.jsonl"}
    assert {p.split("/")[0] for p in files(out)} == here
    # And a task on it.
    below = load_stack([out])
    options |= {"adapter": TASK, "head": head(backbone), "beneath": below}
    train(backbone, labelled(backbone), made(tmp_path / "task"), **options)
    with pytest.raises(Stop):
        train(backbone, labelled(backbone), made(tmp_path / "again"), progress=stopping(at), **options)
    trace.check()
    train(backbone, labelled(backbone), tmp_path / "again", **options)
    assert files(tmp_path / "again") == files(tmp_path / "task")


# What is put on a model half-way, and what frozen parts do not do.


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_merge_that_is_stopped_half_way_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    backbone = opened(tmp_path, "bert")
    sparse = AdapterConfig(family="sparse", entries=2000)
    train(backbone, plain_text(backbone, "en"), made(tmp_path / "out"), adapter=sparse, training=FAST)
    trace, writes, own = Trace(backbone), [0], SparseLayer._write

    def write(self: SparseLayer, *args: Any) -> None:
        writes[0] += 1
        if writes[0] > at:
            raise KeyboardInterrupt
        own(self, *args)

    monkeypatch.setattr(SparseLayer, "_write", write)
    with pytest.raises(KeyboardInterrupt), backbone.with_adapter(load_stack([tmp_path / "out"])):
        pass
    trace.check()


def test_a_frozen_lora_beneath_drops_nothing_out(tmp_path: Path) -> None:
    backbone = opened(tmp_path, "llama")
    texts, lora = plain_text(backbone, "en"), AdapterConfig(rank=2, dropout=0.5)
    train(backbone, texts, made(tmp_path / "lora"), adapter=lora, training=FAST)
    config, tensors = fresh(backbone, TASK, 0)
    below = [attaching.part(adapter) for adapter in load_stack([tmp_path / "lora"])]
    ids = torch.tensor([[5, 6, 7, 8]])
    with backbone.attached(peft_config(config), tensors, beneath=below) as wrapped, torch.no_grad():
        wrapped.train()
        said = [wrapped(input_ids=ids).logits for _ in range(2)]
    assert torch.equal(*said)


def test_a_merged_task_adapter_remembers_what_it_stands_on(place: Path, tmp_path: Path) -> None:
    task = Adapter.load(place / "task")
    (task + 0.5 * (Adapter.load(place / "alone") - Adapter.load(place / "alone"))).save(tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdapterWarning)
        assert len(load_stack([place / "sw", tmp_path / "merged"])) == 3
