"""`from_pretrained` for models with remote blocks, by transformers' own class names."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from petals_tune.blocks.quantization import find_scheme, usable_schemes
from petals_tune.errors import ConfigError, UnsupportedModel
from petals_tune.model.checkpoint import Checkpoint
from petals_tune.model.families import family_of, placeholder_model, without_blocks
from petals_tune.model.nested import causal_class, config_for
from petals_tune.net.members import Members
from petals_tune.remote.adapters.calls import AdapterCalls
from petals_tune.remote.adapters.registry import Adapters
from petals_tune.remote.backbone import Backbone
from petals_tune.remote.blocks import put_remote_blocks
from petals_tune.remote.config import with_changes
from petals_tune.remote.generation import RemoteGeneration, with_whole_input
from petals_tune.remote.local import LocalBlocks, parse_local_blocks
from petals_tune.remote.prompted import check_tuning_mode, with_prompts
from petals_tune.remote.selftest import self_test
from petals_tune.swarm import loop
from petals_tune.swarm.call import Calls
from petals_tune.swarm.chain import Chain
from petals_tune.swarm.formats import Formats
from petals_tune.swarm.joining import join_swarm
from petals_tune.swarm.retry import RetryPolicy
from petals_tune.swarm.routes.round_trips import HandOverRule
from petals_tune.swarm.verify import SpotChecks
from petals_tune.tuning.support import refuse_adapter_names
from petals_tune.wire.span import BlockSpan, gaps
from petals_tune.wire.tensors import FormatOption

_PREFIX = "Distributed"


class DistributedModel(AdapterCalls):
    """Mixed into one of transformers' model classes: the same model, with remote blocks."""

    plain_class: ClassVar[Any]

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        initial_peers: Sequence[str],
        tuning_mode: str | None = None,
        pre_seq_len: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        dtype: torch.dtype | str = torch.float32,
        local_blocks: Sequence[str] = (),
        local_quantization: str = "int8",
        quantization: str | None = None,
        micro_batch_rows: int | None = None,
        wire_format: FormatOption = "auto",
        grad_format: FormatOption = "auto",
        hand_over: HandOverRule = "auto",
        direct: bool = True,
        verify: float = 0.0,
        swarm_token: str | None = None,
        identity_path: str | None = None,
        policy: RetryPolicy | None = None,
        **config_changes: Any,
    ) -> Any:
        """A Hugging Face model whose blocks run on the swarm of `initial_peers`; the rest is local and frozen.

        `source` is a folder in Hugging Face format or a hub name: what the servers host. `revision`, `token` (the
        hub's) and `dtype` mean what they mean in transformers; `dtype` is that of the client's part, servers have their
        own, and "auto" is the checkpoint's. `local_blocks`, spans such as ["0:2", "28:30"], are blocks that this
        process runs itself, in `dtype` and in `local_quantization` ("int8", "nf4" or "none"), as a server would. Of the
        servers, those are used that hold their blocks in `quantization`; None: in any but "int8_activations", which has
        to be named. Hidden states travel as `wire_format` and their gradients as `grad_format` ("auto": in the dtype in
        which each server computes, which changes no number; over a line that is measured to be slow, in the formats of
        swarm/formats.py, which the log names), in micro-batches of `micro_batch_rows` rows (None: as many
        as make 128 positions). `hand_over` says whether servers send their outputs straight to the next one of a chain:
        "always", "never", or "auto", where both are far from here. `direct` lets all of it travel over TCP connections
        to servers that can be dialled, past the p2p daemons. The blocks are `model.remote_blocks`; its `close()` leaves
        the swarm. `config_changes` are fields of the config that concern the client's part, such as
        `num_labels=3`; one that concerns the blocks is refused. A share `verify` of the micro-batches is computed by a
        second server too, to find wrong answers (swarm/verify.py); no seed tells which ones. With it, nothing is handed
        on, and servers sum no gradients. `policy` says how long work is tried again.

        All that the checkpoint holds is frozen: wrap the model with PEFT, or let `tuning_mode="ptune"` (a soft prompt
        of `pre_seq_len` tokens) or `"deep_ptune"` (one at every block as well) do it: then the result is a PeftModel
        whose outputs are those of the text's positions alone. A head that the checkpoint lacks starts at random and is
        trainable.

        A private swarm wants the file `swarm_token` that its owner issued, and the identity that it names (None: beside
        it); of several processes that train together, rank 1 takes NAME.rank1.token in place of NAME.token, and so on.

        Raises UnsupportedModel, SwarmMismatch where servers hold another model, UncoveredBlocks with the command
        that would host what is missing, ServerUnreachable where no initial peer answers, AccessDenied where a private
        swarm does not let us in.
        Source: Borzunov et al. 2022, arXiv:2209.01188 (clients own the trained parameters, servers stay frozen).
        """
        check_tuning_mode(tuning_mode, pre_seq_len)
        checkpoint = Checkpoint(str(source), revision=revision, token=token)
        config = with_changes(config_for(cls.plain_class, checkpoint.config), config_changes)
        dtype = _dtype(dtype, checkpoint)
        if not isinstance(config, cls.plain_class.config_class):
            text = f"{cls.__name__} cannot load {source}: its model_type is {config.model_type!r}"
            raise UnsupportedModel(text, source=source, model_type=config.model_type)
        placeholder = placeholder_model(config)
        family = family_of(placeholder, checkpoint.config)
        local_spans = parse_local_blocks(local_blocks, family.total_blocks)
        find_scheme(local_quantization).check_available("cpu")
        tuple_length = self_test(cls.plain_class, config)
        client = loop.run(
            join_swarm(
                initial_peers,
                model=checkpoint.digest,
                source=str(source),
                blocks=gaps(local_spans, BlockSpan(0, family.total_blocks)),
                policy=policy or RetryPolicy(),
                quantizations=usable_schemes(quantization),
                members=None if swarm_token is None else Members.of_client(swarm_token, identity_path),
                direct=direct,
            )
        )
        try:
            outside = [name for name in checkpoint.tensor_names if family.is_outside(name)]
            model: Any = without_blocks(cls.plain_class, config, checkpoint.read(outside, dtype), dtype)
            checks, formats = None, Formats(hidden=wire_format, grad=grad_format)
            if verify:  # then all work is done as checks are
                hand_over = "never"
                checks = SpotChecks(client, share=verify, formats=formats)
            calls = Calls(client, formats=formats, hand_over=hand_over, sums=checks is None, observer=checks)
            backbone = Backbone(
                chain=Chain(calls),
                tuple_length=tuple_length,
                micro_batch_rows=micro_batch_rows,
                local=LocalBlocks(checkpoint, local_spans, quantization=local_quantization, dtype=dtype)
                if local_spans
                else None,
            )
            put_remote_blocks(model, family, placeholder, backbone)
            if model.can_generate():
                model.generation_config = checkpoint.generation_config
            model.name_or_path = model.config.name_or_path = str(source)
            model.__class__ = cls
            model.adapters = Adapters(model, str(source), revision)
            model.register_forward_pre_hook(_check_adapter_names)
            model.register_forward_pre_hook(
                _check_pooling if _is_classifier(cls) else with_whole_input, with_kwargs=True
            )
            return (
                model if tuning_mode is None or pre_seq_len is None else with_prompts(model, tuning_mode, pre_seq_len)
            )
        except BaseException:
            loop.run(client.close())
            raise


@functools.cache
def distributed_class(plain: type[PreTrainedModel]) -> Any:
    """The class `Distributed...` of a model class of transformers."""
    bases = (DistributedModel, RemoteGeneration, plain) if plain.can_generate() else (DistributedModel, plain)
    # `petals_tune` has all of these classes by name, so that a pickled one is found.
    inside = {"plain_class": plain, "__doc__": plain.__doc__, "__module__": "petals_tune"}
    return type(f"{_PREFIX}{plain.__name__}", bases, inside)


def distributed_class_named(name: str) -> Any:
    """`DistributedBloomForCausalLM` and its like. Raises AttributeError where transformers has no such class."""
    plain: Any = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    is_model = isinstance(plain, type) and issubclass(plain, PreTrainedModel)
    if not is_model:
        raise AttributeError(f"transformers has no model class for {name!r}")
    return distributed_class(plain)


class _AutoDistributed:
    """Chooses the class by the config of a checkpoint."""

    _mapping: ClassVar[Any]

    @classmethod
    def from_pretrained(cls, source: str, **options: Any) -> Any:
        """As `DistributedModel.from_pretrained`, of the class that transformers' auto class would choose."""
        config = Checkpoint(str(source), revision=options.get("revision"), token=options.get("token")).config
        plain = cls._plain_class(config)
        if plain is None:
            needed = cls.__name__.replace(_PREFIX, "")
            text = f"transformers has no {needed} for model_type={config.model_type!r}"
            raise UnsupportedModel(text, source=source, model_type=config.model_type)
        return distributed_class(plain).from_pretrained(source, **options)

    @classmethod
    def _plain_class(cls, config: Any) -> Any:
        """The class of transformers for `config`; None where there is none."""
        found = cls._mapping.get(type(config), None)
        return found[0] if isinstance(found, tuple) else found


class AutoDistributedModel(_AutoDistributed):
    """`transformers.AutoModel` with remote blocks."""

    _mapping = MODEL_MAPPING


class AutoDistributedModelForCausalLM(_AutoDistributed):
    """`transformers.AutoModelForCausalLM` with remote blocks.

    Of a multimodal model which that class does not know, the class of `AutoModelForImageTextToText` or
    `AutoModelForMultimodalLM`.
    """

    _mapping = MODEL_FOR_CAUSAL_LM_MAPPING

    @classmethod
    def _plain_class(cls, config: Any) -> Any:
        return causal_class(config)


class AutoDistributedModelForSequenceClassification(_AutoDistributed):
    """`transformers.AutoModelForSequenceClassification` with remote blocks; a head that is new is trainable."""

    _mapping = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


def _dtype(name: torch.dtype | str, checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype of the client's part, by transformers' names. Raises ConfigError."""
    found: Any = checkpoint.dtype if name == "auto" else name
    found = getattr(torch, found, None) if isinstance(found, str) else found
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        text = f"dtype={name!r} is not a float dtype of torch, or one's name, or 'auto': the checkpoint's"
        raise ConfigError(text, key="dtype", seen=name)
    return found


def _check_adapter_names(model: Any, args: Any) -> None:
    refuse_adapter_names(model, model.remote_blocks)


def _is_classifier(cls: Any) -> bool:
    return cls.__name__.endswith("ForSequenceClassification")


def _check_pooling(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Without token ids, transformers' heads pool the last position, whatever it holds."""
    mask = kwargs.get("attention_mask")
    if kwargs.get("inputs_embeds") is None or mask is None or mask[:, -1].all():
        return
    heads = [child for child in model.children() if child is not model.base_model]
    if not any(head._forward_pre_hooks for head in heads):  # else somebody chooses what the head sees
        raise ConfigError(
            "a soft prompt with a classification head reads the last position of a row, and here it is padding: "
            'pad on the left, tokenizer.padding_side = "left"',
            key="padding_side",
        )
