"""OpenAI's paths: models, chats, completions, embeddings."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from petals_tune.errors import ConfigError
from petals_tune.service.decoding.decoder import Piece
from petals_tune.service.decoding.grammar import ANY_OBJECT, json_grammar
from petals_tune.service.decoding.options import DecodingOptions
from petals_tune.service.decoding.sampler import Choice, given_choices
from petals_tune.service.metrics import Asker, Metrics
from petals_tune.service.openai.answers import Answer, TextLogprobs, TokenTexts, chat_logprobs, head, usage
from petals_tune.service.openai.bodies import ChatBody, CompletionBody, EmbeddingBody, ResponseFormat, read
from petals_tune.service.openai.chunks import ChatChunks, Chunks, TextChunks
from petals_tune.service.openai.prompts import chat_prompt
from petals_tune.service.openai.tools import forced_calls, usable_tools
from petals_tune.service.served import Offer, Served
from petals_tune.service.users.fairness import Fairness
from petals_tune.service.web.responses import EventStream, unless_left

MOST_TOKENS = 4096  # of an answer whose request names no limit, or what is left of the model's positions
MOST_ANSWERS = 128  # to one request, of all its prompts
MOST_EMBEDDINGS = 2048  # of one request, as OpenAI documents
COMPLETION_TOKENS = 16  # of a completion whose request names no limit, as OpenAI documents


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt that is answered once for each of `options`."""

    offer: Offer
    asker: Asker
    ids: Sequence[int]
    options: Sequence[DecodingOptions]


class OpenAI:
    """The endpoints. `request.state.owner` is whose key came with a request."""

    def __init__(self, served: Served, fairness: Fairness, metrics: Metrics):
        self._served, self._fairness, self._metrics = served, fairness, metrics
        self._texts = TokenTexts(served.tokenizer)
        longest = max(map(len, served.tokenizer.get_vocab()))
        self._most_characters = served.most_positions * longest
        self._echoing = asyncio.Lock()  # logits of all positions of a long prompt are large

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
            Route("/v1/embeddings", self._embeddings, methods=["POST"]),
        ]

    # Endpoints

    async def _models(self, request: Request) -> Response:
        offers = self._served.of(request.state.owner)
        return JSONResponse({"object": "list", "data": [_offered(offer) for offer in offers]})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(_offered(self._served.find(request.path_params["name"], request.state.owner)))

    async def _chat(self, request: Request) -> Response:
        body: ChatBody = read(ChatBody, await request.body())
        offer = self._served.find(body.model, request.state.owner)
        with_tools, ids, options = await asyncio.to_thread(self._prepared, body)  # a text or a schema may be long
        asked = self._asked(request, offer, ids, options, body.n)
        parallel = body.parallel_tool_calls is not False
        if body.stream:
            chunks = ChatChunks(
                offer.name, self._texts, with_usage=body.with_usage, with_tools=with_tools, parallel=parallel
            )
            return await self._streamed(request, asked, chunks, with_usage=body.with_usage)
        answers = await unless_left(request.receive, self._answers(asked))
        choices = []
        for number, answer in enumerate(answers):
            message, finish = answer.message(with_tools=with_tools, parallel=parallel)
            logprobs = chat_logprobs(answer.choices, self._texts) if body.logprobs else None
            choices.append({"index": number, "message": message, "finish_reason": finish, "logprobs": logprobs})
        return JSONResponse(
            {**head("chat.completion", offer.name), "choices": choices, "usage": usage(len(ids), answers)}
        )

    async def _completion(self, request: Request) -> Response:
        body: CompletionBody = read(CompletionBody, await request.body())
        offer = self._served.find(body.model, request.state.owner)
        limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        all_asked = []
        for ids in await asyncio.to_thread(self._prompts, body.prompt, "prompt", MOST_ANSWERS // (body.n or 1)):
            if body.echo and not limit:
                options = self._options(body, ids, 1, logprobs=body.logprobs)  # for its checks
                all_asked.append(replace(self._asked(request, offer, ids, options, body.n), options=()))
            else:
                options = self._options(body, ids, limit, logprobs=body.logprobs)
                all_asked.append(self._asked(request, offer, ids, options, body.n))
        if body.stream:
            if len(all_asked) > 1 or body.echo:
                raise ConfigError("a stream answers one prompt, without echo: send several requests", key="stream")
            start = len(self._text_of(all_asked[0].ids))
            chunks = TextChunks(offer.name, self._texts, with_usage=body.with_usage, start=start)
            return await self._streamed(request, all_asked[0], chunks, with_usage=body.with_usage)
        found = await unless_left(request.receive, self._completed(all_asked, body))
        choices = [{"index": number, **choice} for number, (choice, _) in enumerate(found)]
        counts = usage(sum(len(each.ids) for each in all_asked), [answer for _, answer in found])
        return JSONResponse({**head("text_completion", offer.name), "choices": choices, "usage": counts})

    async def _embeddings(self, request: Request) -> Response:
        body: EmbeddingBody = read(EmbeddingBody, await request.body())
        owner = request.state.owner
        offer = self._served.find(body.model, owner)
        texts = await asyncio.to_thread(self._prompts, body.input, "input", MOST_EMBEDDINGS)
        for ids in texts:
            if len(ids) > self._served.most_positions:
                most = self._served.most_positions
                raise ConfigError(f"input: {len(ids)} tokens, and this model has {most}", key="input", seen=len(ids))
        tokens, asker = sum(map(len, texts)), _asker(owner, offer)
        self._fairness.check(owner, 1, time.monotonic())

        async def embedded() -> list[Any]:
            found = []
            with self._fairness.in_flight(owner), self._metrics.in_flight(asker):
                for ids in texts:
                    async with self._fairness.slots.held(owner), offer.in_use() as adapter:
                        hidden = await asyncio.to_thread(self._served.reader.hidden, ids, adapter)
                    found.append(_embedding(hidden, as_bytes=body.encoding_format == "base64"))
            return found

        vectors = await unless_left(request.receive, embedded())
        self._fairness.charge(owner, tokens, time.monotonic())
        self._metrics.count_tokens(asker, "read", tokens)
        return JSONResponse(
            {
                "object": "list",
                "model": offer.name,
                "data": [
                    {"object": "embedding", "index": number, "embedding": vector}
                    for number, vector in enumerate(vectors)
                ],
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    # From a body to what is asked of the decoder

    def _prepared(self, body: ChatBody) -> tuple[bool, list[int], DecodingOptions]:
        """(Whether there are tools to call, the prompt, the options) of a chat."""
        if body.top_logprobs and not body.logprobs:
            raise ConfigError("top_logprobs needs logprobs=true", key="top_logprobs")
        format = self._served.format
        tools = usable_tools(body, self._served.tokenizer.chat_template)
        prompt = chat_prompt(body.messages, tools, format)
        ids = self._encoded(prompt, special=not format.has_template, key="messages")
        options = self._options(
            body,
            ids,
            body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=forced_calls(body, tools) or _grammar_of(body.response_format),
        )
        return bool(tools), ids, options

    def _encoded(self, text: str, *, special: bool, key: str) -> list[int]:
        """Token ids of a text. Raises ConfigError for one that is too long, before it is looked at."""
        if len(text) > self._most_characters:
            raise ConfigError(
                f"{key}: {len(text)} characters are more than the {self._served.most_positions} positions of this "
                "model",
                key=key,
                seen=len(text),
            )
        ids: list[int] = self._served.tokenizer(text, add_special_tokens=special).input_ids
        return ids

    def _text_of(self, ids: Sequence[int]) -> str:
        text: str = self._served.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _prompts(self, given: str | list[str | int | list[int]], key: str, most: int) -> list[list[int]]:
        """Token ids of one to `most` texts. Raises ConfigError for a text without a token."""
        texts: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        if not 1 <= len(texts) <= most:
            raise ConfigError(f"{key}: {len(texts)} texts: 1 to {most} are understood", key=key, seen=len(texts))
        found = [self._encoded(text, special=True, key=key) if isinstance(text, str) else text for text in texts]
        vocabulary = len(self._served.tokenizer)
        for ids in found:
            if not ids or not all(isinstance(token, int) and 0 <= token < vocabulary for token in ids):
                raise ConfigError(
                    f"{key}: a text, or token ids of 0 to {vocabulary - 1}; not an empty one", key=key, seen=ids[:9]
                )
        return found

    def _options(
        self,
        body: ChatBody | CompletionBody,
        ids: Sequence[int],
        limit: int | None,
        *,
        logprobs: int | None,
        grammar: str | None = None,
    ) -> DecodingOptions:
        room = self._served.most_positions - len(ids)
        if room < 1 or (limit is not None and limit > room):
            raise ConfigError(
                f"{len(ids)} tokens and an answer of up to {limit or 1} are more than the "
                f"{self._served.most_positions} positions of this model: shorten the one or the other",
                key="max_completion_tokens" if isinstance(body, ChatBody) else "max_tokens",
                seen=limit,
            )
        return DecodingOptions(
            max_tokens=min(room, MOST_TOKENS) if limit is None else limit,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            seed=body.seed,
            stop=body.stops,
            logit_bias=body.biases,
            frequency_penalty=body.frequency_penalty or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            logprobs=logprobs,
            grammar=grammar,
        )

    def _asked(
        self, request: Request, offer: Offer, ids: Sequence[int], options: DecodingOptions, n: int | None
    ) -> Asked:
        """`n` answers to a prompt; where they have a seed, each has another."""
        seeds = [None if options.seed is None else options.seed + number for number in range(n or 1)]
        asker = _asker(request.state.owner, offer)
        return Asked(offer=offer, asker=asker, ids=ids, options=[replace(options, seed=seed) for seed in seeds])

    # Answers

    async def _pieces(self, asked: Asked) -> AsyncGenerator[Piece, None]:
        answers = self._served.decoder.answers
        async with (
            asked.offer.in_use() as adapter,
            aclosing(answers(asked.ids, asked.options, adapter=adapter, asker=asked.asker)) as pieces,
        ):
            async for piece in pieces:
                yield piece

    async def _answers(self, *all_asked: Asked) -> list[Answer]:
        """All answers to some prompts, whole. Raises ServiceError (429) before the first one begins."""
        count = sum(len(asked.options) for asked in all_asked)
        self._fairness.check(all_asked[0].asker.owner, count, time.monotonic())

        async def one(asked: Asked) -> list[Answer]:
            answers = [Answer() for _ in asked.options]
            with self._fairness.in_flight(asked.asker.owner, len(answers)):
                async with aclosing(self._pieces(asked)) as pieces:
                    async for piece in pieces:
                        answers[piece.number].add(piece)
            return answers

        working = [asyncio.create_task(one(asked)) for asked in all_asked]
        try:
            return [answer for answers in await asyncio.gather(*working) for answer in answers]
        finally:
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)

    async def _completed(self, all_asked: Sequence[Asked], body: CompletionBody) -> list[tuple[dict[str, Any], Answer]]:
        """Choices of completions, with their answers."""
        wanted = [asked for asked in all_asked if asked.options]
        answers = iter(await self._answers(*wanted) if wanted else [])
        found = []
        for asked in all_asked:
            prompt = self._text_of(asked.ids)
            echoed: Sequence[Choice] = ()
            if body.echo and body.logprobs is not None:
                echoed = await self._logprobs_of(asked, body.logprobs)
            for _ in range(body.n or 1):
                answer = next(answers) if asked.options else Answer(finish="length")
                logprobs = None
                if body.logprobs is not None:
                    start = 0 if body.echo else len(prompt)
                    logprobs = TextLogprobs(self._texts, start).of([*echoed, *answer.choices])
                text = prompt + answer.text if body.echo else answer.text
                found.append(({"text": text, "logprobs": logprobs, "finish_reason": answer.finish}, answer))
        return found

    async def _logprobs_of(self, asked: Asked, top: int) -> list[Choice]:
        """The tokens of a prompt with their log-probabilities; the first has none."""
        owner = asked.asker.owner
        if not asked.options:
            self._fairness.check(owner, 1, time.monotonic())
        with self._fairness.in_flight(owner):
            async with self._fairness.slots.held(owner), self._echoing, asked.offer.in_use() as adapter:
                found = await asyncio.to_thread(self._read, asked.ids, adapter, top)
        if not asked.options:
            self._fairness.charge(owner, len(asked.ids), time.monotonic())
            self._metrics.count_tokens(asked.asker, "read", len(asked.ids))
        return found

    def _read(self, ids: Sequence[int], adapter: str | None, top: int) -> list[Choice]:
        with torch.inference_mode():
            return given_choices(self._served.reader.all_logits(ids, adapter), ids, top)

    async def _streamed(self, request: Request, asked: Asked, chunks: Chunks, *, with_usage: bool) -> Response:
        """A stream of server-sent events. What fails before the first token is an error of HTTP's own."""
        self._fairness.check(asked.asker.owner, len(asked.options), time.monotonic())

        async def events() -> AsyncGenerator[dict[str, Any], None]:
            answers = [Answer() for _ in asked.options]
            with self._fairness.in_flight(asked.asker.owner, len(answers)):
                async with aclosing(self._pieces(asked)) as pieces:
                    async for piece in pieces:
                        answers[piece.number].add(piece)
                        for chunk in chunks.of(answers[piece.number], piece):
                            yield chunk
            if with_usage:
                yield {**chunks.head, "choices": [], "usage": usage(len(asked.ids), answers)}

        rest = events()

        async def begin() -> dict[str, Any]:
            return await anext(rest)

        return EventStream(await unless_left(request.receive, begin()), rest)


def _asker(owner: str, offer: Offer) -> Asker:
    return Asker(owner=owner, interface="openai", model=offer.name if offer.owner is None else "of one key")


def _grammar_of(format: ResponseFormat | None) -> str | None:
    """The grammar of an answer. Raises ConfigError for a schema that cannot be honoured."""
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return json_grammar(ANY_OBJECT)
    if format.json_schema is None:
        raise ConfigError("response_format: json_schema is missing", key="response_format")
    return json_grammar(format.json_schema.schema)


def _embedding(hidden: Any, *, as_bytes: bool) -> Any:
    """The mean over positions of (S, H), of length 1: cosines of two texts are products, as with OpenAI's."""
    mean = hidden.float().mean(0)
    vector = mean / mean.norm()
    return base64.b64encode(vector.numpy().tobytes()).decode() if as_bytes else vector.tolist()


def _offered(offer: Offer) -> dict[str, Any]:
    return {"id": offer.name, "object": "model", "created": offer.created, "owned_by": offer.owner or "petals_tune"}
