"""One started sandbox for each tier that works here. The rest is skipped with its reason."""

import pytest

from posttrain.sandbox import Sandbox
from posttrain.sandbox.tiers import TIERS
from posttrain.sandbox.worker import Worker, WorkerError


def started(tier: str, **settings) -> Sandbox:
    """A started sandbox. Skips the test where the machine cannot start a worker of the tier.

    A worker that starts and lets a canary escape is no reason to skip: that raises.
    """
    for each in TIERS if tier == "auto" else [tier]:
        try:
            Worker(each, allow_subprocess=False, scratch_bytes=1 << 20).close()
            break
        except WorkerError as problem:
            reason = f"no tier {each} here: {problem}"
    else:
        pytest.skip(reason)
    sandbox = Sandbox(tier=tier, num_workers=2, **settings)
    sandbox.describe()
    return sandbox


@pytest.fixture(scope="session", params=["namespaces", "landlock"])
def sandbox(request):
    """Each of the fast tiers."""
    with started(request.param) as opened:
        yield opened


@pytest.fixture(scope="session", params=TIERS)
def any_sandbox(request):
    """Each tier."""
    with started(request.param) as opened:
        yield opened


@pytest.fixture(scope="session")
def best_sandbox():
    """The strongest tier."""
    with started("auto") as opened:
        yield opened


@pytest.fixture(scope="session")
def forking_sandbox():
    """One that lets the code start processes."""
    with started("namespaces", allow_subprocess=True) as opened:
        yield opened
