"""The model with remote blocks, as the service's parts need it: steps of answers, hidden states, trained adapters.

All of it is called from threads; adapters are an argument of each call. Shapes: S positions, H hidden size,
V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import nn

from petals_tune.errors import ConfigError
from petals_tune.remote.adapters.registry import resolved
from petals_tune.remote.session import RemoteCache
from petals_tune.service.tinker.store import LoRA
from petals_tune.service.tinker.wire import Datum
from petals_tune.swarm.loop import giving_up_on

ALPHA = 32  # of LoRA, which is scaled by ALPHA / rank. Source: Schulman et al. 2025, "LoRA Without Regret"
# Linears by the ends of their names, as the families of transformers have them.
_ATTENTION = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj"),
    *("query_key_value", "self_attention.dense", "attention.dense", "c_attn", "q_a_proj", "q_b_proj"),
    *("kv_a_proj_with_mqa", "kv_b_proj", "in_proj_qkv", "in_proj_qkvz", "in_proj_ba"),
)
_MLP = (
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "dense_h_to_4h", "dense_4h_to_h"),
    *("c_fc", "mlp.c_proj", "fc1", "fc2", "w1", "w2", "w3"),
)


class RemoteText:
    """A generation session with the adapter that its name had when it began, whatever becomes of the name."""

    def __init__(self, view: Any, base: Any, cache: RemoteCache, cancelled: threading.Event):
        """`view`: the model with that adapter on, and `base` that inside PEFT's wrapper, where it has one.

        Steps are given up soon after `cancelled` is set.
        """
        self._view, self._base, self._cache, self._cancelled = view, base, cache, cancelled

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """(V,) logits behind the last of `ids`, which are put behind the text so far."""
        # PEFT's wrapper would put a soft prompt in front of every step.
        model = self._base if self._cache.position else self._view
        with giving_up_on(self._cancelled):
            output = model(input_ids=torch.tensor([list(ids)]), past_key_values=self._cache, logits_to_keep=1)
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def fork(self) -> RemoteText:
        """Another text that begins with this one; servers keep once what both hold."""
        return RemoteText(self._view, self._base, self._cache.fork(), self._cancelled)

    def close(self) -> None:
        """Free the caches on the servers."""
        self._cache.close()


class RemoteModel:
    """The model of `from_pretrained`, and the adapters in its registry."""

    def __init__(self, model: Any):
        self._model = model
        self._seeding = threading.Lock()  # new adapters draw from the process's generator

    # Answers

    def open(self, adapter: str | None, max_length: int, cancelled: threading.Event) -> RemoteText:
        """A text of up to `max_length` tokens. Raises ConfigError for an adapter that is not there (any more)."""
        view, base = resolved(self._model, adapter)
        virtual = sum(config.num_virtual_tokens for config in _soft_prompts(view))
        return RemoteText(view, base, self._model.remote_blocks.new_session(max_length + virtual), cancelled)

    def hidden(self, ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        """(S, H) behind the last norm."""
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False, adapter=adapter
            )
        hidden: torch.Tensor = output.hidden_states[-1][0]
        return hidden[-len(ids) :]

    def all_logits(self, ids: Sequence[int], adapter: str | None) -> torch.Tensor:
        """(S, V) logits behind each position."""
        with torch.inference_mode():
            output = self._model(input_ids=torch.tensor([list(ids)]), use_cache=False, adapter=adapter)
        logits: torch.Tensor = output.logits[0]
        return logits[-len(ids) :]

    def load_for_sampling(self, adapter: str, folder: Path) -> None:
        self._model.adapters.load(adapter, folder)

    # Training

    def create(self, adapter: str, lora: LoRA) -> None:
        """Make a new adapter. Raises ConfigError where nothing would be trained."""
        with self._seeding, torch.random.fork_rng(devices=[]):
            if lora.seed is not None:
                torch.manual_seed(lora.seed)
            self._model.adapters.add(adapter, self._config(lora))

    def parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """Trained tensors, by names that do not depend on the adapter's."""
        net: PeftModel = self._model.adapters[adapter]
        return {name: each for name, each in net.named_parameters() if each.requires_grad}

    def logprobs(self, adapter: str, data: Sequence[Datum]) -> list[torch.Tensor]:
        """Log-probabilities (S,) of the targets of each text, differentiable in the adapter."""
        longest = max(len(datum.ids) for datum in data)
        ids, mask = torch.zeros(len(data), longest, dtype=torch.int64), torch.zeros(len(data), longest)
        for row, datum in enumerate(data):
            ids[row, : len(datum.ids)] = torch.tensor(datum.ids)
            mask[row, : len(datum.ids)] = 1
        logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False, adapter=adapter).logits
        found = []
        for row, datum in enumerate(data):
            targets = torch.tensor(datum.targets)[:, None]
            own = logits[row, : len(datum.ids)].float()
            found.append((own.gather(1, targets) - own.logsumexp(-1, keepdim=True)).flatten())
        return found

    def save(self, adapter: str, folder: Path) -> None:
        """Save an adapter in PEFT's format.

        Without the base model's embeddings and head, which PEFT would add in full where LoRA is on one of them.
        """
        self._model.adapters[adapter].save_pretrained(str(folder), save_embedding_layers=False)

    def load(self, adapter: str, folder: Path) -> None:
        """Put the tensors of a saved adapter into this one. Raises ConfigError where they do not fit."""
        net: PeftModel = self._model.adapters[adapter]
        name = net.active_adapter
        weights = load_peft_weights(str(folder), device="cpu")
        expected = get_peft_model_state_dict(net, adapter_name=name, save_embedding_layers=False)
        if (missing := expected.keys() ^ weights.keys()) != set():
            raise ConfigError(
                f"the checkpoint {folder.name} is of another adapter: {sorted(missing)[:2]}", key="path", seen=folder
            )
        set_peft_model_state_dict(net, weights, adapter_name=name)

    def remove(self, adapter: str) -> None:
        self._model.adapters.remove(adapter)

    def _config(self, lora: LoRA) -> LoraConfig:
        linears = [name for name, module in self._model.named_modules() if isinstance(module, nn.Linear)]
        ends = [*(_ATTENTION if lora.train_attn else ()), *(_MLP if lora.train_mlp else ())]
        names = {end for end in ends if any(linear.endswith(f".{end}") for linear in linears)}
        if lora.train_unembed and self._model.get_output_embeddings() is not None:
            head = self._model.get_output_embeddings()
            names |= {name for name, module in self._model.named_modules() if module is head}
        if not names:
            raise ConfigError("nothing of this model would be trained", key="lora_config")
        return LoraConfig(task_type="CAUSAL_LM", r=lora.rank, lora_alpha=ALPHA, target_modules=sorted(names))


def _soft_prompts(view: Any) -> list[Any]:
    """PEFT's configs of the soft prompts in front of a text."""
    return [config for config in getattr(view, "peft_config", {}).values() if config.is_prompt_learning]
