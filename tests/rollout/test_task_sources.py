import json
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym

from mentor_serve.errors import ConfigError
from mentor_serve.rollout.tasks import SubmittedTasks, TaskSource, build_source
from mentor_serve.rollout.tasks.sources import ListSource, Position
from mentor_serve.types import Task


def make_tasks(number: int) -> list[Task]:
    return [Task(source="test", prompt=f"{n} + 0", answer=str(n)) for n in range(number)]


def list_source(number: int = 20, **options: Any) -> ListSource:
    return ListSource(make_tasks(number), name="test", **options)


def gym_source(name: str = "chain_sum", **options: Any) -> TaskSource:
    options = {"size": 50, "seed": 1, "config": {"max_terms": 3}} | options
    return build_source(source="reasoning_gym", name=name, **options)


SOURCES = {"list": list_source, "reasoning_gym": gym_source}


def draw(source: TaskSource, number: int) -> list[str]:
    return [source.next_task().prompt for _ in range(number)]


@pytest.mark.parametrize("kind", SOURCES)
def test_the_same_seed_gives_the_same_tasks_and_another_seed_others(kind: str) -> None:
    build = SOURCES[kind]
    assert draw(build(), 10) == draw(build(), 10)
    assert draw(build(), 10) != draw(build(seed=2), 10)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_restored_source_goes_on_where_the_state_was_taken(kind: str) -> None:
    source = SOURCES[kind]()
    draw(source, 7)
    state = json.loads(json.dumps(source.state()))
    resumed = SOURCES[kind]()
    resumed.restore(state)
    assert draw(resumed, 60) == draw(source, 60)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("state", [{}, {"position": -1}, {"position": "3"}])
def test_a_foreign_state_is_a_config_error(kind: str, state: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="position"):
        SOURCES[kind]().restore(state)


def test_a_list_is_shuffled_anew_for_each_pass_and_loses_no_task() -> None:
    source = list_source()
    passes = [draw(source, len(source)) for _ in range(2)]
    assert sorted(passes[0]) == sorted(passes[1])
    assert len(set(passes[0])) == len(source)
    assert passes[0] != passes[1]


def test_a_tenth_of_a_list_is_held_out_and_never_trained_on() -> None:
    source = list_source(30)
    held_out = source.holdout(3)
    assert {task.split for task in held_out} == {"holdout"}
    assert source.holdout(3) == held_out
    assert not {task.prompt for task in held_out} & set(draw(source, 60))
    with pytest.raises(ConfigError, match="can spare 3 tasks"):
        source.holdout(4)


def test_two_tasks_of_one_prompt_are_not_split_over_training_and_evaluation() -> None:
    source = ListSource(make_tasks(10) * 2, name="test")
    assert source.holdout(1)[0].prompt not in draw(source, 40)


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty"):
        ListSource([], name="test")


def test_shards_share_a_sequence_without_overlap() -> None:
    whole = gym_source()
    shards = [gym_source(shard=shard, num_shards=2) for shard in range(2)]
    expected = draw(whole, 10)
    assert draw(shards[0], 5) == expected[::2]
    assert draw(shards[1], 5) == expected[1::2]
    with pytest.raises(ConfigError, match="shard"):
        Position(shard=2, num_shards=2)


def test_reasoning_gym_tasks_keep_their_entry_as_json() -> None:
    task = gym_source().next_task()
    assert task.source == "reasoning_gym:chain_sum"
    recipe = task.metadata["reasoning_gym"]
    assert recipe["entry"]["question"] == task.prompt
    assert json.loads(json.dumps(task.metadata)) == task.metadata
    assert recipe["config"] == {"max_terms": 3}


def test_reasoning_gym_repeats_after_its_size() -> None:
    first, second = draw(gym_source(size=4), 4), draw(gym_source(size=4), 8)[4:]
    assert first == second


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31, 2**40])
def test_no_seed_of_training_meets_a_seed_of_evaluation(seed: int) -> None:
    source = gym_source(seed=seed, size=1000)
    train = source.next_task().metadata["reasoning_gym"]["seed"]
    held_out = source.holdout(2)[1].metadata["reasoning_gym"]
    assert 0 <= train <= train + 1000 <= 2**31 <= held_out["seed"]
    assert held_out["seed"] + held_out["size"] <= 2**32


@pytest.mark.parametrize("number", [0, 2**13 + 1])
def test_more_evaluation_tasks_than_the_seeds_allow_are_a_config_error(number: int) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 8192 evaluation tasks"):
        gym_source().holdout(number)


def test_training_never_draws_the_text_of_an_evaluation_problem() -> None:
    """Of three terms of one digit there are few texts: without care most would be in both."""
    tiny = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    held_out = [task.prompt for task in gym_source(config=tiny).holdout(300)]
    assert len(set(held_out)) == 300
    for seed in (1, 2):
        trained = draw(gym_source(config=tiny, seed=seed, size=100_000), 8000)
        assert len(set(trained)) > 2000
        assert not set(trained) & set(held_out)


def test_a_replaced_problem_is_judged_and_repeated_like_any_other() -> None:
    source = gym_source(size=400)
    drawn = [source.next_task() for _ in range(400)]
    replaced = [task for task in drawn if task.metadata["reasoning_gym"]["size"] == 1]
    # One text in eight is held out: binomial(400, 1/8) lies outside with probability 1e-4.
    assert 25 <= len(replaced) <= 77
    again = gym_source(size=400)
    assert [again.next_task() for _ in range(400)] == drawn
    for task in replaced:
        recipe = task.metadata["reasoning_gym"]
        assert 2**30 <= recipe["seed"] < 2**31
        dataset = reasoning_gym.create_dataset(
            recipe["name"], seed=recipe["seed"], size=1, **recipe["config"]
        )
        assert dataset[0]["question"] == task.prompt
        assert dataset.score_answer(task.answer, recipe["entry"]) == 1.0


def test_evaluation_problems_of_a_smaller_number_are_the_first_of_a_larger() -> None:
    def prompts(number: int) -> list[str]:
        return [task.prompt for task in gym_source().holdout(number)]

    assert prompts(40)[:7] == prompts(7)


def test_a_generator_with_hardly_any_texts_is_a_config_error() -> None:
    few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    # 200 texts of two digits and a sign: about 25 are held out, and 90 cannot be.
    with pytest.raises(ConfigError, match="different tasks for evaluation, asked for 90"):
        gym_source(config=few).holdout(90)


def test_neighbouring_seeds_of_training_share_no_item() -> None:
    seeds = [
        gym_source(seed=seed, size=1000).next_task().metadata["reasoning_gym"]["seed"]
        for seed in range(3)
    ]
    assert seeds == [0, 1000, 2000]


def test_embedded_is_the_mix_of_the_bundled_pair() -> None:
    source = build_source(source="reasoning_gym", name="embedded")
    assert source.next_task().source == "reasoning_gym:chain_sum"
    assert source.holdout(1)[0].split == "holdout"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "csv", "name": "x"}, "expected reasoning_gym, jsonl or huggingface"),
        ({"source": "reasoning_gym", "name": "no_such"}, "no such data set"),
        (
            {"source": "reasoning_gym", "name": "chain_sum", "config": {"terms": 3}},
            "unexpected keyword argument",
        ),
        (
            {"source": "reasoning_gym", "name": "chain_sum", "config": {"min_terms": 9}},
            "max_terms must be >= min_terms",
        ),
        (
            {"source": "reasoning_gym", "name": "chain_sum", "config": {"seed": 9}},
            "set tasks.seed instead",
        ),
        (
            {"source": "reasoning_gym", "name": "embedded", "config": {"min_terms": 9}},
            "must be empty",
        ),
        ({"source": "reasoning_gym", "name": "chain_sum", "size": 0}, "tasks.size"),
        ({"source": "jsonl", "name": "x.jsonl", "config": {"split": "test"}}, "must be empty"),
        ({"source": "huggingface", "name": "x", "config": {"subset": "y"}}, "unknown keys subset"),
    ],
)
def test_wrong_settings_are_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_source(**options)


def test_submitted_tasks_go_first_and_once() -> None:
    source = SubmittedTasks(list_source())
    expected = draw(list_source(), 2)
    submitted = Task(source="api", prompt="7 + 7", answer="14")
    assert source.submit([submitted]) == 1
    assert draw(source, 3) == ["7 + 7", *expected]
    assert source.state() == {"position": 2}
    assert source.holdout(1) == list_source().holdout(1)


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "1 + 1", "answer": "2"}, "1 + 1", "2"),
        ({"question": "1 + 1", "answer": 2}, "1 + 1", "2"),
        ({"problem": "1 + 1", "solution": "so \\boxed{2}"}, "1 + 1", "so \\boxed{2}"),
        ({"problem": "Half?", "solution": "long", "answer": "0.5"}, "Half?", "0.5"),
        ({"prompt": "a\u2028b", "answer": "\u00bd"}, "a\u2028b", "\u00bd"),
    ],
)
def test_the_usual_columns_are_read(
    tmp_path: Path, row: dict[str, Any], prompt: str, answer: str
) -> None:
    file = write(tmp_path / "problems.jsonl", row, "")
    task = build_source(source="jsonl", name=str(file)).next_task()
    assert (task.source, task.prompt, task.answer) == ("jsonl:problems.jsonl", prompt, answer)


def test_a_message_list_is_kept_and_further_columns_become_metadata(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
    ]
    row = {"prompt": messages, "answer": "2", "level": 3}
    task = build_source(
        source="jsonl", name=str(write(tmp_path / "a.jsonl", row)), split="test"
    ).next_task()
    assert task.prompt == "1 + 1?"
    assert task.metadata == {"messages": messages, "level": 3}
    assert task.split == "test"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "expected one JSON object a line"),
        ("[1, 2]", r"expected a JSON object, got '\[1, 2\]'"),
        ({"answer": "2"}, "expected a column prompt or question or problem .* columns answer"),
        ({"prompt": "1 + 1"}, "expected a column answer or solution"),
        ({"prompt": None, "answer": "2"}, "expected a column prompt"),
        ({"prompt": "  ", "answer": "2"}, "to be text or a list of messages"),
        ({"prompt": 3, "answer": "2"}, "to be text or a list of messages"),
        ({"prompt": "1 + 1", "answer": ["2"]}, "to be text or a number"),
        ({"prompt": "1 + 1", "answer": True}, "to be text or a number"),
        ({"prompt": "1 + 1", "answer": ""}, "to be text or a number"),
        ({"prompt": [], "answer": "2"}, "expected messages"),
        ({"prompt": [{"role": "user"}], "answer": "2"}, "expected messages"),
        ({"prompt": [{"role": "system", "content": "x"}], "answer": "2"}, "at least one of role"),
        ({"prompt": ["hello"], "answer": "2"}, "expected messages"),
    ],
)
def test_a_malformed_line_is_named_with_file_and_number(
    tmp_path: Path, line: object, message: str
) -> None:
    file = write(tmp_path / "problems.jsonl", {"prompt": "1 + 1", "answer": "2"}, line)
    with pytest.raises(ConfigError, match=rf"problems\.jsonl:2.*{message}"):
        build_source(source="jsonl", name=str(file))


def test_a_missing_empty_or_binary_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read tasks from"):
        build_source(source="jsonl", name=str(tmp_path / "missing.jsonl"))
    with pytest.raises(ConfigError, match="holds no tasks"):
        build_source(source="jsonl", name=str(write(tmp_path / "empty.jsonl", "")))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        build_source(source="jsonl", name=str(tmp_path / "binary.jsonl"))
