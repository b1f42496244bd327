"""Hooks of modules that `lte.convert` replaces."""

import copy
import weakref

import pytest
import torch
from torch import nn

import lte
from lte.errors import ConfigError


class Net(nn.Module):
    """One module of each kind, and two of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.conv = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Conv2d(1, 1, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 12, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.up(input=self.table(tokens))
        x = x + self.attention(x, x, x)[0]
        return self.out(self.conv(x[:, None]).squeeze(1))


HOOKED = ("table", "up", "conv", "attention", "attention.out_proj", "out")


def seeded() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def hook(net: Net, called: list[tuple[object, ...]]) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks of each kind on each module, which change what they see, and tell."""

    def of(name: str, module: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        def pre(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            called.append((name, "before", sorted(kwargs)))
            doubled = (
                {k: v * 2 if v is not None else v for k, v in kwargs.items()} if name == "up" else kwargs
            )
            return args, doubled

        def post(_: nn.Module, args: tuple, y: object) -> object:
            called.append((name, "after"))
            return y * 0.5 if isinstance(y, torch.Tensor) else (y[0] * 0.5, *y[1:])

        def backward(_: nn.Module, x_grad: tuple, y_grad: tuple) -> None:
            called.append((name, "backward"))

        def backward_pre(_: nn.Module, y_grad: tuple) -> None:
            called.append((name, "before backward"))

        handles = [module.register_forward_pre_hook(pre, with_kwargs=True)]
        handles.append(module.register_forward_hook(post, always_call=True))
        if name not in ("table", "up"):  # of which torch sees no input that asks for a gradient
            handles.append(module.register_full_backward_hook(backward))
            handles.append(module.register_full_backward_pre_hook(backward_pre))
        return handles

    return [handle for name in HOOKED for handle in of(name, net.get_submodule(name))]


@pytest.mark.parametrize("tied", ["adapted", "dense"])
def test_hooks_are_called_as_of_the_plain_modules(tied: str) -> None:
    """The converted model computes what the plain one does, B being zero, with the same calls in the same
    order; torch's attention calls no out_proj, so neither are hooks of that."""
    tokens = torch.randint(12, (3, 5), generator=torch.Generator().manual_seed(0))
    plain, expected, met = seeded(), [], []
    hook(plain, expected)
    wanted = plain(tokens)
    wanted.square().mean().backward()
    model = seeded()
    handles = hook(model, met)
    lte.convert(model, lte.LoRA(rank=2, embeddings=True, tied=tied), "none")
    assert len(list(lte.nn.adapted_modules(model))) == (5 if tied == "adapted" else 4)
    y = model(tokens)
    y.square().mean().backward()
    assert met == expected
    assert {name for name, *_ in met} == set(HOOKED) - {"attention.out_proj"}
    assert torch.allclose(y, wanted, atol=1e-6)
    assert (model(tokens) - seeded()(tokens)).abs().max() > 1e-3, "hooks change nothing: the test is blind"
    for handle in handles:
        handle.remove()
    met.clear()
    assert torch.allclose(model(tokens), seeded()(tokens), atol=1e-6)
    assert met == []


def test_a_copy_has_hooks_of_its_own() -> None:
    model, called = seeded(), []
    handles = hook(model, called)
    other = copy.deepcopy(lte.convert(model, lte.LoRA(rank=2), "int8"))
    for handle in handles:
        handle.remove()
    other(torch.zeros(1, 2, dtype=torch.long))
    assert called


def test_a_forward_that_one_module_alone_has_is_kept() -> None:
    model = seeded()
    inner = model.up.forward
    model.up.forward = lambda input: inner(input) * 0
    owner = weakref.ref(model.up)
    lte.convert(model, lte.LoRA(rank=2), "none")
    assert model.up is owner()
    assert torch.equal(model.up(input=torch.ones(2, 8)), torch.zeros(2, 8))


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_gradients_of_adapted_weights_are_refused(register: str) -> None:
    model = seeded()
    handle = getattr(model.up.weight, register)(lambda gradient: None)
    getattr(model.up.bias, register)(lambda gradient: None)
    with pytest.raises(ConfigError, match=r"^up\.weight: has a hook on its gradient, .* in lora\.exclude"):
        lte.convert(model, lte.LoRA(rank=2), "int8")
    assert isinstance(model.up, nn.Linear), "nothing is converted"
    lte.convert(copy.deepcopy(model), lte.LoRA(rank=2, exclude=("up",)), "int8")
    handle.remove()
    lte.convert(model, lte.LoRA(rank=2), "int8")
