"""`from_pretrained` for models with remote blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from petals_tune.checkpoint import Checkpoint
from petals_tune.errors import UnsupportedModel
from petals_tune.families import family_of, hollow_base_model
from petals_tune.remote.blocks import RemoteBlocks
from petals_tune.remote.generation import with_remote_generation
from petals_tune.remote.skeleton import hollow_out
from petals_tune.swarm import loop
from petals_tune.swarm.chain import Chain
from petals_tune.swarm.client import SwarmClient
from petals_tune.swarm.members import Members, identity_beside
from petals_tune.swarm.retry import RetryPolicy
from petals_tune.wire.span import BlockSpan
from petals_tune.wire.tensors import WireFormat


class _AutoDistributed:
    """Loads the library's own class, and puts remote blocks in the place of its layer list."""

    _mapping: ClassVar[Any]
    _needs: ClassVar[str]

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        initial_peers: Sequence[str],
        dtype: torch.dtype = torch.float32,
        micro_batch_rows: int | None = None,
        wire_format: WireFormat = "float32",
        grad_format: WireFormat = "float32",
        token: str | None = None,
        identity_path: str | None = None,
        policy: RetryPolicy | None = None,
        **config_changes: Any,
    ) -> PreTrainedModel:
        """A Hugging Face model whose blocks run on the swarm of `initial_peers`; the rest is local and frozen.

        `source` is a folder in Hugging Face format or a hub name: what the servers host. Hidden states travel as
        `wire_format` and their gradients as `grad_format`, in micro-batches of `micro_batch_rows` rows (None: as many
        as make 128 positions). The blocks
        are `model.remote_blocks`; its `close()` leaves the swarm. Everything is frozen: wrap the model with PEFT.
        A private swarm wants the file `token` that its owner issued, and the identity that it names (None: beside it).

        Raises UnsupportedModel, SwarmMismatch where servers hold another model, UncoveredBlocks with the command
        that would host what is missing, ServerUnreachable where no initial peer answers, AccessDenied where a private
        swarm does not let us in.
        Source: Borzunov et al. 2022, arXiv:2209.01188 (clients own the trained parameters, servers stay frozen).
        """
        checkpoint = Checkpoint(str(source))
        config = copy.deepcopy(checkpoint.config)
        for name, value in config_changes.items():
            setattr(config, name, value)
        if type(config) not in cls._mapping:
            raise UnsupportedModel(f"transformers has no {cls._needs} for model_type={config.model_type!r}")
        hollow = hollow_base_model(config)
        family = family_of(hollow)
        client = loop.run(
            SwarmClient.join(
                initial_peers,
                model=checkpoint.digest,
                blocks=BlockSpan(0, family.total_blocks),
                policy=policy or RetryPolicy(),
                members=None if token is None else Members.with_token(token, identity_beside(token, identity_path)),
            )
        )
        try:
            outside = [name for name in checkpoint.tensor_names if family.block_index(name) is None]
            model = _without_blocks(cls._mapping[type(config)], config, checkpoint.read(outside, dtype), dtype)
        except BaseException:
            loop.run(client.close())
            raise
        skeleton = getattr(hollow, family.blocks)
        hollow_out(skeleton, dtype)
        blocks = RemoteBlocks(
            skeleton.children(),
            family=family,
            chain=Chain(client, wire_format=wire_format, grad_format=grad_format),
            micro_batch_rows=micro_batch_rows,
        )
        base: Any = model.base_model
        setattr(base, family.blocks, blocks)
        blocks.caught.watch(base, blocks.new_session)
        model.remote_blocks = blocks
        model.config.num_hidden_layers = family.total_blocks
        model.name_or_path = model.config._name_or_path = str(source)
        return with_remote_generation(model).requires_grad_(False).eval()


def _without_blocks(
    model_class: type[PreTrainedModel], config: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> PreTrainedModel:
    """The client's part, loaded by the library as a model of no blocks: rotary tables are real, heads stay tied."""
    zero = copy.deepcopy(config)
    zero.num_hidden_layers = 0
    return model_class.from_pretrained(None, config=zero, state_dict=tensors, dtype=dtype)


class AutoDistributedModelForCausalLM(_AutoDistributed):
    """`transformers.AutoModelForCausalLM` with remote blocks."""

    _mapping = MODEL_FOR_CAUSAL_LM_MAPPING
    _needs = AutoModelForCausalLM.__name__


class AutoDistributedModelForSequenceClassification(_AutoDistributed):
    """`transformers.AutoModelForSequenceClassification` with remote blocks."""

    _mapping = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    _needs = AutoModelForSequenceClassification.__name__
