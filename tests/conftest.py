"""Fixtures for all tests."""

import os
import runpy
import signal
from pathlib import Path

import hypothesis
import pytest

# before torch is imported anywhere: many test processes share few cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

# With ENGINE_TEST_AMX=1 the suite runs as on a processor with matrix units for bf16: here, and in
# every process that a test starts.
if os.environ.get("ENGINE_TEST_AMX"):
    _AMX = Path(__file__).with_name("amx")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(_AMX), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    runpy.run_path(str(_AMX / "sitecustomize.py"))

# a job in a shell's background ignores Ctrl-C, and so would every process that a test starts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# the same examples in every run; others with --hypothesis-profile=default
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

_SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def environment_stays():
    """What a test leaves in the environment (a rank, say) is not the next one's."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small real datasets beside the repository; the test is skipped without it."""
    if not _SHARED_DATA.is_dir():
        pytest.skip(f"needs the real data in {_SHARED_DATA}")
    return _SHARED_DATA
