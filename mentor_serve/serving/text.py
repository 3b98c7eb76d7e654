"""Between text and token ids: encoding, chat templates, token spellings, incremental decoding.

The one place of the HTTP face that touches a tokenizer. Encoding runs in a thread; decoding a few
tokens does not. Incremental text never holds half a character nor the beginning of a stop string,
and its pieces add up to what decoding everything at once gives.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mentor_serve.errors import InvalidRequest

_REPLACEMENT = "\ufffd"
_MAX_PENDING_TOKENS = 32
"""So many tokens in a row that spell no character are not UTF-8 on its way."""
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE (GPT-2's table), inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + offset): byte for offset, byte in enumerate(others)})
    return table


_BYTE_OF_CHARACTER = _byte_alphabet()


class TextCodec:
    """A Hugging Face tokenizer, loaded on first use and shared by all requests."""

    def __init__(self, load_tokenizer: Callable[[], Any]) -> None:
        self._load = load_tokenizer
        self._tokenizer: Any = None
        self._added: dict[int, str] = {}
        self._bytes: dict[int, bytes] = {}
        """Spelled tokens; scoring a long prompt asks for the same ones again and again."""
        self._is_byte_level = False
        # Encoding may set truncation on the shared Rust object; two threads at once would raise.
        self._lock = threading.Lock()

    def _loaded(self) -> Any:
        with self._lock:
            if self._tokenizer is None:
                tokenizer = self._load()
                self._added = {i: t for t, i in tokenizer.get_added_vocab().items()}
                backend = getattr(tokenizer, "backend_tokenizer", None)
                decoder = getattr(backend, "decoder", None)
                self._is_byte_level = type(decoder).__name__ == "ByteLevel"
                self._tokenizer = tokenizer
            return self._tokenizer

    async def load(self) -> None:
        """Load the tokenizer in a thread; every other method expects that it happened."""
        if self._tokenizer is None:
            await asyncio.to_thread(self._loaded)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer itself."""
        return self._loaded() if self._tokenizer is None else self._tokenizer

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises `InvalidRequest` on text that is not valid Unicode."""
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        _require_unicode(text)
        tokenizer = self._loaded()
        with self._lock:
            ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return [int(token_id) for token_id in ids]

    async def render_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        template_kwargs: Mapping[str, Any],
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Token ids of a conversation under the model's own chat template.

        Raises `InvalidRequest` where there is no template or it refuses the conversation.
        """
        text = await asyncio.to_thread(
            self._render,
            messages,
            {
                **self._checked_template_kwargs(template_kwargs),
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
            },
        )
        return await self.encode(text, add_special_tokens=add_special_tokens)

    def _checked_template_kwargs(self, template_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        reserved = inspect.signature(self.tokenizer.apply_chat_template).parameters
        taken = sorted(set(template_kwargs) & set(reserved))
        if taken:
            raise InvalidRequest(f"chat_template_kwargs may not set {', '.join(taken)}")
        return template_kwargs

    def _render(self, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> str:
        from jinja2 import TemplateError

        tokenizer = self._loaded()
        if not tokenizer.chat_template:
            raise InvalidRequest("the model has no chat template; use /v1/completions")
        try:
            rendered = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        except (TemplateError, ValueError, TypeError) as error:
            raise InvalidRequest(f"the chat template refused the messages: {error}") from error
        return str(rendered)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids, exactly as spelled (no clean-up of spaces)."""
        decoded = self.tokenizer.decode(
            list(token_ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,
        )
        return str(decoded)

    def require_in_vocabulary(self, token_ids: Sequence[int], *, param: str) -> None:
        """Raise `InvalidRequest` if the tokenizer cannot spell an id."""
        size = len(self.tokenizer)
        for token_id in token_ids:
            if not 0 <= token_id < size:
                message = f"{param}: expected token ids from 0 to {size - 1}, got {token_id}"
                raise InvalidRequest(message)

    def special_token_id(self, text: str) -> int | None:
        """Id of the special token spelled `text`: decoding drops it, so it never matches text."""
        if text not in self.tokenizer.all_special_tokens:
            return None
        return int(self.tokenizer.convert_tokens_to_ids(text))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, part of a character or not."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        tokenizer = self.tokenizer
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = tokenizer.convert_ids_to_tokens(token_id) if token_id < len(tokenizer) else None
        if piece is None:
            return b""  # models pad their vocabulary beyond the tokenizer's
        if self._is_byte_level:
            return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
        if match := _BYTE_FALLBACK.fullmatch(piece):
            return bytes([int(match.group(1), 16)])
        return str(piece).replace("\u2581", " ").encode()

    def token_text(self, token_id: int) -> str:
        """One token spelled out; part of a character as `bytes:\\xf0\\x9f`, like OpenAI's."""
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"expected valid Unicode, got a lone surrogate at character {error.start}"
        raise InvalidRequest(message) from error


class IncrementalDecoder:
    """Decode a growing token sequence piece by piece.

    Only a short window is decoded each time: the tokens since the last point where the text was
    whole, behind one earlier window as context (some tokenizers spell a token by its neighbours).
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._window: list[int] = []
        self._num_context = 0
        self._num_sent = 0
        """Characters of the window's text that were already returned."""
        self._num_silent = 0
        """Tokens since the last piece of text."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Return the text that became certain with these tokens."""
        self._window.extend(token_ids)
        text = self._codec.decode(self._window)
        whole = text.rstrip(_REPLACEMENT)
        self._num_silent += len(token_ids)
        if len(whole) <= self._num_sent and self._num_silent > _MAX_PENDING_TOKENS:
            whole = text
        piece = whole[self._num_sent :]
        self._num_sent += len(piece)
        if piece:
            self._num_silent = 0
        if len(whole) == len(text):
            self._shift()
        return piece

    def _shift(self) -> None:
        self._window = self._window[self._num_context :]
        self._num_context = len(self._window)
        self._num_sent = len(self._codec.decode(self._window))

    def finish(self) -> str:
        """Return what is left, an incomplete character as U+FFFD."""
        piece = self._codec.decode(self._window)[self._num_sent :]
        self._num_sent += len(piece)
        return piece


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Offset of the earliest stop string in a text, or None."""
    offsets = [offset for stop in stops if (offset := text.find(stop)) >= 0]
    return min(offsets, default=None)


class StopFilter:
    """Pass text on up to the first stop string, holding back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.has_stopped = False

    def push(self, text: str) -> str:
        """Return the text that can no longer belong to a stop string."""
        if self.has_stopped:
            return ""
        held = self._held + text
        cut = find_stop(held, self._stops)
        if cut is not None:
            self.has_stopped = True
            self._held = ""
            return held[:cut]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """Return what was held back, now that nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
