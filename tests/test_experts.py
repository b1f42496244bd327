"""Mixtures of experts of transformers, whose experts lie in parameters of three dimensions."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_start import starting
from test_tasks import Data, data, recipe_of
from torch import Tensor, nn

import lte
from lte import LoRA, cli, config, convert, models, recipes, split_experts
from lte.config import Model
from lte.errors import ConfigError
from lte.export.merged import in_transformers
from lte.models import hf
from lte.nn import Experts, adapted_modules, experts_split, has_split_experts, places_in_stacks, plan

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
__all__ = ["data"]  # a fixture

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 16,
    "num_experts_per_tok": 2,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "layer_types": None},  # (in, out), biases, a gate of its own
    "qwen3_moe": {"num_experts": 5, "moe_intermediate_size": 24},
    "cohere2_moe": {"num_experts": 4},
    "exaone_moe": {"num_experts": 4, "moe_intermediate_size": 24},
    "aria_text": {"moe_num_experts": 4},
}


def mixture(name: str) -> Any:
    """One of `MIXTURES`, as the library makes it, with numbers of its own in all tensors."""
    settings = {key: value for key, value in (_SMALL | MIXTURES[name]).items() if value is not None}
    if name == "aria_text":
        settings = {k: v for k, v in settings.items() if k != "num_experts_per_tok"} | {"moe_topk": 2}
    described = Model(name="transformers", architecture=name, config=settings, context_tokens=16)
    model = hf.build(described, "text")
    models.initialize(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def tokens() -> Tensor:
    return torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(2))


def stacked_gradients(model: nn.Module, split: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every parameter with experts its gradient, and what those of its parts are together."""
    found: dict[str, list[Tensor]] = {}
    for name, (parameter, _) in places_in_stacks(model).items():
        weight = split.get_parameter(f"{name}.weight").grad
        assert weight is not None, name
        transposed = model.get_submodule(parameter.rpartition(".")[0]).is_transposed
        found.setdefault(parameter, []).append(weight.mT if transposed else weight)
    grads = {name: model.get_parameter(name).grad for name in found}
    return {name: (grads[name], torch.stack(parts)) for name, parts in found.items()}  # type: ignore[misc]


@pytest.mark.parametrize("name", MIXTURES)
def test_split_experts_compute_what_the_librarys_do(name: str) -> None:
    """Outputs and gradients, those of experts that no row is sent to among them."""
    model = mixture(name)
    split = split_experts(copy.deepcopy(model))
    found = [module for module in split.modules() if isinstance(module, Experts)]
    assert found and not any(parameter.dim() > 2 for parameter in split.parameters())
    for given in (tokens(), tokens()[:1, :1]):  # one row is sent to two experts
        for one in (model, split):
            one.zero_grad()
            one(given, use_cache=False).logits.square().mean().backward()
        expected = model(given, use_cache=False).logits
        assert torch.allclose(split(given, use_cache=False).logits, expected, atol=1e-6)
        for key, (wanted, met) in stacked_gradients(model, split).items():
            assert torch.allclose(met, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max())), key
    assert any((met == 0).flatten(1).all(1).any() for _, met in stacked_gradients(model, split).values())


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_a_model_is_the_librarys_again_with_what_its_experts_were_given(name: str) -> None:
    model = mixture(name)
    before, modules = {k: v.clone() for k, v in model.state_dict().items()}, dict(model.named_modules())
    with experts_split(model):
        assert model.state_dict().keys() != before.keys()
        for parameter in model.parameters():
            parameter += 1
    assert dict(model.named_modules()) == modules
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key] + (key in parameters)), key


def described(model: nn.Module) -> dict[str, Any]:
    """What a model's modules and parameters are, in their order, but for the numbers."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: (type(module), module.training) for name, module in model.named_modules()} | {
        f"{name} ": (p.shape, p.dtype, p.requires_grad, p.stride()) for name, p in parameters
    }


@pytest.mark.parametrize("name", MIXTURES)
def test_joined_experts_are_the_librarys_as_they_were_trained(name: str, tmp_path: Path) -> None:
    """Names, shapes, numbers, and what asks for gradients; what is written is read again."""
    library = mixture(name)
    library.model.layers[1].mlp.experts.requires_grad_(False)
    model = split_experts(copy.deepcopy(library))
    with torch.no_grad():
        for one in (model, library):
            for parameter in one.parameters():
                parameter += 1 / 4
    model = copy.deepcopy(model)
    expected = model(tokens(), use_cache=False).logits.detach()
    assert lte.join_experts(model) is model
    assert described(model) == described(library)
    other = lte.join_experts(split_experts(copy.deepcopy(library)).bfloat16())
    assert described(other) == described(copy.deepcopy(library).bfloat16())
    state = library.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    with hf.quiet():
        model.save_pretrained(tmp_path / "joined")
        again, found = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "joined", output_loading_info=True
        )
    assert not any(found.values())
    assert again.state_dict().keys() == state.keys()
    wanted, *met = (one.eval()(tokens(), use_cache=False).logits for one in (library, model, again))
    assert all(torch.equal(logits, wanted) for logits in met)
    assert torch.allclose(wanted, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("frozen", ["gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"])
def test_weights_and_biases_are_frozen_each_for_itself(frozen: str) -> None:
    model = mixture("gpt_oss")
    for name, parameter in model.named_parameters():
        if name.endswith(frozen):
            parameter.requires_grad_(False)
    before = described(model)
    projection = frozen.removesuffix("_bias")
    kind = "weight" if frozen == projection else "bias"
    for name, parameter in split_experts(model).named_parameters():
        if ".experts." in name:
            assert parameter.requires_grad != (f".{projection}." in name and name.endswith(kind)), name
    assert described(lte.join_experts(model)) == before


def test_the_mode_of_experts_is_kept() -> None:
    """Heads compute in no model that is in eval mode; a child has a mode of its own."""
    model = mixture("mixtral").eval()
    before = described(model)
    assert not any(module.training for module in split_experts(copy.deepcopy(model)).modules())
    converted = convert(split_experts(copy.deepcopy(model)), LoRA(rank=4), "none")
    assert not any(module.training for module in converted.modules())
    assert described(lte.join_experts(split_experts(model))) == before
    model.train().model.layers[0].mlp.experts.act_fn.eval()
    before = described(model)
    assert [name for name, module in split_experts(model).named_modules() if not module.training] == [
        "model.layers.0.mlp.experts.act_fn"
    ]
    assert described(lte.join_experts(model)) == before
    assert described(lte.join_experts(split_experts(model).eval())) == described(model.eval())


def test_hooks_of_stacked_experts_are_kept_there_and_back() -> None:
    """With their handles."""
    model, called = mixture("mixtral"), list[str]()
    experts = model.model.layers[0].mlp.experts
    handles = [
        experts.register_forward_pre_hook(lambda *_: called.append("before")),
        experts.register_forward_hook(lambda *_: called.append("after")),
        experts.register_full_backward_hook(lambda *_: called.append("backward")),
    ]
    expected = ["before", "after", "backward"]

    def met() -> list[str]:
        called.clear()
        model(tokens(), use_cache=False).logits.sum().backward()
        return list(called)

    assert met() == expected
    split_experts(model)
    assert met() == expected
    handles.append(model.model.layers[0].mlp.experts.register_forward_hook(lambda *_: called.append("new")))
    assert met() == ["before", "after", "new", "backward"]
    handles.pop().remove()
    lte.join_experts(model)
    assert met() == expected
    for handle in handles:
        handle.remove()
    assert met() == []


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_that_would_be_lost_are_refused(hook: str) -> None:
    model = mixture("mixtral")
    weight = model.model.layers[1].mlp.experts.down_proj
    handle = getattr(weight, hook)(lambda _: None)
    before = dict(model.named_modules())
    with pytest.raises(ConfigError, match=r"^model.layers.1.mlp.experts.down_proj: has a hook on its grad"):
        split_experts(model)
    assert dict(model.named_modules()) == before
    handle.remove()
    expert = split_experts(model).get_submodule("model.layers.1.mlp.experts.down_proj.2")
    before = dict(model.named_modules())
    for handle in (getattr(expert.weight, hook)(lambda _: None), expert.register_forward_hook(print)):
        with pytest.raises(ConfigError, match=r"^model.layers.1.mlp.experts.down_proj.2: has hooks, "):
            lte.join_experts(model)
        assert dict(model.named_modules()) == before
        handle.remove()
    assert not has_split_experts(lte.join_experts(model))


def test_experts_under_several_names_are_the_same_under_each() -> None:
    """A layer that is there twice, and experts of two layers."""
    model = mixture("mixtral")
    layers = model.model.layers
    layers.append(layers[0])
    layers[1].mlp.experts = layers[0].mlp.experts
    plain = copy.deepcopy(model)
    names = [f"model.layers.{k}.mlp.experts" for k in range(3)]
    with experts_split(plain):
        assert {type(plain.get_submodule(name)) for name in names} == {Experts}
    assert described(plain) == described(model)
    assert all(name.startswith(names[0]) for name in places_in_stacks(plain))
    expected = plain(tokens(), use_cache=False).logits.detach()
    split_experts(model)
    (one,) = {model.get_submodule(name) for name in names}
    assert isinstance(one, Experts)
    assert torch.allclose(model(tokens(), use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    lte.join_experts(model)
    assert len({model.get_submodule(name) for name in names}) == 1
    assert described(model) == described(plain)
    assert torch.equal(model(tokens(), use_cache=False).logits, expected)


def test_bare_experts_are_refused() -> None:
    experts = mixture("mixtral").model.layers[0].mlp.experts
    with pytest.raises(ConfigError, match=r"^a bare MixtralExperts has no parent .*; wrap it in a module$"):
        split_experts(experts)
    wrapped = split_experts(nn.Sequential(experts))
    with pytest.raises(ConfigError, match=r"^a bare Experts has no parent .*; wrap it in a module$"):
        lte.join_experts(wrapped[0])
    assert type(lte.join_experts(wrapped)[0]) is type(experts)


def test_experts_with_heads_are_not_joined() -> None:
    model = convert(split_experts(mixture("mixtral")), LoRA(rank=4, exclude=("*.experts.gate_up_proj.*",)))
    before = dict(model.named_modules())
    line = r"^model.layers.0.mlp.experts.down_proj.0: is a LoRALinear, which the library has no place for; "
    with pytest.raises(ConfigError, match=line):
        lte.join_experts(model)
    assert dict(model.named_modules()) == before
    plain = convert(split_experts(mixture("mixtral")), LoRA(rank=4, exclude=("*.experts.*",)))
    assert not has_split_experts(lte.join_experts(plain))


BALANCED: dict[str, dict[str, Any]] = {
    "jetmoe": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "kv_channels": 16,
        "num_local_experts": 4,
        "aux_loss_coef": 0.5,
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 2,
        "n_layers": 2,
        "max_seq_len": 16,
        "attn_config": {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_top_k": 2, "moe_loss_weight": 0.5},
    },
}
"""Mixtures that call the weight of the loss that balances them otherwise than the others."""


@pytest.mark.parametrize("name", BALANCED)
def test_experts_are_balanced_by_whatever_name_the_weight_has(name: str) -> None:
    settings = BALANCED[name] | {"output_router_logits": True}
    model: Any = hf.build(
        Model(name="transformers", architecture=name, config=settings, context_tokens=16), "text"
    ).train()
    _, met = models.outputs(model, tokens())
    expected = model(tokens(), use_cache=False).aux_loss
    assert met is not None and expected > 0.5 and torch.equal(met, expected / 2)
    assert models.outputs(model.eval(), tokens())[1] is None


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("exaone_moe", MIXTURES["exaone_moe"]),
        ("granitemoe", {"router_aux_loss_coef": None, "head_dim": None}),
    ],
)
def test_balancing_experts_without_a_loss_for_it_is_refused_before_a_run(
    name: str, more: dict[str, Any]
) -> None:
    settings = {key: value for key, value in (_SMALL | more).items() if key != "head_dim" or value}
    asked = Model(
        name="transformers",
        architecture=name,
        config=settings | {"output_router_logits": True},
        context_tokens=16,
    )
    with pytest.raises(ConfigError, match=rf"^model.config.output_router_logits: this {name} has no loss "):
        models.build(asked)
    models.build(dataclasses.replace(asked, config=settings))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_heads_of_experts_against_stacked_weights(name: str) -> None:
    """(W + s B A) of each expert, in the library's own forward."""
    model = mixture(name)
    plain = copy.deepcopy(model)
    converted = convert(
        split_experts(model), LoRA(rank=4, scale=2.0, modules=("*.experts.*",)), "none"
    ).train()
    adapted, places = dict(adapted_modules(converted)), places_in_stacks(plain)
    assert adapted.keys() == places.keys()
    generator = torch.Generator().manual_seed(3)
    for site, (parameter, place) in places.items():
        heads = adapted[site]
        heads.lora_B.copy_(torch.randn(heads.lora_B.shape, generator=generator))
        product = 2.0 * heads.lora_B[0].double() @ heads.lora_A[0].double()
        weight = plain.get_parameter(parameter)[place]
        weight += (product.mT if name == "gpt_oss" else product).float()
    expected = plain(tokens(), use_cache=False).logits
    met = converted(tokens(), use_cache=False).logits
    assert (met - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@torch.no_grad()
def test_a_mixture_goes_to_the_librarys_layout_and_back(name: str, data: Data, tmp_path: Path) -> None:
    library = mixture(name).eval()
    library.save_pretrained(tmp_path / "theirs")
    recipe = recipe_of(
        "mixtral", data, **{"model.architecture": name, "model.init_from": str(tmp_path / "theirs")}
    )
    recipe = config.replace(
        recipe,
        **{"model.config": {k: v for k, v in (_SMALL | MIXTURES[name]).items() if v is not None}},
    )
    ours = starting(recipe, tmp_path / "theirs").eval()
    assert any(isinstance(module, Experts) for module in ours.modules())
    expected = library(tokens(), use_cache=False).logits
    assert torch.allclose(ours(tokens(), use_cache=False).logits, expected, atol=1e-6)
    with hf.quiet():
        in_transformers(ours, recipe).save_pretrained(tmp_path / "again")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    theirs = again.state_dict()
    assert theirs.keys() == library.state_dict().keys()
    assert all(torch.equal(theirs[key], tensor) for key, tensor in library.state_dict().items())


def test_heads_that_share_the_batch_out_cannot_be_of_experts(
    data: Data, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line says so before anything starts."""
    file = tmp_path / "recipe.yaml"
    two = {"lora.heads": 2, "run.dir": str(tmp_path / "run")}
    file.write_text(config.to_yaml(recipe_of("mixtral", data, **two)))
    assert cli.main(["train", str(file)]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "model.layers.0.mlp.experts.gate_up_proj.0, " in err and "rows of all samples" in err
    for more in ({"lora.exclude": ["*.experts.*"]}, {"lora.batch": "whole"}):
        address = {"server.address": f"inprocess://{tmp_path}", "run.resume": "never"}
        with recipes.make_server(recipe_of("mixtral", data, **two, **more, **address), display=False):
            pass


@pytest.mark.parametrize(
    ("name", "called", "settings"),
    [
        ("jetmoe", "JetMoE", BALANCED["jetmoe"]),
        ("llama4_text", "Llama 4", _SMALL | {"num_local_experts": 4, "intermediate_size_mlp": 48}),
    ],
)
def test_the_readme_names_mixtures_whose_experts_stay_stacked(
    name: str, called: str, settings: dict[str, Any]
) -> None:
    described = Model(name="transformers", architecture=name, config=settings, context_tokens=16)
    decided = plan(models.build(described), LoRA(), "int8")
    assert any(len(shape) == 3 for shape in decided.dense.values())
    readme = " ".join((Path(__file__).parent.parent / "README.md").read_text().split())
    _, named = readme.split("Experts that transformers stacks", 1)
    assert called in named.split("are trained densely")[0]


def test_experts_by_other_rules_are_left_alone() -> None:
    """Those of a module that does not say how it is laid out, or has more parameters of its own."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 4))
            self.down_proj = nn.Parameter(torch.zeros(2, 4, 4))

    model = nn.Sequential(Own())
    names = [name for name, _ in split_experts(model).named_parameters()]
    assert names == ["0.gate_up_proj", "0.down_proj"]
    mixtral = mixture("mixtral")
    for module in mixtral.modules():
        if hasattr(module, "is_transposed"):
            module.temperature = nn.Parameter(torch.ones(1))
    before = [name for name, _ in mixtral.named_parameters()]
    assert [name for name, _ in split_experts(mixtral).named_parameters()] == before
