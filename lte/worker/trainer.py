"""Local training: heads, their optimizer, what is sent of them and what an update does to them.

No socket and no clock: a trainer is a function of its batches and of the updates it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lte import compress, lowrank, quantize, schedule
from lte.compress import A, B
from lte.config import Optimizer, Recipe
from lte.errors import DigestError
from lte.nn import LoRALinear, adapted_modules, dense_parameters, draw_heads, parameter_groups

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def make_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """The recipe's optimizer for a converted model: groups lora_A, lora_B, dense and dense vectors."""
    rates = {
        "lora_A": settings.lr if settings.lr_A is None else settings.lr_A,
        "lora_B": settings.lr,
        "dense": settings.dense_lr,
    }
    groups = []
    for kind, parameters in parameter_groups(model).items():
        matrices = [p for p in parameters if p.ndim >= 2]
        vectors = [p for p in parameters if p.ndim < 2]
        decay = settings.dense_weight_decay if kind == "dense" else 0.0
        for chosen, weight_decay in ((matrices, decay), (vectors, 0.0)):
            if chosen:
                groups.append({"params": chosen, "lr": rates[kind], "weight_decay": weight_decay})
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)


class Trainer:
    """Trains the heads and dense parameters of one converted model.

    Attributes:
        version: the version of the base. local_step: optimizer steps since then.
        draw: which draw of A the heads have; see `_draw_at`.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        slot: int,
        version: int,
        base: Mapping[str, Tensor],
        base_digest: str,
        optimizer: torch.optim.Optimizer | MakeOptimizer | None = None,
    ) -> None:
        """Fill the model from a base and draw its heads.

        Args:
            model: converted; with memory (see `materialize`).
            slot: place among all workers; its heads are the global heads slot * H ... .
            base, base_digest: as published with `version`.
            optimizer: over the model's parameters, or what makes one; None: the recipe's.

        Raises:
            DigestError: the base does not have its digest.
        """
        self.model, self.recipe, self.version = model, recipe, version
        self.local_step = 0
        self.draw = self._draw_at(version)
        if any(parameter.is_meta for parameter in model.parameters()):
            materialize(model, torch.device("cpu"))
        self.modules: dict[str, LoRALinear] = dict(adapted_modules(model))
        self.heads = next((m.heads for m in self.modules.values()), 1)
        self.first_head = slot * self.heads
        self.dense = dict(dense_parameters(model))
        self._has_merged = False
        self._published: dict[str, Tensor] = {}
        self._sent: dict[str, Tensor] = {}
        self._load(self._staged(base, base_digest))
        draw_heads(model, recipe.lora, seed=recipe.run.seed, first_head=self.first_head, draw=self.draw)
        if optimizer is None:
            self.optimizer = make_optimizer(model, recipe.optimizer)
        elif isinstance(optimizer, torch.optim.Optimizer):
            self.optimizer = optimizer
        else:
            self.optimizer = optimizer(model)
        self._peak_rates = [float(group["lr"]) for group in self.optimizer.param_groups]

    # Local steps

    def step(self) -> None:
        """Clip the gradients, let the optimizer step at its scheduled rates, clear the gradients."""
        factor = self._factor(self.local_step)
        for group, peak in zip(self.optimizer.param_groups, self._peak_rates, strict=True):
            group["lr"] = peak * factor
        settings = self.recipe.optimizer
        if settings.clip_norm:
            groups = parameter_groups(self.model)
            if settings.clip_by == "all":
                groups = {"all": [p for parameters in groups.values() for p in parameters]}
            for parameters in groups.values():
                nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.local_step += 1

    def _factor(self, local_step: int) -> float:
        step = self.version * self.recipe.train.local_steps + local_step
        return schedule.factor(self.recipe.schedule, step, self.recipe.total_steps)

    # Contributions

    @torch.no_grad()
    def contribution(self) -> dict[str, Tensor]:
        """The tensors that tell the server what was learnt beyond what it has merged.

        They are remembered until the next update: what the server rebuilds of them is what an
        update that merged them takes away here.
        """
        sent: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            if module.lora_A.requires_grad:
                sent[name + A] = compress.encode_difference(module.lora_A, module.merged_A).detach().cpu()
            sent[name + B] = compress.encode_difference(module.lora_B, module.merged_B).detach().cpu()
        for name, parameter in self.dense.items():
            sent[name] = compress.encode_difference(parameter, self._published[name]).detach().cpu()
        # Copies: an fp32 factor that travels whole would else change under training.
        self._sent = {name: tensor.clone() for name, tensor in sent.items()}
        return self._sent

    def base_digest(self) -> str:
        """Digest of the base and the published dense parameters that this model holds."""
        tensors: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            tensors |= compress.encode_base(name, module.base)
        return quantize.digest((tensors | self._published).items())

    def merged_digest(self) -> str:
        """Digest of the merged factors; of nothing while these are zero."""
        if not self._has_merged:
            return quantize.digest([])
        merged = {}
        for name, module in self.modules.items():
            assert module.merged_A is not None and module.merged_B is not None
            merged[name + A], merged[name + B] = module.merged_A, module.merged_B
        return quantize.digest(sorted(merged.items()))

    def given_digest(self) -> str:
        """Digest of A where it is not sent, because the server draws it too; else ''."""
        if self.recipe.lora.A == "trained" or not self.modules:
            return ""
        return quantize.digest((name + A, module.lora_A) for name, module in self.modules.items())

    # Updates

    @torch.no_grad()
    def apply(self, version: int, published: Mapping[str, Tensor], base_digest: str, *, merged: bool) -> None:
        """Take over a published version whole, or not at all.

        Args:
            merged: whether the last `contribution` is in it. Only then do the heads change; what
                was not merged stays in them and is sent by the next contribution.

        Raises:
            DigestError: the update does not have its digest; nothing was changed.
        """
        staged = self._staged(published, base_digest)
        for name, parameter in self.dense.items():
            # d <- d_new + (d - d_old - own merged part)
            ahead = parameter - self._published[name]
            if merged:
                ahead = ahead - self._sent[name].to(parameter.device)
            parameter.copy_(staged[name].to(parameter.device) + ahead)
        self._load(staged, dense=False)
        self.version, self.local_step = version, 0
        if merged:
            self._settle_heads()
        self._sent = {}

    def _settle_heads(self) -> None:
        """The heads' contribution is in the base now: take it out of them, by the merge mode."""
        lora = self.recipe.lora
        for name, module in self.modules.items():
            sent_B = self._sent[name + B].to(module.lora_B.device)
            if lora.merge == "reset-less":
                assert module.merged_A is not None and module.merged_B is not None
                module.merged_B.copy_(compress.rebuild(sent_B, module.merged_B))
                if module.lora_A.requires_grad:
                    sent_A = self._sent[name + A].to(module.lora_A.device)
                    module.merged_A.copy_(compress.rebuild(sent_A, module.merged_A))
                else:
                    module.merged_A.copy_(module.lora_A)
            elif lora.merge == "reset-b":
                module.lora_B.sub_(sent_B)  # what compression left out stays owed
            else:
                module.lora_B.zero_()
        self._has_merged = lora.merge == "reset-less"
        if (draw := self._draw_at(self.version)) != self.draw:
            self.draw = draw
            self._redraw(transport=lora.moments == "transport", clear=lora.moments == "clear")

    def _draw_at(self, version: int) -> int:
        """Which draw of A belongs to a version: the same on all workers, also on late and new ones,
        so that disjoint subspaces stay disjoint."""
        lora = self.recipe.lora
        if lora.A == "rotating":
            return version // lora.rotate_every
        return version if lora.merge == "reset" else 0

    def _redraw(self, *, transport: bool, clear: bool) -> None:
        """New A, and the optimizer's moments kept, carried over or cleared."""
        lora, seed = self.recipe.lora, self.recipe.run.seed
        for name, module in self.modules.items():
            new_A = lowrank.draw_A_of_heads(
                module.rank,
                module.in_features,
                init=module.init,
                subspace=lora.subspace,
                seed=seed,
                module=name,
                heads=range(self.first_head, self.first_head + module.heads),
                draw=self.draw,
            ).to(module.lora_A.device)
            if transport:
                for head in range(module.heads):
                    self._transport_moments(module, head, new_A[head])
            module.lora_A.copy_(new_A)
            if clear:
                for parameter in (module.lora_A, module.lora_B):
                    self.optimizer.state.pop(parameter, None)

    def _transport_moments(self, module: LoRALinear, head: int, new_A: Tensor) -> None:
        state = self.optimizer.state.get(module.lora_B, {})
        first, second = state.get("exp_avg"), state.get("exp_avg_sq")
        if first is None:  # SGD: its momentum is linear in the gradient too
            first = state.get("momentum_buffer")
        if first is None:
            return
        squares = torch.zeros_like(first[head]) if second is None else second[head]
        moved, moved_squares = lowrank.transport(first[head], squares, module.lora_A[head], new_A)
        first[head].copy_(moved)
        if second is not None:
            second[head].copy_(moved_squares)

    # The base

    def _staged(self, received: Mapping[str, Tensor], base_digest: str) -> dict[str, Tensor]:
        """The tensors of a version, complete and with the right digest."""
        expected: dict[str, tuple[torch.dtype, torch.Size]] = {}
        for name, module in self.modules.items():
            for key, tensor in compress.encode_base(name, module.base).items():
                expected[key] = (tensor.dtype, tensor.shape)
        for name, parameter in self.dense.items():
            expected[name] = (torch.float32, parameter.shape)
        if {name: (t.dtype, t.shape) for name, t in received.items()} != expected:
            raise DigestError("the server published tensors of other names, shapes or dtypes")
        staged = {name: received[name] for name in expected}
        if quantize.digest(staged.items()) != base_digest:
            raise DigestError("what arrived of the server's version differs from what it published")
        return staged

    @torch.no_grad()
    def _load(self, staged: Mapping[str, Tensor], *, dense: bool = True) -> None:
        for name, module in self.modules.items():
            base = compress.decode_base(name, module.base, staged)
            module.codes.copy_(base.codes)
            module.scales.copy_(base.scales)
        for name, parameter in self.dense.items():
            self._published[name] = staged[name].to(parameter.device, copy=True)
            if dense:
                parameter.copy_(staged[name])


def materialize(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device, with memory for parameters that are on the meta device.

    Their contents are undefined until somebody fills them. In a converted model no weight (out, in)
    is among them: the base took its place in `lte.convert`.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                if parameter not in made:
                    real = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    made[parameter] = nn.Parameter(real, requires_grad=parameter.requires_grad)
                setattr(module, name, made[parameter])
    return model.to(device)
