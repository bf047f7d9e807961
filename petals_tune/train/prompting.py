"""How an adapter was trained to be asked: read from the training data, and applied to the data of an evaluation."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from itertools import islice, takewhile
from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedTokenizerBase

from petals_tune.data.chitchat import persona_message
from petals_tune.data.examples import AnyExample, Chat, Example, LabelledText, Message, Text
from petals_tune.data.source import CountedExamples, Source
from petals_tune.tuning.identity import Prompting

SAMPLED_EXAMPLES = 500  # sources yield their examples in a pseudorandom order

TEMPLATE_KEY = "source.columns.template"  # of the section `data`


def prompting_of(source: Source, tokenizer: PreTrainedTokenizerBase, *, stage: str = "fit") -> Prompting:
    """Read from the first examples of a source, those of a stage of Lightning's, how they ask.

    A system text counts where all of them have the same one; texts of each row's own are part of the rows.
    """
    split = {"fit": source.train, "validate": source.validation, "test": source.test}[stage]
    examples = list(islice(split(), SAMPLED_EXAMPLES))
    match examples[0] if examples else None:
        case LabelledText():
            template = getattr(getattr(source, "columns", None), "template", None)
            return Prompting(form="label", template=template)
        case Text():
            return Prompting(form="text")
    texts = {system_text(turns_of(example)) for example in examples} or {None}
    no_lines = str(persona_message([])["content"])
    per_row = len(texts) > 1
    persona = per_row and all(text is not None and text.startswith(no_lines) for text in texts)
    return Prompting(
        system=no_lines if persona else None if per_row else texts.pop(),
        per_row=per_row,
        persona=persona,
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def turns_of(example: AnyExample) -> Sequence[Message]:
    """Return the turns of a chat; none of other examples."""
    match example:
        case Example(context=turns) | Chat(messages=turns):
            return turns
    return ()


def system_text(turns: Sequence[Message]) -> str | None:
    """Return the text of the first system turn; None without one."""
    return next((str(turn["content"]) for turn in turns if turn["role"] == "system"), None)


def with_trained_template(data: DictConfig, prompting: Prompting) -> DictConfig:
    """Return the section `data` with the adapter's template of label rows, where it describes such rows."""
    if prompting.template is None or OmegaConf.select(data, TEMPLATE_KEY) in (None, prompting.template):
        return data
    changed = data.copy()
    OmegaConf.update(changed, TEMPLATE_KEY, prompting.template)
    return changed


def asked_as_trained(source: Source, own: Prompting, prompting: Prompting) -> Source:
    """Return `source`, which asks as `own` says, with the adapter's system text in place of its own.

    System texts of each row's own stay, since they are content. Where the adapter's rows had those, the source's stays.
    """
    if own.form != "chat" or prompting.form != "chat" or own.system == prompting.system:
        return source
    return source if own.per_row or prompting.per_row else WithSystem(source, prompting.system)


class WithSystem:
    """A source with the same system text in all chats, or with none where `system` is None."""

    def __init__(self, source: Source, system: str | None):
        self._source, self._system = source, system

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    @property
    def description(self) -> str:
        return self._source.description

    def train(self) -> Iterator[AnyExample]:
        return self._all_changed(self._source.train())

    def validation(self) -> Iterator[AnyExample]:
        return self._all_changed(self._source.validation())

    def test(self) -> Iterator[AnyExample]:
        return self._all_changed(self._source.test())

    def _all_changed(self, examples: Iterator[AnyExample]) -> Iterator[AnyExample]:
        if isinstance(examples, CountedExamples):
            return CountedExamples(self._each_changed(examples), examples.left_out, examples.refuse)
        return map(self._changed, examples)

    def _each_changed(self, examples: CountedExamples) -> Generator[tuple[int, AnyExample]]:
        try:
            for example in examples:
                yield examples.row, self._changed(example)
        finally:
            examples.close()

    def _changed(self, example: AnyExample) -> AnyExample:
        before = list(takewhile(lambda turn: turn["role"] == "system", turns_of(example)))
        system: list[Message] = [{"role": "system", "content": self._system}] if self._system else []
        if before == system:
            return example
        match example:
            case Example(context=context):
                return replace(example, context=(*system, *context[len(before) :]))
            case Chat(messages=messages, learned=learned):
                moved = len(system) - len(before)
                turns = (*system, *messages[len(before) :])
                return replace(example, messages=turns, learned=tuple(position + moved for position in learned))
        return example
