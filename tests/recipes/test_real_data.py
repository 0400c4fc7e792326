"""The recipes on real data by its path alone. Skipped when the data is not beside the checkout."""

import math

import pytest

from recipes import dpo, r1_zero, sft
from tests.conftest import SHARED
from tests.recipes.conftest import Run, run

DATA = SHARED / "data"
GSM8K = DATA / "gsm8k" / "train.jsonl"
SEEDS = DATA / "self_instruct" / "seed_tasks.jsonl"
HH_RLHF = DATA / "hh_rlhf" / "harmless-base-test.jsonl.gz"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no shared data beside the checkout")


@pytest.fixture
def one_step(base_run, tmp_path):
    def one_step(recipe, dataset, **settings) -> Run:
        done = run(
            recipe, tmp_path / "run", dataset=str(dataset), model_name_or_path=base_run.model,
            max_steps=1, **{"per_device_train_batch_size": 2, **settings},
        )  # fmt: skip
        assert [record["step"] for record in done.metrics] == [1]
        assert math.isfinite(done.metrics[0]["loss"])
        return done

    return one_step


def test_sft_on_gsm8k(one_step):
    said = one_step(sft, GSM8K).said
    assert f"{GSM8K}: 7,473 rows of question/answer" in said
    assert "8 without a target within max_length" in said  # long ones, in so small a vocabulary


def test_sft_on_the_self_instruct_seeds(one_step):
    said = one_step(sft, SEEDS, max_length=256).said
    assert f"{SEEDS}: 175 rows of " in said
    assert "documents" in said


def test_dpo_on_hh_rlhf(one_step):
    done = one_step(dpo, HH_RLHF, max_length=128)
    assert f"{HH_RLHF}: 2,312 rows of " in done.said
    assert done.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_r1_zero_on_gsm8k(one_step):
    done = one_step(
        r1_zero, GSM8K, num_generations=2, per_device_train_batch_size=4,
        max_completion_length=8,
    )  # fmt: skip
    assert "reference answers: 7,4" in done.said
    assert "from ####" in done.said
    assert done.metrics[0]["unscored"] == 0
