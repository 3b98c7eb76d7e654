from __future__ import annotations

from pathlib import Path

import pytest

from mentor_serve.errors import ConfigError
from mentor_serve.settings import Settings, load_settings

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("MENTOR_SERVE_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("apps/*.toml")), ids=lambda p: p.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    assert isinstance(load_settings([path]), Settings)


def test_the_papers_settings_have_the_papers_values() -> None:
    settings = load_settings([REPOSITORY / "apps" / "paper.toml"])
    assert (settings.rollout.num_on_policy, settings.rollout.num_mixed) == (8, 4)
    assert (settings.learner.prompts_per_step, settings.learner.mini_batch_prompts) == (128, 64)
    assert (settings.learner.clip_low, settings.learner.clip_high) == (0.2, 0.28)
    assert settings.learner.learning_rate == 1e-6
    assert settings.guidance.entropy_quantile == 0.95
    assert settings.guidance.alpha_steps == 120


def test_flags_beat_environment_beats_later_files_beat_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text("[learner]\nseed = 1\nlearning_rate = 1.0\nclip_low = 0.1\nclip_high = 0.1\n")
    second.write_text("[learner]\nlearning_rate = 2.0\nclip_low = 0.2\nclip_high = 0.2\n")
    monkeypatch.setenv("MENTOR_SERVE_LEARNER__CLIP_LOW", "0.3")
    monkeypatch.setenv("MENTOR_SERVE_LEARNER__CLIP_HIGH", "0.3")
    learner = load_settings([first, second], {"learner.clip_high": "0.4"}).learner
    assert learner.seed == 1
    assert learner.learning_rate == 2.0
    assert learner.clip_low == 0.3
    assert learner.clip_high == 0.4


def test_flags_may_carry_json() -> None:
    settings = load_settings(overrides={"tasks.config": '{"min_terms": 3}'})
    assert settings.tasks.config == {"min_terms": 3}


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ({"learner.lr": 1}, "learner.lr: unknown setting"),
        ({"learnr.learning_rate": 1}, "learnr: unknown setting"),
        ({"learner.clip_low": 3}, "learner.clip_low"),
        ({"learner.backend": "magic"}, "learner.backend"),
        ({"rollout.max_new_tokens": 100_000}, "max_model_len"),
        ({"learner.mini_batch_prompts": 99}, "prompts_per_step"),
        ({"run_name": "../up"}, "run_name"),
        ({"guidance.method": "magic"}, "guidance.method"),
        ({"guidance.method": "luffy", "expert.model": "none"}, "needs an expert"),
        ({"guidance.method": "questa", "expert.model": "none"}, "needs an expert"),
        ({"guidance.method": "luffy", "guidance.num_expert": 7}, "leave at least 2"),
        ({"guidance.hint_fraction": 1.0}, "guidance.hint_fraction"),
    ],
)
def test_wrong_settings_are_named(overrides: dict[str, object], part: str) -> None:
    with pytest.raises(ConfigError, match=part.replace(".", r"\.")):
        load_settings(overrides=overrides)


def test_unknown_environment_variables_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MENTOR_SERVE_POLICIES__MODEL", "x")
    with pytest.raises(ConfigError, match="POLICIES"):
        load_settings()


def test_broken_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("[learner\n")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML"):
        load_settings([broken])
    with pytest.raises(ConfigError, match="cannot read config file"):
        load_settings([tmp_path / "absent.toml"])


def test_secrets_do_not_print() -> None:
    settings = load_settings(overrides={"store.url": "postgresql+psycopg://u:hunter2@h/db"})
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in settings.model_dump_json()
    assert "hunter2" in settings.database_url
