"""What a run trained, for other libraries.

merged    the whole model: in transformers' layout, or as safetensors
adapters  workers' heads, as PEFT adapters
"""

from __future__ import annotations

from lte.export.adapters import to_peft
from lte.export.merged import to_safetensors, to_transformers

__all__ = ["to_peft", "to_safetensors", "to_transformers"]
