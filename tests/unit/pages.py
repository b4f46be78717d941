"""Contents of pages of any size, made by hand: no run, no store, every script."""

import random
import re
from collections.abc import Sequence
from typing import Any

from lingraft.methods import METHODS
from lingraft.report.results import BASELINE

SENTENCES = {
    "sw": "Serikali ilitangaza mpango mpya wa afya kwa watoto wote wa kijiji.",
    "ar": "أعلنت الحكومة خطة صحية جديدة لجميع الأطفال في القرية (عام 2024).",
    "he": "הממשלה הודיעה על תוכנית בריאות חדשה לכל הילדים בכפר (2024).",
    "th": "รัฐบาลประกาศแผนสุขภาพใหม่สำหรับเด็กทุกคนในหมู่บ้าน",
    "am": "መንግሥት ለመንደሩ ልጆች ሁሉ አዲስ የጤና ዕቅድ አስታወቀ።",
    "hi": "सरकार ने गाँव के सभी बच्चों के लिए नई स्वास्थ्य योजना की घोषणा की।",
    "zh": "政府宣布了一项面向全村儿童的新健康计划。",
    "ja": "政府は村のすべての子どもを対象とした新しい保健計画を発表した。",
    "ko": "정부는 마을의 모든 어린이를 위한 새로운 보건 계획을 발표했다.",
    "my": "အစိုးရသည် ရွာရှိ ကလေးအားလုံးအတွက် ကျန်းမာရေးအစီအစဉ်သစ်ကို ကြေညာခဲ့သည်။",
    "fa": "دولت برنامهٔ بهداشتی تازه‌ای برای همهٔ کودکان روستا اعلام کرد.",
    "ur": "حکومت نے گاؤں کے تمام بچوں کے لیے صحت کے نئے منصوبے کا اعلان کیا۔",
    "de": "Die Regierung kündigte einen neuen Gesundheitsplan für alle Kinder des Dorfes an.",
    "vi": "Chính phủ công bố kế hoạch y tế mới cho mọi trẻ em trong làng.",
    "yo": "Ìjọba kéde ètò ìlera tuntun fún gbogbo àwọn ọmọ abúlé náà.",
    "ru": "Правительство объявило о новой программе здравоохранения для детей деревни.",
    "el": "Η κυβέρνηση ανακοίνωσε νέο σχέδιο υγείας για όλα τα παιδιά του χωριού.",
    "ta": "கிராமத்தின் அனைத்துக் குழந்தைகளுக்கும் புதிய சுகாதாரத் திட்டத்தை அரசு அறிவித்தது.",
    "bn": "সরকার গ্রামের সব শিশুর জন্য নতুন স্বাস্থ্য পরিকল্পনা ঘোষণা করেছে।",
    "km": "រដ្ឋាភិបាលបានប្រកាសផែនការសុខភាពថ្មីសម្រាប់កុមារទាំងអស់ក្នុងភូមិ។",
}
MORE = re.findall(r"\w+", "lo te mr gu pa ne si ps tr uk bg sr ha ig zu xh so rw su jv id tl eu fi et cy ht wo")
LABELS = ["science", "travel", "politics", "sports", "health", "entertainment", "geography"]


def contents(
    targets: Sequence[str] = ("sw", "ar", "th", "de"),
    methods: Sequence[str] = ("vanilla", "eng-ft", "adamergex", "adamergex-product", "tgt-ft"),
    items: int = 30,
    seed: int = 0,
    *,
    atlas: bool = True,
    curves: bool = True,
    groups: bool = True,
    trainings: int = 6,
) -> dict[str, Any]:
    """What `report.page.contents.contents` would give for a run of this size; equal arguments give equal contents."""
    chance = random.Random(seed)
    table = {name: _method(name, number, targets, chance, groups) for number, name in enumerate(methods)}
    halves = {"near": list(targets[::2]), "far": list(targets[1::2])} if groups and len(targets) > 1 else {}
    found: dict[str, Any] = {
        "manifest": "0" * 64,
        "name": "synthetic",
        "metric": "accuracy",
        "experiment": {"name": "synthetic", "task": "topics", "development": ["tr"], "groups": halves},
        "backbone": {"name": "example/model", "digest": "sha256:" + "ab" * 32},
        "source": "en",
        "targets": list(targets),
        "seeds": [0],
        "items": dict.fromkeys(["en", *targets], items),
        "samples": {},
        "chance_and_size_warning": None,
        "methods": table,
        "selections": _selections(methods, targets, chance) if curves else {},
        "references": [{"language": c, "seed": 0, "cosine": chance.random(), "norms": [1.2, 1.3]} for c in targets],
        "absent": [],
        "adapters": [],
    }
    marks = {
        name: {
            key: {
                "p": cell["p"],
                "adjusted": min(1.0, cell["p"] * 3),
                "significant": cell["p"] < 0.016,
                "direction": "+" if cell["difference"] >= 0 else "-",
            }
            for key, cell in {**method["languages"], "average": method["average"]}.items()
            if "p" in cell
        }
        for name, method in table.items()
    }
    chosen = next((n for n in methods if n not in ("vanilla", BASELINE, "tgt-ft")), methods[0])
    average = table[chosen]["average"]
    return {
        "found": found,
        "headline": {
            "question": "Can example/model answer topics in the targets better with AdaMergeX than with Eng-FT?",
            "answer": f"AdaMergeX scores {100 * average['value']:.1f} % on average over {len(targets)} targets, "
            f"{100 * average.get('difference', 0):+.1f} points against Eng-FT.",
            "verdict": "undecided" if "difference" in average else "unknown",
            "method": chosen,
            "baseline": BASELINE if BASELINE in methods else None,
            "value": average["value"],
            "interval": average["interval"],
            "difference": average.get("difference"),
            "difference_interval": average.get("difference_interval"),
            "p": average.get("p"),
            "cautions": ["One seed: the interval does not cover how much trainings differ."],
        },
        "marks": marks,
        "examples": _examples(methods, targets, items, chance),
        "trainings": _trainings(trainings, targets, chance),
        "spending": _spending(),
        "provenance": _provenance(chance, 3 * len(methods)),
        "divergences": _divergences(targets, chance) if atlas and len(targets) > 1 else None,
        "published": None,
    }


def many(methods: int = 25, targets: int = 40, items: int = 100) -> dict[str, Any]:
    """A big page's contents: by default 1,000 cells and 100,000 predictions."""
    codes = [*SENTENCES, *MORE][:targets]
    first = ["vanilla", BASELINE, "tgt-ft", "adamergex"]
    names = [*first, *(name for name in METHODS if name not in first)]
    names += [f"variant-{n}" for n in range(max(0, methods - len(names)))]
    return contents(codes[: max(1, targets)], names[:methods], items, trainings=60)


def _method(name: str, number: int, targets: Sequence[str], chance: random.Random, groups: bool) -> dict[str, Any]:
    row = METHODS.get(name)

    def cell(level: float) -> dict[str, Any]:
        value = min(0.97, max(0.03, level + chance.gauss(0, 0.05)))
        made: dict[str, Any] = {
            "value": value,
            "interval": [max(0.0, value - 0.07), min(1.0, value + 0.07)],
            "by_seed": [value],
            "also": {"macro_f1": value - 0.02, "gold_log_likelihood": -0.7, "unparsable": 0.0},
        }
        if name != BASELINE:
            difference = chance.gauss(0.02, 0.05)
            made |= {
                "difference": difference,
                "difference_interval": [difference - 0.04, difference + 0.04],
                "p": chance.random() if abs(difference) < 0.05 else 0.002,
                "gap_closed": {"value": difference * 5, "interval": [difference * 5 - 0.2, difference * 5 + 0.2]},
            }
        return made

    return {
        "title": row.title if row else name,
        "says": row.says if row else "a variant",
        "languages": {code: cell(0.35 + 0.01 * number + 0.3 * chance.random()) for code in targets},
        "average": cell(0.5 + 0.01 * number),
        "groups": {"near": cell(0.6), "far": cell(0.4)} if groups and len(targets) > 1 else {},
    }


def _selections(methods: Sequence[str], targets: Sequence[str], chance: random.Random) -> dict[str, Any]:
    def curve() -> list[dict[str, Any]]:
        shift = chance.random() * 0.1
        return [
            {
                "weight": w / 4,
                "gold_log_likelihood": -0.6 - shift - 0.1 * (w / 4 - 0.7) ** 2,
                "accuracy": 0.6 + 0.01 * w,
                "entropy": 0.2 + 0.05 * (w / 4 - 0.5) ** 2,
                "scores": 1,
            }
            for w in range(7)
        ]

    chosen: dict[str, Any] = {}
    for name in methods:
        row = METHODS.get(name)
        if row is None or row.adapter != "graft":
            continue
        if row.criterion == "labels":
            chosen[name] = {"weight": 0.75, "criterion": "gold_log_likelihood", "curve": curve()}
        else:
            own = {code: {"weight": 0.5, "criterion": "entropy", "curve": curve()} for code in targets}
            chosen[name] = {"by_language": own}
    return chosen


def _examples(methods: Sequence[str], targets: Sequence[str], items: int, chance: random.Random) -> dict[str, Any]:
    strings: dict[str, int] = {}

    def index(text: str) -> int:
        return strings.setdefault(text, len(strings))

    rows, differ = {}, {}
    for code in targets:
        sentence = SENTENCES.get(code, f"({code}) A sentence of this language, number")
        golds = [chance.choice(LABELS) for _ in range(items)]
        said = {m: [g if chance.random() < 0.6 else chance.choice(LABELS) for g in golds] for m in methods}
        rows[code] = {
            "id": [f"{code}-{n:04d}" for n in range(items)],
            "gold": [index(g) for g in golds],
            "prompt": [index(f"Topic of the sentence?\n{sentence} {n}\nAnswer:") for n in range(items)],
            "answers": {
                m: {
                    "answer": [index(a) for a in said[m]],
                    "reason": [index(f"log-likelihood −{chance.random():.1f}") for _ in said[m]],
                    "value": [float(a == g) for a, g in zip(said[m], golds, strict=True)],
                    "prompt": [-1] * items,
                }
                for m in methods
            },
        }
        differ[code] = [n for n in range(items) if len({said[m][n] == golds[n] for m in methods}) > 1]
    return {
        "languages": list(targets),
        "methods": list(methods),
        "seed": 0,
        "labels": LABELS,
        "strings": list(strings),
        "items": rows,
        "differ": differ,
        "left_out": 0,
    }


def _trainings(many: int, targets: Sequence[str], chance: random.Random) -> list[dict[str, Any]]:
    made = []
    for n in range(many):
        kind, language = ("task", "en") if n == 0 else ("reference", targets[n % len(targets)])
        curve = [
            {
                "step": s,
                "loss": 0.8 + 1.5 / s + chance.gauss(0, 0.03),
                "learning_rate": 1e-4,
                **({"held_out_loss": 0.9 + 1.4 / s} if s % 40 == 0 else {}),
            }
            for s in range(1, 201)
        ]
        made.append(
            {
                "key": f"{n:024x}",
                "label": f"{'topics' if n == 0 else 'language modelling'}, {language}",
                "kind": kind,
                "task": "topics" if n == 0 else "clm",
                "language": language,
                "seed": 0,
                "family": "lora",
                "curve": curve,
                "steps": 200,
                "tokens": 123_456,
                "seconds": 61.5,
                "final_loss": curve[-1]["loss"],
            }
        )
    return made


def _spending() -> dict[str, Any]:
    kinds = [
        ("train", 6, 360.0, 700_000, 9_000_000),
        ("predict", 40, 120.0, None, 800_000),
        ("score", 40, 2.0, None, 9_000),
    ]
    return {
        "total_seconds": 482.0,
        "by_kind": [dict(zip(("kind", "steps", "seconds", "tokens", "bytes"), row, strict=True)) for row in kinds],
        "trainings": [{"label": "topics, en", "steps": 200, "tokens": 123_456, "seconds": 61.5}],
        "machine": {"processor": "an example", "cores": 2},
        "unknown": 1,
    }


def _provenance(chance: random.Random, steps: int) -> dict[str, Any]:
    def digest() -> str:
        return f"{chance.getrandbits(256):064x}"

    return {
        "run": {"name": "synthetic", "manifest": digest(), "plan": digest()[:24], "lingraft": "0.1"},
        "backbone": {"name": "example/model", "digest": f"sha256:{digest()}", "revision": None},
        "experiment_yaml": "name: synthetic\ntask: topics\ntargets: [sw, ar]\n",
        "data": [{"name": "topics/sw/test.jsonl", "digest": digest()}],
        "environment": {"python": "3.12.1", "numpy": "2.1.0"},
        "steps": [
            {"kind": "train", "label": f"step {n}", "key": digest()[:24], "sha256": digest(), "files": 3}
            for n in range(steps)
        ],
        "command": "lingraft run synthetic.yaml",
    }


def _divergences(targets: Sequence[str], chance: random.Random) -> dict[str, Any]:
    n = len(targets)

    def cosines() -> list[list[float | None]]:
        rows: list[list[float | None]] = [[1.0] * n for _ in range(n)]
        for i in range(n):
            for j in range(i):
                rows[i][j] = rows[j][i] = round(chance.uniform(-0.1, 0.6), 4)
        return rows

    linkage = [
        [0.0 if i == 0 else float(n + i - 1), float(i + 1), 0.3 + 0.5 * (i + 1) / n, i + 2] for i in range(n - 1)
    ]
    layers = ["all", *map(str, range(6))]
    return {
        "structure": "lora",
        "languages": list(targets),
        "seed": 0,
        "layers": layers,
        "cosines": {layer: cosines() for layer in layers},
        "order": list(range(n)),
        "linkage": linkage,
        "norms": {layer: [1.0] * n for layer in layers},
        "says": "Languages next to each other in the tree depart from English alike.",
    }
