"""A language model on packed text: every token is predicted from those before it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lte import models
from lte.config import Recipe
from lte.data import Index, TrainingStream, tokenizer, validation_batches
from lte.errors import ConfigError
from lte.server.evaluation import Measured

EVAL_BATCH = 32
"""Sequences evaluated at a time."""


class Text:
    """See `base.Task`. A batch is int64 (sequences, context_tokens + 1)."""

    unit = "nats a token"

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def build(self) -> nn.Module:
        return models.build(self.recipe.model)

    def initialize(self, model: nn.Module, seed: int) -> None:
        models.initialize(model, seed)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits, auxiliary = models.outputs(model, batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        return loss if auxiliary is None else loss + auxiliary

    def stream(self, slot: int) -> TrainingStream:
        return TrainingStream(
            self.recipe.data.shards,
            context_tokens=self.recipe.model.context_tokens,
            batch_size=self.recipe.train.batch_size,
            seed=self.recipe.run.seed,
            worker=slot,
            num_workers=self.recipe.train.workers,
        )

    def noise(self, num_samples: int, device: torch.device) -> Tensor:
        model = self.recipe.model
        return torch.randint(model.vocab_size, (num_samples, model.context_tokens + 1), device=device)

    def num_tokens(self, batch: Tensor) -> int:
        return batch[:, 1:].numel()

    def evaluate(self, model: nn.Module, max_tokens: int) -> Measured:
        total, count = 0.0, 0
        for sequences in validation_batches(
            self.recipe.data.shards,
            context_tokens=self.recipe.model.context_tokens,
            batch_size=EVAL_BATCH,
            max_tokens=max_tokens,
        ):
            num_tokens = self.num_tokens(sequences)
            total += float(self.loss(model, sequences)) * num_tokens
            count += num_tokens
        return Measured(total / count)

    def check(self) -> None:
        data, vocab_size = self.recipe.data, self.recipe.model.vocab_size
        index = Index.load(Path(data.shards))
        if index.vocab_size > vocab_size:
            raise ConfigError(
                [
                    f"model.vocab_size: {vocab_size} is less than the {index.vocab_size} tokens of"
                    f" {data.shards} ({index.tokenizer}); set model.vocab_size={index.vocab_size}"
                ]
            )

    def check_run(self) -> None:
        self.check()
        self.build()
        for slot in range(self.recipe.train.workers):
            self.stream(slot)
        context_tokens = self.recipe.model.context_tokens
        validation_batches(self.recipe.data.shards, context_tokens=context_tokens, batch_size=EVAL_BATCH)

    @torch.no_grad()
    def sample(self, model: nn.Module, prompt: str, num_tokens: int, *, temperature: float, seed: int) -> str:
        """The prompt and what the model writes after it.

        Args:
            num_tokens: how many to add. temperature: 0 takes the likeliest token each time.
        """
        reader = tokenizer.load(Path(self.recipe.data.shards))
        tokens = torch.as_tensor(reader.encode(prompt or "\n").astype("int64"))
        generator = torch.Generator().manual_seed(seed)
        for _ in range(num_tokens):
            logits = models.outputs(model, tokens[None, -self.recipe.model.context_tokens :])[0][0, -1]
            if temperature == 0:
                token = logits.argmax(keepdim=True)
            else:
                token = torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator)
            tokens = torch.cat([tokens, token])
        return reader.decode(tokens.tolist())
