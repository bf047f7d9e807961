"""Registry of adapter methods, which clients and servers share: one class a method, in a file of its own.

To add a method: write its class, and list it here.
"""

from __future__ import annotations

from petals_tune.adapters.base import AdapterMethod
from petals_tune.adapters.expert_lora import ExpertLoRA
from petals_tune.adapters.ia3 import IA3
from petals_tune.adapters.lora import LoRA
from petals_tune.adapters.prompt import Prompt

METHODS: dict[str, AdapterMethod] = {method.name: method for method in (LoRA(), ExpertLoRA(), IA3(), Prompt())}

__all__ = ["METHODS", "AdapterMethod"]
