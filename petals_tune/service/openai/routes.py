"""OpenAI's paths: models, chats, completions, embeddings."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from petals_tune.errors import ConfigError, PetalsTuneError
from petals_tune.service.decoding.options import DecodingOptions
from petals_tune.service.errors import translated
from petals_tune.service.openai.bodies import ChatBody, CompletionBody, EmbeddingBody, read
from petals_tune.service.openai.chat import Answer, chat_prompt, grammar_of, head, server_sent, usage
from petals_tune.service.served import Offer, Served
from petals_tune.service.users.fairness import Fairness

MOST_TOKENS = 4096  # of an answer whose request names no limit, or what is left of the model's positions


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt that is answered `n` times."""

    offer: Offer
    owner: str
    ids: Sequence[int]
    options: DecodingOptions
    n: int
    with_tools: bool = False


class OpenAI:
    """The endpoints. `request.state.owner` is whose key came with a request."""

    def __init__(self, served: Served, fairness: Fairness):
        self._served, self._fairness = served, fairness

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
            Route("/v1/embeddings", self._embeddings, methods=["POST"]),
        ]

    async def _models(self, request: Request) -> Response:
        offers = self._served.offers.of(request.state.owner)
        return JSONResponse({"object": "list", "data": [_offered(offer) for offer in offers]})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(_offered(self._served.find(request.path_params["name"], request.state.owner)))

    async def _chat(self, request: Request) -> Response:
        body: ChatBody = read(ChatBody, await request.body())
        offer = self._served.find(body.model, request.state.owner)
        if not body.messages:
            raise ConfigError("messages: at least one turn is needed", key="messages")
        ids = self._encoded(chat_prompt(body, self._served.format), special=not self._served.format.has_template)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if body.top_logprobs and not body.logprobs:
            raise ConfigError("top_logprobs needs logprobs=true", key="top_logprobs")
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        options = self._options(body, ids, limit, logprobs=logprobs, grammar=grammar_of(body.response_format))
        with_tools = bool(body.tools) and body.tool_choice != "none"
        asked = Asked(
            offer=offer, owner=request.state.owner, ids=ids, options=options, n=body.n or 1, with_tools=with_tools
        )
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return await self._streamed(asked, _ChatChunks(asked, include_usage=include_usage))
        answers = await self._answers(asked)
        choices = []
        for number, answer in enumerate(answers):
            message, finish = answer.message(with_tools=with_tools)
            logged = None if logprobs is None else {"content": answer.logprobs, "refusal": None}
            choices.append({"index": number, "message": message, "finish_reason": finish, "logprobs": logged})
        return JSONResponse(
            {**head("chat.completion", offer.name), "choices": choices, "usage": usage(len(ids), answers)}
        )

    async def _completion(self, request: Request) -> Response:
        body: CompletionBody = read(CompletionBody, await request.body())
        offer = self._served.find(body.model, request.state.owner)
        if body.echo:
            raise ConfigError("echo is not honoured here: leave it out", key="echo", seen=True)
        asked = []
        for ids in self._prompts(body.prompt, "prompt"):
            limit = 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default
            options = self._options(body, ids, limit, logprobs=body.logprobs)
            asked.append(Asked(offer=offer, owner=request.state.owner, ids=ids, options=options, n=body.n or 1))
        if body.stream:
            if len(asked) > 1:
                raise ConfigError("a stream answers one prompt: send several requests", key="prompt")
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return await self._streamed(asked[0], _TextChunks(asked[0], include_usage=include_usage))
        found = await asyncio.gather(*(self._answers(each) for each in asked))
        answers = [answer for each in found for answer in each]
        choices = [
            {
                "index": number,
                "text": answer.text,
                "finish_reason": answer.finish,
                "logprobs": None if body.logprobs is None else _old_logprobs(answer.logprobs),
            }
            for number, answer in enumerate(answers)
        ]
        read_tokens = sum(len(each.ids) for each in asked)
        return JSONResponse(
            {**head("text_completion", offer.name), "choices": choices, "usage": usage(read_tokens, answers)}
        )

    async def _embeddings(self, request: Request) -> Response:
        body: EmbeddingBody = read(EmbeddingBody, await request.body())
        offer = self._served.find(body.model, request.state.owner)
        texts = self._prompts(body.input, "input")
        now_s = time.monotonic()
        with self._fairness.in_flight(request.state.owner, now_s):
            found = [await asyncio.to_thread(self._served.reader.hidden, ids, offer.adapter) for ids in texts]
        tokens = sum(map(len, texts))
        self._fairness.charge(request.state.owner, tokens, now_s)
        data = []
        for number, hidden in enumerate(found):
            # The mean over positions, of length 1: cosines of two texts are products, as with OpenAI's.
            mean = hidden.float().mean(0)
            vector = mean / mean.norm()
            as_bytes = body.encoding_format == "base64"
            embedding: Any = base64.b64encode(vector.numpy().tobytes()).decode() if as_bytes else vector.tolist()
            data.append({"object": "embedding", "index": number, "embedding": embedding})
        return JSONResponse(
            {
                "object": "list",
                "model": offer.name,
                "data": data,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )

    def _encoded(self, text: str, *, special: bool) -> list[int]:
        ids: list[int] = self._served.tokenizer(text, add_special_tokens=special).input_ids
        return ids

    def _prompts(self, given: str | list[str | int | list[int]], key: str) -> list[list[int]]:
        """Token ids of one or several texts. Raises ConfigError for none, and for a text without a token."""
        texts: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        found = [self._encoded(text, special=True) if isinstance(text, str) else text for text in texts]
        vocabulary = len(self._served.tokenizer)
        for ids in found:
            if not ids or not all(isinstance(token, int) and 0 <= token < vocabulary for token in ids):
                raise ConfigError(
                    f"{key}: a text, or token ids of 0 to {vocabulary - 1}; not an empty one", key=key, seen=ids[:9]
                )
        if not found:
            raise ConfigError(f"{key}: at least one text is needed", key=key)
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

    def _nth(self, asked: Asked, number: int) -> DecodingOptions:
        """The options of answer `number`: of several with one seed, each has another."""
        options = asked.options
        return options if options.seed is None else replace(options, seed=options.seed + number)

    async def _answers(self, asked: Asked) -> list[Answer]:
        """All answers, whole."""
        answers = [Answer() for _ in range(asked.n)]

        async def one(number: int) -> None:
            pieces = self._served.decoder.answer(asked.ids, self._nth(asked, number), adapter=asked.offer.adapter)
            async with aclosing(pieces):
                async for piece in pieces:
                    answers[number].add(piece, self._decode)

        now_s = time.monotonic()
        with self._fairness.in_flight(asked.owner, now_s):
            async with asyncio.TaskGroup() as group:
                for number in range(asked.n):
                    group.create_task(one(number))
        self._fairness.charge(asked.owner, len(asked.ids) + sum(answer.tokens for answer in answers), now_s)
        return answers

    async def _streamed(self, asked: Asked, chunks: _Chunks) -> Response:
        """A stream of server-sent events. What fails before the first token is an error of HTTP's own."""
        events = self._events(asked, chunks)
        first = await anext(events)

        async def all_of_them() -> AsyncIterator[dict[str, Any]]:
            async with aclosing(events):
                yield first
                try:
                    async for event in events:
                        yield event
                except PetalsTuneError as error:
                    yield translated(error).body

        return StreamingResponse(server_sent(all_of_them()), media_type="text/event-stream")

    async def _events(self, asked: Asked, chunks: _Chunks) -> AsyncGenerator[dict[str, Any], None]:
        """Chunks of all answers as they come."""
        answers = [Answer() for _ in range(asked.n)]
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(maxsize=64)  # who reads slowly is waited for

        async def one(number: int) -> None:
            pieces = self._served.decoder.answer(asked.ids, self._nth(asked, number), adapter=asked.offer.adapter)
            async with aclosing(pieces):
                async for piece in pieces:
                    new = answers[number].add(piece, self._decode)
                    for chunk in chunks.of(number, answers[number], piece.text, new):
                        await queue.put(chunk)

        async def every() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    for number in range(asked.n):
                        group.create_task(one(number))
            finally:
                await queue.put(None)

        now_s = time.monotonic()
        with self._fairness.in_flight(asked.owner, now_s):
            work = asyncio.create_task(every())
            try:
                while (chunk := await queue.get()) is not None:
                    yield chunk
                try:
                    await work
                except BaseExceptionGroup as failed:
                    raise failed.exceptions[0] from None
            finally:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                self._fairness.charge(asked.owner, len(asked.ids) + sum(each.tokens for each in answers), now_s)
        if chunks.include_usage:
            yield {**chunks.head, "choices": [], "usage": usage(len(asked.ids), answers)}

    def _decode(self, token: int) -> str:
        text: str = self._served.tokenizer.decode([token])
        return text


class _Chunks:
    """The objects of a stream."""

    kind = ""

    def __init__(self, asked: Asked, *, include_usage: bool):
        self.asked, self.include_usage = asked, include_usage
        self.head = head(self.kind, asked.offer.name)
        if include_usage:
            self.head["usage"] = None

    def of(self, number: int, answer: Answer, text: str, logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _chunk(self, number: int, **fields: Any) -> dict[str, Any]:
        return {**self.head, "choices": [{"index": number, "finish_reason": None, "logprobs": None, **fields}]}


class _ChatChunks(_Chunks):
    """Of a chat: a first one with the role, then text, then why it ended. Calls of tools come whole, at the end."""

    kind = "chat.completion.chunk"

    def __init__(self, asked: Asked, *, include_usage: bool):
        super().__init__(asked, include_usage=include_usage)
        self._begun: set[int] = set()

    def of(self, number: int, answer: Answer, text: str, logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        chunks = []
        if number not in self._begun:
            self._begun.add(number)
            chunks.append(self._chunk(number, delta={"role": "assistant", "content": ""}))
        held = self.asked.with_tools and "<tool_call>" in answer.text
        if (text or logprobs) and not held:
            logged = {"content": logprobs, "refusal": None} if logprobs else None
            chunks.append(self._chunk(number, delta={"content": text}, logprobs=logged))
        if answer.finish is not None:
            message, finish = answer.message(with_tools=self.asked.with_tools)
            calls = message.get("tool_calls")
            if calls:
                delta = {"tool_calls": [{"index": place, **call} for place, call in enumerate(calls)]}
                chunks.append(self._chunk(number, delta=delta))
            elif held:
                chunks.append(self._chunk(number, delta={"content": answer.text[answer.text.index("<tool_call>") :]}))
            chunks.append(self._chunk(number, delta={}, finish_reason=finish))
        return chunks


class _TextChunks(_Chunks):
    kind = "text_completion"

    def of(self, number: int, answer: Answer, text: str, logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        logged = _old_logprobs(logprobs) if logprobs else None
        return [self._chunk(number, text=text, logprobs=logged, finish_reason=answer.finish)]


def _offered(offer: Offer) -> dict[str, Any]:
    return {"id": offer.name, "object": "model", "created": offer.created, "owned_by": offer.owner or "petals_tune"}


def _old_logprobs(logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Log-probabilities in the form of completions."""
    return {
        "tokens": [each["token"] for each in logprobs],
        "token_logprobs": [each["logprob"] for each in logprobs],
        "top_logprobs": [{top["token"]: top["logprob"] for top in each["top_logprobs"]} for each in logprobs],
        "text_offset": [],
    }
