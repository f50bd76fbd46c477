import pytest

from gpt2.native import library


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A folder with the library for this CPU, which is compiled once for all tests of a process."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.delenv("GPT2_OPTIMIZE", raising=False)
        process = library.start_build()
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return folder


@pytest.fixture
def optimized(compiled, monkeypatch):
    """Turns measured kernels and the compiled step on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiled))
    monkeypatch.delenv("GPT2_OPTIMIZE", raising=False)
