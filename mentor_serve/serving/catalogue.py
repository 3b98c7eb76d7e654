"""`GET /v1/models` and the tokenizer routes, in the shapes of OpenAI and vLLM."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from mentor_serve.serving.backend import ModelCard
from mentor_serve.serving.chat import template_messages
from mentor_serve.serving.errors import invalid
from mentor_serve.serving.jobs import Context
from mentor_serve.serving.requests import DetokenizeRequest, TokenizeRequest
from mentor_serve.serving.sampling import find_model
from mentor_serve.serving.wire import (
    DetokenizeResponse,
    ModelList,
    ModelObject,
    TokenizeResponse,
)


def models_router(context: Context) -> APIRouter:
    """The models a request may name."""
    router = APIRouter(tags=["models"])

    def model_object(card: ModelCard) -> ModelObject:
        return ModelObject(
            id=card.id,
            created=card.created,
            root=card.root,
            parent="policy" if card.id.startswith("policy@") else None,
            max_model_len=context.backend.max_model_len,
            policy_version=card.policy_version,
        )

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        return ModelList(data=[model_object(card) for card in await context.backend.models()])

    # `:path`, because clients put anything into a model name and expect a 404 for it.
    @router.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> ModelObject:
        return model_object(await find_model(context.backend, model))

    return router


def tokenizer_router(context: Context) -> APIRouter:
    """Text to token ids and back. All models share one vocabulary, so `model` is only checked."""
    router = APIRouter(tags=["tokenizer"])
    codec = context.codec

    async def check_model(model: str | None) -> None:
        if model is not None:
            await find_model(context.backend, model)
        await codec.load()

    async def encode(body: TokenizeRequest) -> list[int]:
        if body.messages is not None:
            return await codec.render_chat(
                template_messages(body.messages),
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                template_kwargs=body.chat_template_kwargs or {},
                add_special_tokens=bool(body.add_special_tokens),
            )
        special = body.add_special_tokens is not False
        return await codec.encode(body.prompt or "", add_special_tokens=special)

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        if (body.prompt is None) == (body.messages is None):
            raise invalid("expected either 'prompt' or 'messages'", param="prompt")
        await check_model(body.model)
        token_ids = await encode(body)
        spelled = [codec.token_text(token_id) for token_id in token_ids]
        return TokenizeResponse(
            count=len(token_ids),
            max_model_len=context.backend.max_model_len,
            tokens=token_ids,
            token_strs=spelled if body.return_token_strs else None,
        )

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        await check_model(body.model)
        codec.require_in_vocabulary(body.tokens, param="tokens")
        return DetokenizeResponse(prompt=codec.decode(body.tokens, skip_special_tokens=False))

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """What evaluation harnesses ask before they render chats themselves."""
        await codec.load()
        tokenizer = codec.tokenizer
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": len(tokenizer),
            "max_model_len": context.backend.max_model_len,
            "chat_template": tokenizer.chat_template,
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "pad_token": tokenizer.pad_token,
        }

    return router
