"""What all tests share: repeatable property tests, and CUDA tests that skip themselves where there is no device."""

import os
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # read when torch is loaded
    # Test processes share the cores: threads that spin while they wait would take them from each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    import hypothesis
except ImportError:  # only the operator tests need it
    pass
else:
    hypothesis.settings.register_profile(
        "repeatable", derandomize=True, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    hypothesis.settings.load_profile("repeatable")


def _no_cuda() -> str | None:
    """Why CUDA tests cannot run; None when they can."""
    import torch

    if not torch.cuda.is_available():
        return "needs a CUDA device"
    from gingham._library import native

    return None if native().cuda_architectures else "this gingham was built without CUDA"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("cuda")]
    reason = _no_cuda() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")  # a module's trainings that its tests share are compared with theirs to the bit
def one_thread() -> Iterator[None]:
    """Small networks: with several test processes, threads of theirs only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
