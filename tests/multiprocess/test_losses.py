"""Cutting a batch into micro-batches, accumulation steps or ranks changes nothing: every loss."""

import loss_jobs
import pytest
from loss_jobs import CONTROL, CUTS
from ranks import run_ranks

TOLERANCE = 1e-6  # of a weight, after three steps
LOSSES = [name for name in loss_jobs.losses() if name != CONTROL]


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """{loss: {cut: (weights, largest change)}}, two ranks among the cuts."""
    folder = str(tmp_path_factory.mktemp("losses"))
    job = loss_jobs.train_all
    (ends,) = run_ranks(job, world_size=1, timeout_seconds=300, folder=folder, cuts=tuple(CUTS))
    first, _ = run_ranks(job, config="ddp", timeout_seconds=300, folder=folder, cuts=("whole",))
    return {name: {**ends[name], "ranks": first[name]["whole"]} for name in ends}


@pytest.mark.parametrize("name", LOSSES)
def test_cutting_changes_nothing(name, ends):
    whole, moved = ends[name]["whole"]
    assert moved > 1e-4  # far more than the tolerance
    for cut, (weights, _) in ends[name].items():
        assert (weights - whole).abs().max() < TOLERANCE, cut


@pytest.mark.parametrize("cut", [*list(CUTS)[1:], "ranks"])
def test_a_loss_that_counts_the_tokens_of_its_micro_batch_would_be_found(cut, ends):
    """The negative control, for each way of cutting."""
    whole, _ = ends[CONTROL]["whole"]
    assert (ends[CONTROL][cut][0] - whole).abs().max() > 100 * TOLERANCE
