"""Models of transformers with a manner of their own: what they need is given to them, or they are refused
before anything starts."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import Family
from test_tasks import MODELS, Data, data, recipe_of
from torch import nn
from torch.nn import functional as F

from launch import local
from lte import cli, config, ddp, models, recipes
from lte.config import Recipe
from lte.errors import ConfigError
from lte.models import hf
from lte.tasks import task_of, try_out

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
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Every token has a position of its own, from the first on, and every row is trained."""
    recipe = recipe_for(architecture, data, settings)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)  # which does not hand on what it hears
    try:
        model = recipes.initial_model(recipe)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.messages, "the library has nothing to warn of"
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


# Who cannot be trained is told so before anything starts

XMOD = (
    "xmod",
    {**SMALL, "languages": ["en_XX"]},
    r"model\.config: this xmod cannot run \(ValueError: Input lang",
)
CPMANT = (
    "cpmant",
    {"hidden_size": 32, "num_attention_heads": 2, "dim_head": 16, "dim_ff": 64, "num_hidden_layers": 2},
    r"model\.config: this cpmant predicts tokens from those after them; choose an architecture that does not",
)


@pytest.mark.parametrize(
    ("architecture", "settings", "line"),
    [
        XMOD,
        CPMANT,
        ("xlm", {**XLM, "causal": False}, "model.config: this xlm predicts tokens from those after them"),
        ("prophetnet", {}, "model.config: this prophetnet cannot run"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(
    architecture: str, settings: dict[str, Any], line: str, data: Data, tmp_path: Path
) -> None:
    if architecture == "prophetnet":
        settings = {"hidden_size": 32, "num_decoder_layers": 1, "num_decoder_attention_heads": 2}
        settings |= {"decoder_ffn_dim": 32, "num_encoder_layers": 1, "encoder_ffn_dim": 32}
    address = {"run.dir": str(tmp_path / "run"), "server.address": f"inprocess://{tmp_path}"}
    recipe = recipe_for(architecture, data, settings, **address)
    with pytest.raises(ConfigError, match=f"^{line}.*$") as raised:
        recipes.make_server(recipe)
    assert len(raised.value.faults) == 1
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=f"^{line}"):
        ddp.check(config.replace(recipe, **{"train.method": "ddp", "server.address": "tcp://127.0.0.1:*"}))


def test_no_worker_starts_for_it(data: Data, tmp_path: Path) -> None:
    architecture, settings, line = CPMANT
    path = tmp_path / "recipe.yaml"
    recipe = recipe_for(architecture, data, settings, **{"run.dir": str(tmp_path / "run")})
    path.write_text(config.to_yaml(recipe))
    family = Family(tmp_path)
    try:
        command = family.start("train", path)
        assert command.ended() == 2, command.err
        assert re.fullmatch(f"lte: {line}.*\n", command.err)
        assert not (tmp_path / "run").exists()
    finally:
        family.close()


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].get("name") == "transformers"])
def test_who_can_is_left_as_it_is(name: str, data: Data) -> None:
    recipe = recipe_of(name, data)
    model = recipes.initial_model(recipe).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    drawn = torch.get_rng_state()
    try_out(model, recipe)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_one_that_runs_at_one_length_alone_is_tried_at_it(data: Data) -> None:
    recipe = config.replace(recipe_of("gpt2", data), **{"model.context_tokens": 40})

    class Fixed(nn.Module):
        main_input_name = "input_ids"

        def __init__(self) -> None:
            super().__init__()
            self.table, self.lengths = nn.Embedding(256, 8), list[int]()

        def forward(self, tokens: torch.Tensor, use_cache: bool) -> Any:
            if tokens.shape[1] != 40:
                raise ValueError("40 tokens, please")
            return SimpleNamespace(logits=self.table(tokens))

    try_out(Fixed(), recipe)
    with pytest.raises(ConfigError, match=r"cannot run \(ValueError: 40 tokens, please\)$"):
        try_out(Fixed(), config.replace(recipe, **{"model.context_tokens": 41}))


def test_a_limit_of_minus_one_is_none(data: Data) -> None:
    """XLNet says so of its positions; it looks ahead unless it is told not to."""
    small = {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32}
    for attention in ("uni", "bi"):
        recipe = recipe_for("xlnet", data, {**small, "attn_type": attention})
        model = recipes.initial_model(recipe)
        if attention == "uni":
            try_out(model, recipe)
        else:
            with pytest.raises(ConfigError, match="this xlnet predicts tokens from those after them"):
                try_out(model, recipe)
