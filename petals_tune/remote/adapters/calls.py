"""`adapter=` and `adapters=` of a model with remote blocks: in a call, and in `generate()`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from petals_tune.errors import ConfigError
from petals_tune.remote.adapters.choice import NOT_GIVEN
from petals_tune.remote.adapters.registry import Adapters, resolved
from petals_tune.remote.adapters.rows import call_by_row, generate_by_row


class AdapterCalls:
    """Mixed into a model class: calls that name their adapter."""

    adapters: Adapters

    def __call__(
        self, *args: Any, adapter: Any = NOT_GIVEN, adapters: Sequence[str | None] | None = None, **kwargs: Any
    ) -> Any:
        """As the model's own call, with an adapter for all rows, or one for each.

        adapter:  a name in `model.adapters`, or of an adapter of PEFT's on this model; None: the base model. Left out:
                  PEFT's active adapter
        adapters: such a name, or None, for each row. Logits and losses are those of the text, a soft prompt's positions
                  left out, and `loss` is the mean over all rows, as of one batch

        Raises ConfigError for an unknown name, and for what cannot be given with it.
        """
        if adapter is NOT_GIVEN and adapters is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]  # of the user's class
        _check_one(adapter, adapters)
        if kwargs.get("inputs_embeds") is not None:
            raise ConfigError(
                "inputs_embeds: may have a soft prompt in front already (a PeftModel puts its active one there); give "
                "input_ids, and call the model itself: model(input_ids=..., adapter=NAME), where NAME is in "
                "model.adapters (load, add, or adopt(net) for the soft prompts of a PeftModel)",
                key="inputs_embeds",
            )
        if adapters is not None:
            return call_by_row(self, adapters, args, kwargs)
        return resolved(self, adapter)[0](*args, **kwargs)


def generate_with(model: Any, adapter: Any, adapters: Sequence[str | None] | None, inputs: Any, options: Any) -> Any:
    """`model.generate(inputs, **options)` with one adapter for all rows, or with one for each."""
    _check_one(adapter, adapters)
    if adapters is not None:
        return generate_by_row(model, adapters, inputs, options)
    view, base = resolved(model, adapter, keep=True)
    base.generation_config, base._active_session = model.generation_config, model._active_session
    if inputs is None and options.get("inputs_embeds") is None:
        options = {"input_ids": None, **options}  # PEFT asks for the name, also where the session has the text
    return view.generate(inputs, **options)


def _check_one(adapter: Any, adapters: Any) -> None:
    if adapter is not NOT_GIVEN and adapters is not None:
        raise ConfigError("adapter= is for all rows and adapters= for each: give one of them", key="adapters")
