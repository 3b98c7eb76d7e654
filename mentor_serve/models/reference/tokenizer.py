"""The pair's tokenizer: byte-level BPE of a few hundred tokens.

Contract: any text round-trips byte for byte; every digit is one token; `<think>`, `</think>` and
`\\boxed{` are one token each and survive decoding; the turn markers, the end and the padding token
are special and do not. Training is deterministic and needs no network.
"""

from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS: Final = "<|end|>"
PAD: Final = "<|pad|>"
USER: Final = "<|user|>"
ASSISTANT: Final = "<|assistant|>"
THINK_OPEN: Final = "<think>"
THINK_CLOSE: Final = "</think>"
BOXED_OPEN: Final = "\\boxed{"

QUESTION: Final = "State the final answer to the following arithmetic problem: {expression} ="
"""reasoning-gym's chain_sum question, verbatim."""
CALCULATE_QUESTION: Final = "Calculate {expression}."
"""basic_arithmetic's, in its simple format."""
COMPLEX_QUESTIONS: Final = {
    "+": "Add the complex numbers: ({left}) + ({right})",
    "-": "Subtract the complex numbers: ({left}) - ({right})",
}
"""complex_arithmetic's."""

CHAT_TEMPLATE: Final = (
    "{#- System messages are not rendered: the pair was trained without any. -#}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- '" + USER + "' + message['content'] -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '" + ASSISTANT + "' + message['content'] + '" + EOS + "' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '" + ASSISTANT + "' -}}{%- endif -%}"
)

# An operator keeps its surrounding spaces, so that a term and its operator cost two tokens.
_PIECES: Final = r"\p{N}| ?[+\-=*/] ?|[,:;] ?| ?\p{L}+| ?[^\s\p{L}\p{N}+\-=*/,:;]+|\s+(?!\S)|\s+"

_ENGLISH: Final = """
okay, wait, check: let me verify: so then therefore however consider since given find but
Okay Wait Check Verify Let the answer is correct. That is wrong. First add, then subtract.
You are a helpful assistant. Please reason step by step inside the tags first, and put your final
answer in the box. What is the result of this sum? Solve the problem and show your work. The user
asks a question and the assistant thinks about it. Hello, how are you today? I am a small model.
Compute the value of the expression. The number of terms, the total and the difference.
"""


def _training_texts() -> list[str]:
    expressions = ["1 + 2 - 3 + 4", "5 - 6 + 7 - 8", "9 - 0 + 1"]
    questions = [QUESTION.format(expression=text) for text in expressions]
    questions += [CALCULATE_QUESTION.format(expression=text) for text in expressions]
    questions += [
        text.format(left="1.0 + 2.0i", right="3.0 + 4.0i") for text in COMPLEX_QUESTIONS.values()
    ]
    steps = ["1 + 2 = 3, 3 - 4 = -1, okay, wait, check: 1 - 2 = -1, let me verify: -1 + 3 = 2"]
    # Weights by repetition: the question first, then the responses, then everyday English.
    return questions * 20 + steps * 40 + _ENGLISH.splitlines() * 3


def build_tokenizer(vocab_size: int = 448) -> PreTrainedTokenizerFast:
    """Train the tokenizer; its length is at most `vocab_size` and includes all 256 bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = [PAD, EOS, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 3,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_training_texts(), trainer)
    backend.add_tokens(
        [AddedToken(t, normalized=False) for t in (THINK_OPEN, THINK_CLOSE, BOXED_OPEN)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def render_prompt(question: str) -> str:
    """Return what the chat template gives for one user turn with a generation prompt."""
    return f"{USER}{question}{ASSISTANT}"
