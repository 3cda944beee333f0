"""What holds for every test: how tests are spread over workers, and that none is skipped."""

import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

_TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the tests of one file on one worker, and all end-to-end tests on the same one.

    A file shares the servers that its fixtures start; end-to-end tests start whole daemons and
    measure time, so two of them never run at once.
    """
    for item in items:
        parts = item.path.relative_to(_TESTS).parts
        group = "e2e" if parts[0] == "e2e" else "/".join(parts)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turns a skip into a failure: a missing server or package must not look like success."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, which counts as a failure here: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that skips itself, as `pytest.importorskip` does."""
    report = yield
    if report.outcome == "skipped":
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} skipped itself, which counts as a failure here"
    return report


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder of shared memory that the daemons of a test have to themselves."""
    folder = Path(tempfile.mkdtemp(prefix="fc-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)
