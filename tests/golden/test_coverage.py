"""The cases that ship with the tests are all the cases there are for losses and advantages."""

import json
from pathlib import Path

import pytest

from tests.golden import FOLDER, load

SHARED = Path(__file__).parents[3] / "shared" / "golden" / "golden_losses.json"

FAMILIES = {
    "sft",
    "reduction",
    "reward_model",
    "preference",
    "kl",
    "advantage",
    "ppo",
    "reinforce",
    "grpo",
    "rollout_correction",
    "trust_region",
    "kimi",
}
NOT_A_LOSS = {
    "kimi_length_reward",
    "kimi_length_warmup",
    "kimi_long2short_dpo_pairs",
    "kimi_shortest_rejection_sampling",
    "kimi_model_merge",
}


def shipped_cases():
    files = (json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json")))
    return {case["id"]: case for family in files for case in family}


def test_90_cases_ship_and_every_family_file_loads():
    assert len(shipped_cases()) == 90
    assert sum(len(load(path.stem)) for path in FOLDER.glob("*.json")) == 90


@pytest.mark.skipif(
    not SHARED.exists(), reason="the complete golden file is not beside the project"
)
def test_no_case_of_these_families_is_missing_or_changed():
    shipped = shipped_cases()
    cases = json.loads(SHARED.read_text())["cases"]
    expected = {c["id"]: c for c in cases if c["family"] in FAMILIES and c["id"] not in NOT_A_LOSS}
    assert shipped.keys() == expected.keys()
    for case_id, case in shipped.items():
        assert case == {key: expected[case_id][key] for key in case}
