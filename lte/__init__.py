"""lte: pretrain networks from scratch with LoRA workers and a parameter server.

model = lte.convert(model, lte.LoRA(rank=32))
with lte.Worker(model, server="tcp://10.0.0.1:5555") as worker:
    for batch in loader:
        loss = model(batch)
        loss.backward()
        if not worker.step(loss):
            break
"""

from lte.config import (
    Base,
    Compress,
    Data,
    Eval,
    Log,
    LoRA,
    Model,
    Optimizer,
    Outer,
    Override,
    Recipe,
    Run,
    Schedule,
    Train,
    WorkerSettings,
)
from lte.config import Server as ServerSettings
from lte.nn import LoRALinear, convert, join_experts, split_experts
from lte.server import Server
from lte.worker import Worker

__version__ = "0.1.0"

__all__ = [
    "Base",
    "Compress",
    "Data",
    "Eval",
    "LoRA",
    "LoRALinear",
    "Log",
    "Model",
    "Optimizer",
    "Outer",
    "Override",
    "Recipe",
    "Run",
    "Schedule",
    "Server",
    "ServerSettings",
    "Train",
    "Worker",
    "WorkerSettings",
    "__version__",
    "convert",
    "join_experts",
    "split_experts",
]
