"""One started sandbox for each tier that works here. The rest is skipped with its reason."""

import functools
import gc

import pytest

from posttrain.sandbox import Sandbox
from posttrain.sandbox.tiers import TIERS
from posttrain.sandbox.worker import Worker, WorkerError

_descriptions = {}  # of each tier and its settings


@functools.cache
def why_not(tier: str) -> str:
    """Why no worker of the tier can start here; "" if one can."""
    try:
        Worker(tier, allow_subprocess=False, scratch_bytes=1 << 20).close()
    except WorkerError as problem:
        return f"no tier {tier} here: {problem}"
    return ""


@pytest.fixture(autouse=True, scope="package")
def cheap_collections():
    """Some tests collect garbage, which walks all that other tests have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def started(tier: str, **settings) -> Sandbox:
    """A started sandbox. Skips the test where the machine cannot start a worker of the tier.

    A worker that starts and lets a canary escape is no reason to skip: that raises.
    """
    problems = [why_not(each) for each in (TIERS if tier == "auto" else [tier])]
    if all(problems):
        pytest.skip(problems[-1])
    sandbox = Sandbox(tier=tier, num_workers=2, **settings)
    settings = (tier, *settings.items())
    sandbox._description = dict(_descriptions.get(settings, {}))  # probing once is enough
    _descriptions[settings] = sandbox.describe()
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
