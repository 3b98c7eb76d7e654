"""The bundled reference pair loads, speaks one vocabulary and performs in its documented range."""

import re
from functools import cache
from random import Random
from typing import Any

import pytest

from mentor_serve.models.reference import MAX_NEW_TOKENS, TASK_CONFIG, TASK_NAME, reference_path
from tests.imports import loaded_by

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FORMAT = re.compile(r"<think>.*?</think>\s*\\boxed\{-?\d+\}", re.DOTALL)
QUESTION = "State the final answer to the following arithmetic problem: 4 - 1 - 7 ="


@cache
def load(name: Any) -> tuple[Any, Any]:
    """Return (model, tokenizer) of the pair as a user would load them."""
    path = reference_path(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    return model.eval(), tokenizer


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_importing_the_package_needs_no_torch() -> None:
    code = "import mentor_serve.models.reference as r; r.reference_path('policy')"
    assert not {"torch", "transformers"} & set(loaded_by(code))


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'policy' or 'expert'"):
        reference_path("teacher")  # type: ignore[arg-type]


def test_both_models_are_small_and_share_one_vocabulary() -> None:
    policy_tokenizer, expert_tokenizer = load("policy")[1], load("expert")[1]
    assert policy_tokenizer.get_vocab() == expert_tokenizer.get_vocab()
    assert policy_tokenizer.chat_template == expert_tokenizer.chat_template
    for model, tokenizer in (load("policy"), load("expert")):
        assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
        assert model.config.vocab_size == len(tokenizer)
        assert model.config.max_position_embeddings >= 1024
        assert model.config.head_dim % 8 == 0
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "two  spaces\n\n\tand a tab ",
        "za\u017c\u00f3\u0142\u0107 \u03b5\u03bb\u03bb\u03b7 \u65e5\u672c\u8a9e \u05e2\u05d1\u05e8",
        "\U0001f916 \U0001f469\u200d\U0001f52c",
        "\x00\x7f\u200b\ufeff\u2028",
        "<think>4 - 1 = 3</think>\\boxed{-4} \\boxed { <thin k>",
        "def f(x): return {'a': [1, 2.5e-3]}  # comment ,;: + - = * /",
    ],
)
def test_any_text_round_trips(text: str) -> None:
    _, tokenizer = load("policy")
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == text


def test_random_unicode_round_trips() -> None:
    _, tokenizer = load("policy")
    random = Random(0)
    for _ in range(50):
        points = [random.randrange(1, 0x110000) for _ in range(30)]
        text = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(
    "text", [*"0123456789", "<think>", "</think>", "\\boxed{", " verify", "check", "okay", "wait"]
)
def test_single_tokens(text: str) -> None:
    _, tokenizer = load("policy")
    assert len(tokenizer.encode(text, add_special_tokens=False)) == 1


def test_chat_template_renders_turns_and_leaves_out_system() -> None:
    _, tokenizer = load("policy")
    turns = [
        {"role": "system", "content": "unseen"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "R"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>Q<|assistant|>A<|end|><|user|>R<|assistant|>"
    text = tokenizer.apply_chat_template(turns[:2], tokenize=False)
    assert text == "<|user|>Q"


def test_question_costs_few_tokens() -> None:
    _, tokenizer = load("policy")
    assert len(tokenizer.encode(QUESTION, add_special_tokens=False)) <= 20


def sample(name: str, questions: list[str], num_samples: int, **settings: Any) -> list[str]:
    """Return decoded responses, `num_samples` a question, all from one batch."""
    model, tokenizer = load(name)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        num_return_sequences=num_samples,
        max_new_tokens=MAX_NEW_TOKENS,
        **settings,
    )
    new = output[:, batch["input_ids"].shape[1] :]
    return [str(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def test_expert_answers_greedily_in_the_format() -> None:
    text = sample("expert", [QUESTION], 1, do_sample=False, temperature=None, top_k=None)[0]
    assert FORMAT.fullmatch(text)
    assert text.endswith("\\boxed{-4}")


@pytest.mark.parametrize(("name", "low", "high"), [("policy", 0.12, 0.42), ("expert", 0.9, 1.0)])
def test_accuracy_lies_in_its_documented_range(name: str, low: float, high: float) -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    torch.manual_seed(0)
    items = list(reasoning_gym.create_dataset(TASK_NAME, seed=600_000_000, size=64, **TASK_CONFIG))
    texts = sample(name, [item["question"] for item in items], 2)
    correct = [
        FORMAT.fullmatch(text) is not None and text.endswith(f"\\boxed{{{item['answer']}}}")
        for text, item in zip(texts, [item for item in items for _ in range(2)], strict=True)
    ]
    assert low <= sum(correct) / len(correct) <= high


def test_style_words_are_the_experts_and_rare_in_the_policy() -> None:
    """On seven terms the expert says each word in a third of its responses or more, the policy in
    at most 7 %: of 64 that is 21 or more against 4 or fewer on average. The bound of 12 for both is
    missed with probability below 0.01 by the expert and 0.001 by the policy; the seed is fixed."""
    torch.manual_seed(0)
    question = QUESTION.removesuffix(" =") + " + 3 + 8 - 2 + 5 ="
    for name in ("policy", "expert"):
        texts = sample(name, [question] * 8, 8)
        for word in ("verify", "check", "okay", "wait"):
            count = sum(word in text for text in texts)
            assert count <= 12 if name == "policy" else count >= 12, (name, word, count)


def test_the_policy_takes_results_over_from_a_hint() -> None:
    """Nearly nobody finds a lost minus sign alone: of 32 greedy responses to chains that begin with
    one, as good as none has it right; with the first result in a hint most do (seed and models are
    fixed, so nothing here is left to chance)."""
    random = Random(0)
    questions, first_steps = [], []
    for _ in range(32):
        first, second, third = random.randint(0, 3), random.randint(5, 9), random.randint(1, 4)
        questions.append(QUESTION.replace("4 - 1 - 7", f"{first} - {second} + {third}"))
        first_steps.append(f"{first} - {second} = {first - second},")
    hinted = [
        f"{question}\n\n## Hint: Partial Solution\n\n{step}"
        for question, step in zip(questions, first_steps, strict=True)
    ]

    def share_right(asked: list[str]) -> float:
        texts = sample("policy", asked, 1, do_sample=False, temperature=None, top_k=None)
        return sum(step in text for step, text in zip(first_steps, texts, strict=True)) / len(asked)

    assert share_right(questions) <= 0.1
    assert share_right(hinted) >= 0.7
