import pytest

from gpt2.kernels import library


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A folder with the library for this CPU, which is compiled once for all tests of a process."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.delenv("GPT2_OPTIMIZE", raising=False)
        build = library.Build()
        assert build.has_ended(300)
        assert not build.problem()
    return folder


@pytest.fixture
def optimized(compiled, monkeypatch):
    """Turns measured and compiled kernels on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiled))
    monkeypatch.delenv("GPT2_OPTIMIZE", raising=False)
    library.start_build.cache_clear()
