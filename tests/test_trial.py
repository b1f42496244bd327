"""Models of transformers with a manner of their own: what they need is given to them, or they are refused
before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_tasks import Data, data, recipe_of
from torch import nn
from torch.nn import functional as F

from launch import local
from lte import cli, config, models, recipes
from lte.config import Recipe
from lte.errors import ConfigError
from lte.models import hf
from lte.tasks import task_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
__all__ = ["data"]  # a fixture

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 16, "causal": True}


def recipe_for(architecture: str, data: Data, settings: dict[str, Any], **changes: Any) -> Recipe:
    """A small recipe for an architecture, of text."""
    asked = {"model.architecture": architecture, "model.config": settings}
    return config.replace(recipe_of("gpt2", data, **changes), **asked)


# Padding: packed text has none, and no token is taken for it


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        *(
            (architecture, SMALL)
            for architecture in (
                "roberta",
                "camembert",
                "data2vec-text",
                "xlm-roberta",
                "xlm-roberta-xl",
                "roberta-prelayernorm",
            )
        ),
        ("xlm", XLM),
    ],
)
def test_a_model_that_looks_for_padding_finds_none(
    architecture: str,
    settings: dict[str, Any],
    data: Data,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Every token has a position of its own, from the first on, and every row is trained."""
    capfd.readouterr()
    recipe = recipe_for(architecture, data, settings)
    model = recipes.initial_model(recipe)
    assert capfd.readouterr().err == "", "the library has nothing to warn of"
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    assert [table.padding_idx for table in tables] == [None] * len(tables)
    assert all(bool(table.weight.any(1).all()) for table in tables)
    tokens = torch.tensor([[7, 1, 255, 0, 2, 1, 1, 1, 255, 255, 0, 0, 1, 5, 3, 1]])
    given, _ = models.outputs(model, tokens)
    positions = torch.arange(16)[None]
    assert torch.equal(given, model(tokens, position_ids=positions, use_cache=False).logits)
    F.cross_entropy(given.flatten(0, 1), tokens.flatten()).backward()
    of_positions = next(table for table in tables if len(table.weight) == 16)
    assert bool(of_positions.weight.grad.any(1).all())  # type: ignore[union-attr]

    model.eval().save_pretrained(tmp_path / "model")
    with hf.quiet():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(theirs(tokens).logits, models.outputs(model, tokens)[0])
    # A recipe that starts from it takes the setting with the others.
    hf.compare(recipe.model, "text", tmp_path / "model")
    theirs.config.pad_token_id = 1
    theirs.config.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="pad_token_id is 1, not -1"):
        hf.compare(recipe.model, "text", tmp_path / "model")


def test_a_padding_that_is_asked_for_takes_its_positions(data: Data) -> None:
    short = recipe_for("roberta", data, {**SMALL, "pad_token_id": 1, "max_position_embeddings": 17})
    line = r"16 is more than the 15 positions of this roberta; set model\.config\.max_position_embeddings=18$"
    with pytest.raises(ConfigError, match=line):
        task_of(short).build()
    model = recipes.initial_model(
        config.replace(short, **{"model.config": {**SMALL, "pad_token_id": 1, "max_position_embeddings": 18}})
    )
    tokens = torch.arange(2, 18)[None]
    expected = model(tokens, position_ids=torch.arange(2, 18)[None]).logits
    assert torch.equal(models.outputs(model, tokens)[0], expected)


def test_a_roberta_learns(data: Data, tmp_path: Path) -> None:
    address = {"run.dir": str(tmp_path / "run"), "server.address": f"inprocess://{tmp_path}"}
    recipe = recipe_for("roberta", data, SMALL, **address, **{"train.local_steps": 15})
    assert local.train_in_threads(recipe) == 0
    with torch.no_grad():
        begun = task_of(recipe).evaluate(recipes.initial_model(recipe).eval(), 0).loss
        done = task_of(recipe).evaluate(recipes.load_run(tmp_path / "run", "master")[0], 0).loss
    assert done < 0.95 * begun
    arguments = ["export", str(tmp_path / "run"), "--format", "hf", "--out", str(tmp_path / "model")]
    assert cli.main(arguments) == 0
    assert transformers.AutoConfig.from_pretrained(tmp_path / "model").pad_token_id == -1
