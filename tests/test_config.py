"""Recipes: what loads, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lte import cli, config
from lte.config import Recipe
from lte.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "links")


def faults(tree: object = None, overrides: Sequence[str] = ()) -> list[str]:
    """The lines that these settings are refused with."""
    with pytest.raises(ConfigError) as raised:
        with_overrides(*overrides) if tree is None else config.from_dict(tree)
    lines = raised.value.faults
    assert str(raised.value) == "\n".join(lines)
    assert all(line and "\n" not in line for line in lines)
    return lines


def with_overrides(*overrides: str) -> Recipe:
    return config.load(CONFIGS / "quickstart.yaml", overrides)


def value_of(recipe: Recipe, key: str) -> Any:
    section, leaf = key.split(".")
    return getattr(getattr(recipe, section), leaf)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Any:
    """Writes a recipe and gives its path."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# Files


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_that_is_shipped_loads(path: Path) -> None:
    recipe = config.load(path)
    assert recipe != Recipe(), "the test is blind"
    assert config.from_dict(config.to_dict(recipe)) == recipe


def test_the_quickstart_is_among_them() -> None:
    assert CONFIGS / "quickstart.yaml" in RECIPES


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n", "train:\nlora:\n  # rank: 8\n"])
def test_what_a_recipe_leaves_out_has_its_default(text: str, recipe_file: Any) -> None:
    assert config.load(recipe_file(text)) == Recipe()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train:\n  rounds: [1", ", line 2: expected ',' or ']', but got '<stream end>'"),
        ("train: rounds: 3", ", line 1: mapping values are not allowed here"),
        ("train:\n  rounds: 3\n  rounds: 4", ", line 3: rounds occurs twice"),
        ("lora: {rank: 3}\ntrain:\nlora: {heads: 2}", ", line 3: lora occurs twice"),
        ("\ttrain: 3", ", line 1: found character '\\t' that cannot start any token"),
        ("train: !!python/name:os.system x", ", line 1: could not determine a constructor for the tag"),
        ("[[]]: 3", ", line 1: found unhashable key"),
        ("train: \x00", ": not YAML (unacceptable character"),
        ("[" * 5000, ": not YAML ("),
        ("- train", ": must hold sections, such as train:, not ['train']"),
        ("5", ": must hold sections, such as train:, not 5"),
        (b"\xff\xfe\xff", ": cannot be read (not text in UTF-8)"),
    ],
    ids=range(12),
)
def test_a_file_that_is_no_recipe_is_one_line(text: str | bytes, line: str, recipe_file: Any) -> None:
    path = recipe_file(text)
    with pytest.raises(ConfigError) as raised:
        config.load(path)
    (met,) = raised.value.faults
    assert met.startswith(f"{path}{line}")
    assert "\n" not in met


def test_a_missing_file_is_named_with_a_near_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    for name in ("mine.yaml", "configs/quickstart.yaml", "configs/large.yaml"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for path, hint in (
        ("configs/quickstrat.yaml", ", did you mean configs/quickstart.yaml?"),
        ("quickstart", ", did you mean configs/quickstart.yaml?"),
        ("mine.yml", ", did you mean mine.yaml?"),
        ("nowhere/mine.yaml", "; there is: configs/large.yaml, configs/quickstart.yaml"),
        ("zzz", "; there is: mine.yaml, configs/large.yaml, configs/quickstart.yaml"),
    ):
        with pytest.raises(ConfigError) as raised:
            config.load(path)
        assert raised.value.faults == [f"{path}: no such file{hint}"]
    with pytest.raises(ConfigError, match=r"configs: cannot be read \(Is a directory\)"):
        config.load("configs")


# Round trip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_written_down_reads_the_same(path: Path, recipe_file: Any) -> None:
    recipe = config.load(path)
    assert config.load(recipe_file(config.to_yaml(recipe))) == recipe


@settings(deadline=None, max_examples=40)
@given(
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(
        [
            "1e-3",
            "off",
            "yes",
            "none",
            "null",
            "~",
            "",
            "10:00",
            "2024-01-01",
            "a: b",
            "<<",
            "007",
            "=",
            "a\x85b\u2028",
            " \n",
        ]
    ),
    st.floats(1e-300, 1e300),
    st.lists(st.sampled_from(["*", "off", "1", "a.*", "1e5", "[x]", "#", "- a"])),
)
def test_any_text_number_and_list_written_down_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory, text: str, number: float, names: list[str]
) -> None:
    recipe = config.replace(
        Recipe(),
        **{
            "eval.prompt": text,
            "optimizer.eps": number,
            "lora.modules": names,
            "optimizer.lr_A": None,
            "run.seed": 2**63 - 1,
            "lora.overrides": [{"modules": text, "scale": number}],
        },
    )
    written = config.to_yaml(recipe)
    path = tmp_path_factory.mktemp("written") / "config.yaml"
    path.write_text(written, encoding="utf-8")
    assert config.load(path) == recipe
    assert config.from_dict(yaml.safe_load(written)) == recipe, "other tools read YAML 1.1"


def test_every_setting_is_written_down() -> None:
    written = yaml.safe_load(config.to_yaml(Recipe()))
    keys = [f"{section}.{leaf}" for section, leaves in written.items() for leaf in leaves]
    assert keys == [key for key, *_ in config.describe()]


# Overrides


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.rounds=7", 7),
        ("train.rounds = 7", 7),
        ("train.rounds=1e3", 1000),
        ("train.rounds=1_000", 1000),
        ("run.seed=0", 0),
        ("optimizer.lr=1e-3", 1e-3),
        ("optimizer.lr=1.5E+2", 150.0),
        ("optimizer.lr=.5", 0.5),
        ("optimizer.lr=2", 2.0),
        ("optimizer.lr_A=1e-2", 1e-2),
        ("optimizer.lr_A=none", None),
        ("optimizer.lr_A=null", None),
        ("optimizer.lr_A=", None),
        ("base.quant=none", "none"),
        ("log.wandb=off", "off"),
        ("lora.modules=[]", ()),
        ("lora.modules=['*.q', k*]", ("*.q", "k*")),
        ("lora.modules=[a]", ("a",)),
        (
            "lora.overrides=[{modules: '*.mlp.*', rank: 8, scale: none}]",
            (config.Override(modules="*.mlp.*", rank=8),),
        ),
        ("outer.nesterov=false", False),
        ("outer.nesterov=True", True),
        ("outer.nesterov=no", False),
        ("outer.dense=on", True),
        ("run.dir=runs/with a space", "runs/with a space"),
        ("run.dir=2024", "2024"),
        ("run.dir=2024-13-45", "2024-13-45"),
        ("run.dir=1e-3", "1e-3"),
        ("run.dir=none", "none"),
        ("run.dir=a=b", "a=b"),
        ("run.dir='quoted'", "quoted"),
        ("server.address=tcp://127.0.0.1:*", "tcp://127.0.0.1:*"),
        ("eval.prompt=ROMEO:", "ROMEO:"),
        ("eval.prompt=ROMEO: hello", "ROMEO: hello"),
        ('eval.prompt="ROMEO:\\n"', "ROMEO:\n"),
        ("eval.prompt=[Enter", "[Enter"),
        ("eval.prompt=", ""),
        ("eval.prompt=off", "off"),
    ],
    ids=lambda value: value if isinstance(value, str) and "=" in value else "",
)
def test_an_override_is_read_as_a_person_means_it(override: str, expected: object) -> None:
    met = value_of(with_overrides(override), override.split("=")[0].strip())
    assert (met, type(met)) == (expected, type(expected))


def test_settings_of_another_librarys_model_are_overrides_as_ours_are(recipe_file: Any) -> None:
    """They are free, may lie deeper, and travel as the others do."""
    path = recipe_file(
        "model:\n  name: transformers\n  architecture: llama\n"
        "  config: {hidden_size: 64, rope: {theta: 1e4}}\n"
    )
    plain = config.load(path)
    overrides = ["model.config.hidden_size=128", "model.config.rope.kind=none", "model.config.act=gelu"]
    recipe = config.load(path, overrides)
    assert recipe.model.config == {
        "hidden_size": 128,
        "rope": {"theta": 10000.0, "kind": "none"},
        "act": "gelu",
    }
    assert config.from_dict(config.to_dict(recipe)) == recipe
    assert config.load(recipe_file(config.to_yaml(recipe))) == recipe
    assert config.differences(recipe, plain, ("model",)) == [
        "model.config.act: gelu -> None",
        "model.config.hidden_size: 128 -> 64",
        "model.config.rope.kind: none -> None",
    ]
    assert recipe != plain
    assert hash(recipe) == hash(config.from_dict(config.to_dict(recipe)))
    (line,) = faults(overrides=["model.config=128"])
    assert line == "model.config: must be a section with settings of its own, not 128"


def test_overrides_come_after_the_file_and_the_last_one_counts() -> None:
    recipe = with_overrides("train.rounds=3", "lora.rank=5", "train.rounds=4")
    assert (recipe.train.rounds, recipe.lora.rank, recipe.run.dir) == (4, 5, "runs/quickstart")


def test_a_default_as_the_help_shows_it_is_an_override() -> None:
    for key, _, default, _ in config.describe():
        assert value_of(with_overrides(f"{key}={default}"), key) == value_of(Recipe(), key), key


@pytest.mark.parametrize(
    ("changes", "key"), [({"train.rounds": 9}, "train.rounds"), ({"lora.modules": ["a"]}, "lora.modules")]
)
def test_replace_makes_a_copy(changes: dict[str, Any], key: str) -> None:
    before, recipe = config.to_dict(Recipe()), Recipe()
    assert list(config.to_dict(config.replace(recipe, **changes))[key.split(".")[0]].values()) != list(
        before[key.split(".")[0]].values()
    )
    assert config.to_dict(recipe) == before
    with pytest.raises(ConfigError, match=r"train\.runds: unknown setting, did you mean train\.rounds\?"):
        config.replace(recipe, **{"train.runds": 3})


# Faults


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.round=5", "train.round: unknown setting, did you mean train.rounds?"),
        ("server.adress=x", "server.adress: unknown setting, did you mean server.address?"),
        ("worker.theads=2", "worker.theads: unknown setting, did you mean worker.num_threads?"),
        ("trian.rounds=5", "trian: unknown setting, did you mean train?"),
        ("optimiser.name=sgd", "optimiser: unknown setting, did you mean optimizer?"),
        ("lora.rounds=5", "lora.rounds: unknown setting, did you mean train.rounds?"),
        ("rounds=5", "rounds: unknown setting, did you mean train.rounds?"),
        ("data.dir=x", "data.dir: unknown setting, did you mean run.dir?"),
        ("train.lr=1", "train.lr: unknown setting, did you mean optimizer.lr or outer.lr?"),
        (
            "train.xyz=1",
            "train.xyz: unknown setting; known here: method, rounds, local_steps, workers, batch_size",
        ),
        ("xyz.rounds=1", "xyz: unknown setting; known here: run, model, data, train, lora, base,"),
        (
            "lora.overrides=[{rnak: 3}]",
            "lora.overrides.0.rnak: unknown setting, did you mean rank?",
        ),
        ("base.quant=nf5", "base.quant: 'nf5' is not one of nf4, int8 or none, did you mean nf4?"),
        (
            "lora.merge=resetless",
            "lora.merge: 'resetless' is not one of reset-less, reset-b, reset or never, did",
        ),
        ("lora.A=xyz", "lora.A: 'xyz' is not one of trained, frozen or rotating"),
        ("train.rounds=0", "train.rounds: must be greater than or equal to 1, not 0"),
        ("train.rounds=true", "train.rounds: must be a number, not true"),
        ("optimizer.lr=false", "optimizer.lr: must be a number, not false"),
        ("outer.momentum=true", "outer.momentum: must be a number, not true"),
        ("run.seed=false", "run.seed: must be a number, not false"),
        ("train.rounds=2.5", "train.rounds: must be a whole number, not 2.5"),
        ("train.rounds=1e-3", "train.rounds: must be a whole number, not 0.001"),
        ("train.rounds=many", "train.rounds: must be a whole number, not 'many'"),
        ("train.rounds=", "train.rounds: must be a whole number, not none"),
        ("train.rounds=[1]", "train.rounds: must be a whole number, not [1]"),
        (
            "train.rounds=99999999999999999999",
            "train.rounds: must be less than or equal to 9223372036854775807",
        ),
        ("train.rounds=" + "9" * 5000, "train.rounds: '99999"),
        ("lora.overrides=[{rank: true}]", "lora.overrides.0.rank: must be a number, not true"),
        ("optimizer.rates=[{factr: 3}]", "optimizer.rates.0.factr: unknown setting, did you mean factor?"),
        ("lora.overrides=[5]", "lora.overrides.0: must be a section with settings of its own, not 5"),
        ("lora.scale=nan", "lora.scale: must be finite, not 'nan'"),
        ("lora.scale=.inf", "lora.scale: must be finite, not inf"),
        ("schedule.final=.nan", "schedule.final: must be finite, not nan"),
        ("optimizer.beta1=-.inf", "optimizer.beta1: must be finite, not -inf"),
        ("optimizer.lr=none", "optimizer.lr: must be a number, not 'none'"),
        ("server.grace_s=10:00", "server.grace_s: must be a number, not '10:00'"),
        ("outer.nesterov=maybe", "outer.nesterov: must be true or false, not 'maybe'"),
        ("log.wandb=false", "log.wandb: false is not one of off, offline or online"),
        ("run.dir=", "run.dir: must be a name, not ''"),
        ("lora.modules=a", "lora.modules: must be a list, such as [a, b], not 'a'"),
        ("lora.modules=[*]", "lora.modules: '[*]' cannot be read; lists are [a, b], text with signs in it"),
        ("lora.modules=[5]", "lora.modules.0: must be text in quotes, not 5"),
        ("train=5", "train: must be a section with settings of its own, not 5"),
        ("train=[rounds]", "train: must be a section with settings of its own, not ['rounds']"),
        ("train.rounds.more=5", "train.rounds.more=5: 'rounds' is a value, not a section"),
        ("train.rounds", "'train.rounds': an override is key=value, such as train.rounds=20"),
        ("=5", "'=5': an override is key=value, such as train.rounds=20"),
        ("train.=5", "'train.=5': an override is key=value, such as train.rounds=20"),
        ("train..rounds=5", "'train..rounds=5': an override is key=value, such as train.rounds=20"),
    ],
    ids=lambda value: value[:30],
)
def test_an_impossible_override_is_one_line(override: str, line: str) -> None:
    (met,) = faults(overrides=[override])
    assert met.startswith(line)
    assert len(met) < 250


def test_faults_of_file_and_overrides_are_reported_together(recipe_file: Any) -> None:
    path = recipe_file("train:\n  runds: 3\n  workers: none\nmodle:\n  width: 3\nrun: {dir: 2024}\n")
    with pytest.raises(ConfigError) as raised:
        config.load(path, ["lora.rank=-1", "base.quant=nf3", "nonsense", "lora.rank.x=3"])
    assert sorted(raised.value.faults) == [
        "'nonsense': an override is key=value, such as train.rounds=20",
        "base.quant: 'nf3' is not one of nf4, int8 or none, did you mean nf4?",
        "lora.rank.x=3: 'rank' is a value, not a section",
        "lora.rank: must be greater than or equal to 1, not -1",
        "modle: unknown setting, did you mean model?",
        "run.dir: must be text in quotes, not 2024",
        "train.runds: unknown setting, did you mean train.rounds?",
        "train.workers: must be a whole number, not 'none'",
    ]


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"train": 5}, "train: must be a section with settings of its own, not 5"),
        ({"train": "rounds"}, "train: must be a section with settings of its own, not 'rounds'"),
        ({"train": {"rounds": {"more": 1}}}, "train.rounds: must be a whole number, not {'more': 1}"),
        ({5: {}}, "5: unknown setting; known here: run,"),
        ({"train": {5: 1}}, "train.5: unknown setting; known here: method,"),
        ({"train": {None: 1}}, "train.None: unknown setting"),
    ],
)
def test_a_tree_that_is_no_recipe_is_one_line(tree: object, line: str) -> None:
    (met,) = faults(tree)
    assert met.startswith(line)


RULES = {
    "model.num_attention_heads: 3 must divide model.width (128) into an even number": {
        "model.num_attention_heads": 3
    },
    "model.num_attention_heads: 128 must divide": {"model.num_attention_heads": 128},
    "model.name: gpt is no model of data.kind = images; gpt reads text, vit images": {"data.kind": "images"},
    "model.name: vit is no model of data.kind = text": {"model.name": "vit"},
    "model.name: linear is no model of data.kind = text": {"model.name": "linear"},
    "model.name: transformers is no model of data.kind = regression; gpt reads text, vit images,"
    " transformers both, linear fits a regression": {
        "model.name": "transformers",
        "model.architecture": "vit",
        "data.kind": "regression",
    },
    "model.architecture: model.name = transformers and the name of a model there": {
        "model.name": "transformers"
    },
    "model.architecture: model.name = transformers and": {"model.architecture": "llama"},
    "model.config: holds settings of model.name = transformers, not of gpt": {"model.config": {"n_head": 3}},
    "model.width: is a setting of gpt and vit; transformers' have names of their own": {
        "model.name": "transformers",
        "model.architecture": "llama",
        "model.width": 64,
    },
    "model.config.num_labels: is model.num_classes here": {
        "model.name": "transformers",
        "model.architecture": "vit",
        "model.config": {"num_labels": 3},
    },
    "model.num_attention_heads: 3 must divide model.width (128)": {
        "data.kind": "images",
        "model.name": "vit",
        "model.num_attention_heads": 3,
    },
    "model.patch_size: 5 must divide model.image_size (28)": {
        "data.kind": "images",
        "model.name": "vit",
        "model.patch_size": 5,
    },
    "data.augment: crop-flip is for data.kind = images": {"data.augment": "crop-flip"},
    "train.batch_size: 8 cannot be cut into lora.heads (3) equal slices": {"lora.heads": 3},
    "train.accumulate: the 4 samples of a head (train.batch_size / lora.heads) cannot be cut into 3": {
        "lora.heads": 2,
        "train.accumulate": 3,
    },
    "lora.scaling, lora.alpha: rank-stabilized and an alpha need each other": {"lora.alpha": 3.0},
    "lora.scaling, lora.alpha: rank-stabilized": {"lora.scaling": "rank-stabilized"},
    "lora.overrides: a scale of its own contradicts lora.scaling = rank-stabilized": {
        "lora.scaling": "rank-stabilized",
        "lora.alpha": 3.0,
        "lora.overrides": [{"modules": "a", "scale": 2.0}],
    },
    "lora.moments: transport cannot carry moments of 8 bits (optimizer.name = adamw8bit)": {
        "lora.A": "rotating",
        "lora.moments": "transport",
        "optimizer.name": "adamw8bit",
    },
    "lora.A: rotating needs lora.merge = reset-b, not reset-less": {
        "lora.A": "rotating",
        "lora.merge": "reset-less",
    },
    "lora.A: frozen contradicts lora.merge = reset": {"lora.A": "frozen", "lora.merge": "reset"},
    "lora.moments: transport needs lora.A = rotating": {"lora.moments": "transport"},
    "lora.subspace: disjoint needs lora.init = semi-orthogonal, not xavier": {
        "lora.subspace": "disjoint",
        "lora.init": "xavier",
    },
    "lora.subspace: disjoint needs lora.init = semi-orthogonal, not kaiming": {
        "lora.subspace": "disjoint",
        "lora.overrides": [{"modules": "a", "init": "kaiming"}],
    },
    "lora.subspace: shared would make lora.heads = 3 that all see the whole batch one and the same": {
        "lora.subspace": "shared",
        "lora.batch": "whole",
        "lora.heads": 3,
    },
    "train.overlap: needs an A that merges do not redraw": {"train.overlap": True, "lora.A": "rotating"},
    "train.overlap: needs an A": {"train.overlap": True, "lora.merge": "reset"},
    "train.overlap_steps: 11 is more than train.local_steps (10)": {
        "train.overlap": True,
        "train.overlap_steps": 11,
    },
    "train.overlap_steps: needs train.overlap=true": {"train.overlap_steps": 3},
    "compress.error_feedback: false cannot be measured with train.overlap": {
        "train.overlap": True,
        "compress.error_feedback": False,
    },
    "base.keep_scale_from, keep_scale_to: 1.01 to 1.05 must hold 1": {"base.keep_scale_from": 1.01},
    "schedule.restart_warmup_steps: 21 is more than the 20 local steps between restarts": {
        "schedule.name": "jagged-cosine",
        "schedule.restart_rounds": 2,
        "schedule.restart_warmup_steps": 21,
    },
    "outer.lr, outer.momentum: need outer.name = sgd": {"outer.lr": 0.5},
    "outer.lr, outer.momentum: need": {"outer.momentum": 0.5},
    "outer.lr: with outer.name = adam a merge would move every weight by 1; try 1e-3": {"outer.name": "adam"},
    "outer.momentum: is SGD's; outer.name = adam has outer.beta1": {
        "outer.name": "adam",
        "outer.lr": 0.001,
        "outer.momentum": 0.9,
    },
    "outer.publish_ema: needs an average to publish, outer.ema": {"outer.publish_ema": True},
    "outer.trim: looks at directions alone; it needs outer.bound_norm": {"outer.trim": 0.3},
    "server.quorum: 5 is more than train.workers (4)": {"server.quorum": 5},
    "server.grace_s: 700 s is more than server.deadline_s (600 s)": {"server.grace_s": 700.0},
    "server.silence_s: 15 s must be at least 3 times worker.heartbeat_s (5.1 s)": {"worker.heartbeat_s": 5.1},
    "worker.patience_s: 14 s is less than server.silence_s (15 s)": {"worker.patience_s": 14.0},
    "server.address: 'localhost:5555' must start with tcp://, ipc://, collective:// or inprocess://": {
        "server.address": "localhost:5555"
    },
}


@pytest.mark.parametrize("line", RULES)
def test_settings_that_contradict_each_other_are_one_line(line: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config.replace(Recipe(), **RULES[line])
    (met,) = raised.value.faults
    assert met.startswith(line)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora.A": "rotating", "lora.moments": "transport"},
        {"lora.A": "frozen", "lora.merge": "reset-less"},
        {"lora.subspace": "disjoint", "lora.overrides": [{"modules": "a", "init": "semi-orthogonal"}]},
        {"lora.subspace": "shared", "lora.init": "kaiming", "lora.batch": "whole"},
        {"outer.name": "sgd", "outer.lr": 0.5, "outer.momentum": 0.9},
        {"outer.bound_norm": 1.0, "outer.trim": 0.0},
        {"outer.name": "adam", "outer.lr": 0.001},
        {"outer.ema": 0.98, "outer.publish_ema": True},
        {"schedule.name": "jagged-cosine", "schedule.restart_warmup_steps": 10},
        {"train.accumulate": 4, "lora.heads": 2},
        {"lora.scaling": "rank-stabilized", "lora.alpha": 3.0},
        {"server.quorum": 4},
        {"worker.heartbeat_s": 5.0},
        {"server.silence_s": 0.1, "worker.patience_s": 0.1},
        {"server.deadline_s": 1.0},
        {"server.grace_s": 600.0},
        {"model.num_attention_heads": 64},
        {"model.name": "vit", "data.kind": "images", "model.num_attention_heads": 128},
        {"model.name": "transformers", "model.architecture": "llama", "model.config": {"hidden_size": 8}},
        {"model.name": "transformers", "model.architecture": "resnet", "data.kind": "images"},
        {"train.rounds": 1, "train.local_steps": 1},
    ],
    ids=str,
)
def test_the_rules_allow_what_is_possible(changes: dict[str, Any]) -> None:
    """A short trial of a recipe is possible, too: its warmup is then cut off."""
    assert config.check(config.replace(Recipe(), **changes)) == []


def test_all_rules_that_are_broken_are_reported() -> None:
    changes = {"lora.heads": 3, "server.quorum": 5, "outer.lr": 0.5}
    with pytest.raises(ConfigError) as raised:
        config.replace(Recipe(), **changes)
    assert [line.split(":")[0] for line in raised.value.faults] == [
        "train.batch_size",
        "outer.lr, outer.momentum",
        "server.quorum",
    ]


# Descriptions


def test_every_setting_is_described_with_its_type() -> None:
    for key, kind, default, text in config.describe():
        assert len(text) > 5, key
        assert kind, key
        assert default, key
    types = {key: kind for key, kind, *_ in config.describe()}
    assert types["train.rounds"] == "int"
    assert types["optimizer.lr_A"] == "float or none"
    assert types["base.quant"] == "nf4|int8|none"
    assert types["lora.modules"] == "list of str"
    assert all(section.type and section.default_factory().__doc__ for section in dataclasses.fields(Recipe))


def test_the_settings_that_other_tools_use_keep_their_names() -> None:
    """DESIGN.md, section 4."""
    promised = """run.dir run.seed run.resume train.rounds train.local_steps train.workers lora.rank
        lora.scale lora.heads lora.merge lora.A base.quant server.address"""
    assert set(promised.split()) <= {key for key, *_ in config.describe()}


def test_the_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--help"])
    assert ended.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for key, kind, default, text in config.describe():
        assert f"{key} ({kind}, {default}) {' '.join(text.split())}" in words


def test_a_recipe_does_not_change() -> None:
    recipe = Recipe()
    for frozen, name in ((recipe, "train"), (recipe.train, "rounds"), (config.Override(), "rank")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, 3)
    assert hash(recipe) == hash(Recipe())


def test_differences_name_what_differs_in_order() -> None:
    one, other = Recipe(), config.replace(Recipe(), **{"train.rounds": 9, "lora.rank": 8, "run.dir": "x"})
    assert config.differences(one, other, ("train", "lora")) == [
        "lora.rank: 32 -> 8",
        "train.rounds: 50 -> 9",
    ]
    assert config.differences(one, one, ("train", "lora", "run")) == []


def test_faults_of_one_setting_and_of_several_are_reported_together() -> None:
    """A rule whose settings are wrong by themselves adds nothing; the others are still checked."""
    with pytest.raises(ConfigError) as caught:
        config.from_dict(
            {
                "train": {"rouns": 3, "workers": "many"},
                "server": {"quorum": 9, "silence_s": 1.0},
                "worker": {"heartbeat_s": 1.0},
                "model": {"num_attention_heads": 3},
                "sever": {},
            }
        )
    assert sorted(line.split(":")[0] for line in caught.value.faults) == [
        "model.num_attention_heads",
        "server.silence_s",
        "sever",
        "train.rouns",
        "train.workers",
    ]


STEPS = {"train.local_steps": 7}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer.momentum": 0.9, "optimizer.name": "adamw"}, ["optimizer.momentum=0.9"]),
        ({"optimizer.muon_momentum": 0.1, "optimizer.name": "adamw"}, ["optimizer.muon_momentum=0.1"]),
        ({"optimizer.adamw_lr": 0.1, "optimizer.name": "sgd"}, ["optimizer.adamw_lr=0.1"]),
        ({"optimizer.beta1": 0.7, "optimizer.name": "sgd"}, ["optimizer.beta1=0.7"]),
        ({"optimizer.beta1": 0.7, "optimizer.name": "muon"}, []),
        ({"optimizer.lr_A": 0.1, "lora.A": "frozen"}, ["optimizer.lr_A=0.1"]),
        ({"optimizer.lr_A": 0.1, "lora.A": "trained"}, []),
        ({"schedule.decay_share": 0.5}, ["schedule.decay_share=0.5"]),
        ({"schedule.decay_share": 0.5, "schedule.name": "wsd"}, []),
        ({"schedule.restart_rounds": 2}, ["schedule.restart_rounds=2"]),
        ({"schedule.final": 0.5, "schedule.name": "constant"}, ["schedule.final=0.5"]),
        (
            {"schedule.warmup_steps": 7, "train.rounds": 1, "train.local_steps": 7},
            ["schedule.warmup_steps=7"],
        ),
        ({"schedule.warmup_steps": 6, "train.rounds": 1, "train.local_steps": 7}, []),
        ({"ddp.hook": "powersgd"}, ["ddp.hook=powersgd"]),
        ({"train.method": "ddp", "log.diagnostics_every": 1}, ["log.diagnostics_every=1"]),
        ({"lora.modules": [], "outer.weight_decay": 0.1}, ["outer.weight_decay=0.1"]),
        ({"train.full_rank": True, "lora.dropout": 0.1}, ["lora.dropout=0.1"]),
        (
            {
                "train.full_rank": True,
                "lora.dropout": 0.1,
                "train.rounds": 4,
                "train.phases": [{"from_round": 2, "full_rank": False}],
            },
            [],
        ),
        ({"lora.rotate_every": 3}, ["lora.rotate_every=3"]),
        (
            {"train.method": "ddp", "lora.rank": 7, "compress.factors": "int2", "compress.dense": "fp32"},
            ["lora.rank=7", "compress.factors=int2", "compress.dense=fp32"],
        ),
        ({"lora.modules": [], "lora.rank": 7, "optimizer.lr": 7.0}, ["lora.rank=7", "optimizer.lr=7.0"]),
        ({"train.full_rank": True, "lora.rank": 7, "optimizer.lr": 7.0}, ["lora.rank=7", "optimizer.lr=7.0"]),
        ({"train.checkpoint_modules": ["blocks.*"]}, ["train.checkpoint_modules=('blocks.*',)"]),
        ({"train.checkpoint_modules": ["blocks.*"], "train.checkpoint_activations": True}, []),
    ],
)
def test_settings_without_effect_are_told(changes: dict[str, object], said: list[str]) -> None:
    lines = config.idle(config.replace(Recipe(), **changes))
    assert [line.split()[0].rstrip(":") for line in lines] == said
