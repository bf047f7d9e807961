"""The remote blocks as a module: what a Hugging Face model finds in the place of its layer list."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from petals_tune.errors import ConfigError
from petals_tune.model.families import Family, restore_counts
from petals_tune.model.nested import decoder_path, is_nested
from petals_tune.net.stats import SwarmStats
from petals_tune.remote import arguments
from petals_tune.remote.adapters.choice import Choice
from petals_tune.remote.backbone import Backbone
from petals_tune.remote.call_prompts import check_prompts, with_prompts
from petals_tune.remote.config import BlocksConfig
from petals_tune.remote.function import loss_is_scaled
from petals_tune.remote.interleaved import Interleaved, interleaved_step
from petals_tune.remote.local import LocalBlocks
from petals_tune.remote.model_call import ModelCall
from petals_tune.remote.positions import positions_behind_gaps
from petals_tune.remote.session import RemoteCache
from petals_tune.remote.skeleton import Skeleton, Weightless, fill_with_placeholders
from petals_tune.remote.span_session import DEFAULT_MAX_LENGTH, SpanSession
from petals_tune.swarm import loop
from petals_tune.swarm.line import FormatChoice
from petals_tune.swarm.routes.route import Hop
from petals_tune.tuning.support import collect_adapter, own_parts
from petals_tune.wire.adapter import AdapterPart, AdapterVersion
from petals_tune.wire.records import ServerRecord
from petals_tune.wire.span import BlockSpan


class RemoteSpan(Skeleton):
    """Blocks `span` of a model: no weights here, and calling them runs them on the swarm.

    A slice is the module that runs these blocks, so that `nn.Sequential(blocks[:3], adapter, blocks[3:])` is a path of
    its own. Iterating gives one module for each block; in the model's own loop one for all, since a call costs a round
    trip. An int gives a weightless block, as PEFT and transformers' helpers walk them.
    """

    choice: Choice | None = None  # the adapter that a call named; None: PEFT's active ones

    def __init__(self, blocks: Any, *, span: BlockSpan, backbone: Backbone):
        super().__init__(blocks)
        self.span, self.backbone = span, backbone

    @torch.compiler.disable
    def __iter__(self) -> Iterator[Any]:
        if self.backbone.call is not None:
            return iter((self,))
        return (self[number : number + 1] for number in range(len(self)))

    @torch.compiler.disable
    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        start, stop, step = index.indices(len(self))
        if step != 1 or start >= stop:
            text = f"remote blocks are cut as start:stop with start < stop, not {index}"
            raise ConfigError(text, key="remote_blocks", seen=index)
        first = self.span.start
        cut = RemoteSpan(
            list(self.children())[index], span=BlockSpan(first + start, first + stop), backbone=self.backbone
        )
        cut.training = self.training  # not train(): the blocks stay as they are
        cut.choice = self.choice
        return cut

    def __repr__(self) -> str:
        blocks = repr(nn.ModuleList(list(self.children())))
        parts = "; ".join(f"{part.span}, {'on servers' if part.local is None else 'here'}" for part in self.parts())
        return f"{type(self).__name__}(blocks {parts}): {blocks}"

    def __getattr__(self, name: str) -> Any:
        # What a model's loop asks its layers, such as Gemma's `attention_type`, the first weightless block answers.
        if not name.startswith("_") and name not in self._modules and len(self):
            return getattr(super().__getitem__(0), name)
        return super().__getattr__(name)

    @torch.compiler.disable
    def forward(
        self,
        hidden: torch.Tensor,
        *args: Any,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        prompts: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """(B, S, H) -> (B, S, H); inside the model's own loop as a tuple, where the family's layers return tuples.

        By hand, `attention_mask` (B, S) hides padding, `position_ids` (B or 1, S) says where the text stands, and
        `prompts` (L, P, H), for the L blocks of this span, are added to the first P positions at the input of each; all
        else is refused. What the model's loop hands to its layers instead (4-D masks, rotary tables, ALiBi) is made
        again on the servers.
        """
        call = self.backbone.call
        if call is None:
            if args or kwargs:
                name = next(iter(kwargs), "a second positional argument")
                raise ConfigError(
                    f"remote_blocks(hidden, attention_mask=..., position_ids=..., prompts=...) does not take {name}",
                    key="remote_blocks",
                    seen=name,
                )
            positions = arguments.position_ids(position_ids)
            mask = arguments.padding(attention_mask, hidden.shape, positions)
            if prompts is None:
                return self.backbone.run(self, hidden, mask, positions)
            prompts = check_prompts(prompts, self.span, hidden)
            if prompts.dim() == 3:
                return self.backbone.run(self, hidden, mask, positions, prompts)
            return torch.cat(  # a server runs one set of prompts at once
                [
                    self.backbone.run(
                        self,
                        hidden[row : row + 1],
                        None if mask is None else mask[row : row + 1],
                        positions if positions is None or len(positions) == 1 else positions[row : row + 1],
                        prompts[:, row],
                    )
                    for row in range(len(hidden))
                ]
            )
        try:
            output = self._run_in(call, hidden)
        except KeyboardInterrupt:  # after which torch calls no hook, not even those that are always called
            call.end()
            raise
        length = self.backbone.tuple_length
        return (output, *[None] * (length - 1)) if length else output

    def _run_in(self, call: ModelCall, hidden: torch.Tensor) -> torch.Tensor:
        if call.session is not None:
            return self._step(hidden, call, call.session)
        if call.hidden_states is None:
            if (step := interleaved_step(self.backbone)) is not None:
                return self.backbone.run_in_step(step, self, hidden, call)
            return self.backbone.run(self, hidden, call.padding, call.positions)
        for number in range(len(self)):  # one call for each block: servers send what leaves a span, no more
            call.hidden_states.append(hidden)
            hidden = self.backbone.run(self[number : number + 1], hidden, call.padding, call.positions)
        return hidden

    @property
    def local(self) -> LocalBlocks | None:
        """What runs these blocks in this process; None: servers do, or both (see `parts`)."""
        local = self.backbone.local
        return local if local is not None and self.span in local else None

    def parts(self) -> list[RemoteSpan]:
        """These blocks in their order, cut where servers and this process take turns."""
        spans = () if self.backbone.local is None else self.backbone.local.spans
        inside = {cut for span in spans for cut in (span.start, span.stop) if self.span.start < cut < self.span.stop}
        first = self.span.start
        cuts = sorted({first, *inside, self.span.stop})
        return [self[start - first : stop - first] for start, stop in pairwise(cuts)] if inside else [self]

    def adapter(self) -> tuple[AdapterVersion | None, list[torch.Tensor]]:
        """What is trained inside these blocks. Raises UnsupportedAdapter for what servers would not run."""
        return collect_adapter(self._numbered(), self._names)

    def own_adapter(self) -> list[AdapterPart]:
        """The same, with the trained parameters themselves."""
        return own_parts(self._numbered(), self._names)

    @property
    def _names(self) -> tuple[str, ...] | None:
        return None if self.choice is None else self.choice.names

    def inference_session(self, max_length: int = DEFAULT_MAX_LENGTH) -> SpanSession:
        """A generation session on these blocks, for `max_length` positions: `session.step(hidden)`.

        Use it in a `with` block, whose end frees the caches on the servers.
        """
        return SpanSession(self.backbone.chain, self.span, max_length, **self._session_options())

    def _session_options(self) -> dict[str, Any]:
        return {"open_session": partial(self.backbone.open_session, self), "find_adapter": self._adapter_with}

    def _adapter_with(self, prompts: torch.Tensor | None) -> AdapterVersion | None:
        """What is trained inside these blocks, and the `prompts` (L, P, H) of a session's first step."""
        adapter, tensors = self.adapter()
        return adapter if prompts is None else with_prompts(adapter, tensors, prompts, self.span)[0]

    def _numbered(self) -> list[tuple[int, nn.Module]]:
        return list(enumerate(self.children(), start=self.span.start))

    def _step(self, hidden: torch.Tensor, call: ModelCall, session: RemoteCache) -> torch.Tensor:
        if session.span != self.span or session.chain is not self.backbone.chain:
            raise ConfigError(
                f"past_key_values: this generation session is for blocks {session.span} of one model, and these are "
                f"blocks {self.span}{'' if session.chain is self.backbone.chain else ' of another model'}",
                key="past_key_values",
            )
        return session.advance(
            hidden,
            padding=call.padding,
            positions=call.positions,
            adapter=lambda: self.adapter()[0],
            choice=self.choice,
        )


class RemoteBlocks(RemoteSpan):
    """All blocks of a model, in the place of its layer list."""

    def __init__(self, blocks: Any, *, backbone: Backbone):
        blocks = list(blocks)
        super().__init__(blocks, span=BlockSpan(0, len(blocks)), backbone=backbone)
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(Weightless(number))

    @property
    def stats(self) -> SwarmStats:
        """Bytes, calls, retries and waiting time so far."""
        return self.backbone.chain.client.stats

    @property
    def format_choice(self) -> FormatChoice:
        """What `wire_format` and `grad_format` of `auto` mean for training, by the measured line."""
        return self.backbone.chain.calls.choice

    def servers(self) -> tuple[ServerRecord, ...]:
        """The servers of this model that are known now."""
        return self.backbone.chain.client.servers

    def route(self) -> tuple[Hop, ...]:
        """The servers that a call through all blocks would take now; none for local blocks."""
        client = self.backbone.chain.client
        spans = [part.span for part in self.parts() if part.local is None]
        return tuple(hop for span in spans for hop in loop.run(client.route(span, work=1)))

    def interleaved(self, loss_of: Callable[[int, int], torch.Tensor], trained: Iterable[nn.Parameter]) -> Interleaved:
        """A training step that goes back with a micro-batch while others go forward; see remote/interleaved.py."""
        remote = set(self.parameters())
        behind = [parameter for parameter in trained if parameter.requires_grad and parameter not in remote]
        return Interleaved(backbone=self.backbone, loss_of=loss_of, trained=behind)

    def can_interleave(self, rows: int, positions: int, device: torch.device) -> bool:
        """Are there several micro-batches, all blocks on servers, and a loss that is not scaled?"""
        alone = self.backbone.local is None and not loss_is_scaled(device)
        return alone and torch.is_grad_enabled() and rows > self.backbone.micro_batch(positions)

    def new_session(self, max_length: int) -> RemoteCache:
        """A generation session for `max_length` text positions; caches on the servers are opened at its first use."""
        return RemoteCache(self.backbone.chain, self.span, max_length, **self._session_options())

    def inference_session(self, max_length: int = DEFAULT_MAX_LENGTH) -> RemoteCache:
        """As of a span; this one may also be passed to the model, as `past_key_values`."""
        return self.new_session(max_length)

    def close(self) -> None:
        """Leave the swarm. A call afterwards fails, also of a copy of this model, which has the same connection."""
        loop.run(self.backbone.chain.client.close())

    def register_hooks(self, owner: Any, entry: Any) -> None:
        """Catch the arguments of `owner`, the module whose forward loops over these blocks, and keep its config.

        entry: the multimodal model around it, which is given what the user gives and makes 4-D masks and positions in
               three dimensions of it; of a text model `owner` itself

        A call with `use_cache=True` alone gets a session of its own.
        """
        self._config = BlocksConfig(owner.config)
        if entry is not owner:
            entry.register_forward_pre_hook(partial(self._before_all, owner), with_kwargs=True)
            entry.register_forward_hook(self._after_all, always_call=True)
            owner.register_forward_pre_hook(self._before_inside, with_kwargs=True)
        else:
            owner.register_forward_pre_hook(self._before, with_kwargs=True)
        owner.register_forward_hook(self._after, always_call=True)

    @torch.compiler.disable
    def _before_all(self, owner: Any, entry: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        arguments.check_text_alone(entry.config, args, kwargs)
        if (positions := arguments.text_positions(kwargs.get("position_ids"))) is not None:
            kwargs = {**kwargs, "position_ids": positions}
        return self._begin(owner, args, kwargs)

    @torch.compiler.disable
    def _before(self, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        arguments.check_arguments(owner.config, args, kwargs)
        return self._begin(owner, args, kwargs)

    @torch.compiler.disable
    def _before_inside(self, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        call = self.backbone.call
        if call is None:  # the text decoder was called by itself
            return self._before(owner, args, kwargs)
        arguments.check_arguments(owner.config, args, kwargs)
        call.inside = True
        if (positions := arguments.text_positions(kwargs.get("position_ids"))) is not None:
            call.positions = positions
        return args, kwargs

    def _begin(self, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Begin a call: the arguments of the model with what remote blocks need."""
        self._config.check(owner.config)
        wants_states = arguments.option(owner.config, kwargs, "output_hidden_states")
        session = self._session_for(kwargs.get("past_key_values"), kwargs.get("use_cache"))
        if wants_states and session is not None:
            text = "output_hidden_states: a generation session has none; pass use_cache=False"
            raise ConfigError(text, key="use_cache")
        if wants_states and (wants_states is not True or kwargs.get("return_dict") is False):
            text = "output_hidden_states: pass True, and leave return_dict as it is"
            raise ConfigError(text, key="output_hidden_states")
        given_positions = arguments.position_ids(kwargs.get("position_ids"))
        positions = given_positions
        if positions is None:
            positions = self._positions(owner, args, kwargs, session)
        # In the plain model, a cache is made wherever the config or the caller does not say otherwise.
        has_cache = arguments.option(owner.config, kwargs, "use_cache")
        call = ModelCall(
            backbone=self.backbone,
            padding=arguments.padding(
                kwargs.get("attention_mask"),
                arguments.shape_of_text(args, kwargs),
                given_positions if session is None else None,
                past=0 if session is None else session.position,
                packs=not has_cache,
            ),
            positions=positions,
            session=session,
            hidden_states=[] if wants_states else None,
        )
        call.begin()
        # transformers' own capture would wait for hooks on layers that never run here.
        # With use_cache=True, MiniMax would want a cache of its own class.
        cached: dict[str, Any] = {"past_key_values": session, "use_cache": False}
        given = {**cached, "output_hidden_states": False}
        if positions is not None:
            given["position_ids"] = positions
        return args, {**kwargs, **given}

    def _positions(
        self, owner: Any, args: Any, kwargs: dict[str, Any], session: RemoteCache | None
    ) -> torch.Tensor | None:
        """Positions where a soft prompt stands before padding; None for the model's own."""
        mask, embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or (embeds is None and session is None):
            return None  # also in a forward of token ids alone, whose mask is the caller's
        tokens = embeds if embeds is not None else args[0] if args else kwargs["input_ids"]
        return positions_behind_gaps(owner, mask, tokens.shape[1])

    @torch.compiler.disable
    def _after(self, owner: nn.Module, args: Any, output: Any) -> None:
        call = self.backbone.call
        if call is None:  # it was refused
            return
        if not call.inside:
            call.end()
        if call.session is not None and output is not None:
            output["past_key_values"] = call.session
        if call.hidden_states is not None and output is not None:
            # As in transformers: what enters each block, then the end with the final norm.
            output["hidden_states"] = (*call.hidden_states, output.last_hidden_state)

    @torch.compiler.disable
    def _after_all(self, entry: nn.Module, args: Any, output: Any) -> None:
        if (call := self.backbone.call) is not None:
            call.end()

    def _session_for(self, cache: Any, use_cache: bool | None) -> RemoteCache | None:
        if isinstance(cache, RemoteCache):
            return cache
        if cache is not None:  # an empty one too: it would stay empty, and the next step begin a new text
            raise ConfigError(
                "past_key_values: a local cache knows nothing of remote blocks; pass the one that the model returned, "
                "or a session of model.inference_session()",
                key="past_key_values",
            )
        # A config says use_cache=True by default; only a caller who asks for a cache gets one.
        return self.new_session(DEFAULT_MAX_LENGTH) if use_cache and not torch.is_grad_enabled() else None


def put_remote_blocks(
    model: PreTrainedModel, family: Family, placeholder: PreTrainedModel, backbone: Backbone
) -> RemoteBlocks:
    """Put remote blocks into `model`, which was loaded without any, in place.

    placeholder: the text decoder with all blocks, which get placeholder weights in the model's dtype and are taken out
    """
    path = decoder_path(model)
    decoder = model.get_submodule(path)
    skeleton = family.blocks_of(placeholder)
    fill_with_placeholders(skeleton, model.dtype)
    blocks: Any = RemoteBlocks(skeleton.children(), backbone=backbone)
    blocks.train(model.training)  # or blocks of a model that was just loaded would drop
    family.put_blocks(decoder, blocks)
    owner = family.owner(decoder)
    owner.config.num_hidden_layers = family.total_blocks
    restore_counts(owner, family.owner(placeholder))
    entry = model.get_submodule(path.partition(".")[0]) if is_nested(model.config) else owner
    blocks.register_hooks(owner, entry)
    model.remote_blocks = blocks
    return blocks
