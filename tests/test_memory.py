"""No weight (out, in) in full precision is made on a worker but one at a time, and none is kept."""

import gc
import weakref

import pytest
import torch
from simulation import recipe
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lte
from lte.server.master import Master
from lte.worker.trainer import Trainer, materialize

OUT, IN, VOCABULARY = 256, 192, 320
WEIGHTS = {OUT * IN, 3 * IN * IN, IN * IN, VOCABULARY * IN}
"""Elements of the adapted weights below; nothing else has as many."""


class Net(nn.Module):
    """Every kind of module that takes heads, with a tied table, a frozen vector and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, IN)
        self.attention = nn.MultiheadAttention(IN, 4, batch_first=True)
        self.norm, self.up, self.down = nn.LayerNorm(IN), nn.Linear(IN, OUT), nn.Linear(OUT, IN)
        self.conv = nn.Conv2d(IN // 4, OUT, (2, 2))
        self.head = nn.Linear(IN, VOCABULARY, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("turns", torch.ones(IN))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens) * self.turns
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.attention(x, x.clone(), x.clone(), need_weights=False)[0]
        x = x + self.down(self.up(self.norm(x)).relu())
        image = x[:, :4].reshape(len(x), IN // 4, 4, 4)
        return self.head(x + self.conv(image).mean((1, 2, 3))[:, None, None])


class Watch(TorchDispatchMode):
    """Floating-point tensors with the memory of a whole weight, that operators gave.

    Attributes:
        made: how many. most_alive: how many at a time, most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made = self.most_alive = 0
        self._alive: dict[int, object] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {self._memory(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta or not tensor.is_floating_point():
                continue
            at = self._memory(tensor)
            # A view of what was given is no new one.
            if tensor.untyped_storage().nbytes() // 4 in WEIGHTS and at not in given:
                self.made += 1
                self._alive[at] = weakref.finalize(tensor.untyped_storage(), self._alive.pop, at, None)
                self.most_alive = max(self.most_alive, len(self._alive))
        return out

    @staticmethod
    def _memory(tensor: torch.Tensor) -> int:
        return 0 if tensor.is_meta else tensor.untyped_storage()._cdata

    @property
    def num_alive(self) -> int:
        gc.collect()
        return len(self._alive)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize(("heads", "merge"), [(1, "reset-b"), (2, "reset-less")])
def test_a_worker_never_holds_more_than_one_weight_and_keeps_none(heads: int, merge: str, quant: str) -> None:
    settings = recipe(
        **{
            "base.quant": quant,
            "lora.heads": heads,
            "lora.merge": merge,
            "lora.tied": "adapted",
            "compress.factors": "int4",
            "optimizer.name": "adamw",
        }
    )
    master = Master(Net(), settings)
    with torch.device("meta"):
        model = Net()
    adapted = {spec.parameter for spec in master.plan.adapted.values()}
    assert adapted == {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    snapshot, digest = master.snapshot(), master.base_digest()
    with Watch() as watch:
        materialize(lte.convert(model, settings.lora, quant), torch.device("cpu"))
        trainer = Trainer(model, settings, slot=0, version=0, base=snapshot, base_digest=digest)
    assert watch.made == 0
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))

    tokens = torch.randint(VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # B is zero the first time
        with Watch() as watch:
            loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            assert watch.num_alive == 0, "the graph keeps a weight for its backward pass"
            assert watch.made >= len(adapted), "the watch is blind"
            loss.backward()
            assert watch.num_alive == 0
            assert watch.most_alive == 1
        with Watch() as watch:
            trainer.step()
        assert watch.made == 0
    with Watch() as watch:
        list(trainer.contribution())
        trainer.apply(1, snapshot, digest, merged=False, whole=True)
    assert watch.made == 0


def test_the_watch_sees_a_weight_that_is_kept() -> None:
    """By its size, which nothing else has: as where a weight that is made anew is multiplied with."""
    sizes = {parameter.numel() for parameter in Net().parameters() if parameter.dim() > 1}
    assert sizes == WEIGHTS
    linear, x = nn.Linear(IN, OUT), torch.randn(2, IN, requires_grad=True)
    with Watch() as watch:
        y = F.linear(x, linear.weight * 1)
        assert (watch.made, watch.num_alive, watch.most_alive) == (1, 1, 1)
        z = F.linear(x, linear.weight + 1)
        assert watch.most_alive == 2
        del y, z
        assert watch.num_alive == 0
