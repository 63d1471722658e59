import pytest

from common import run, small_presets


@pytest.fixture(scope="module")
def little_work():
    with small_presets():
        yield


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with sft, frm and lrpo runs of three steps each; lrpo trains frm by itself."""
    root = tmp_path_factory.mktemp("runs")
    with small_presets():
        run("sft", root / "sft")
        run("lrpo", root / "lrpo")
    return root
