import pytest

from toolx_kernels.train import reporter


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder and the summary of a whole run, which is only looked at."""
    from tests.train.test_trainer import make_trainer

    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, make_trainer(folder).train()


@pytest.fixture(autouse=True)
def _blank_picture(monkeypatch):
    """To draw the curves takes as long as the rest of a small run; that of ``finished`` is drawn."""
    monkeypatch.setattr(reporter, "write_curves", lambda run, title: (run / "curves.png").write_bytes(b""))
