import pytest

from toolx_kernels.train import reporter


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder and the summary of a whole run, which tests only read."""
    from tests.train.test_trainer import make_trainer

    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, make_trainer(folder).train()


@pytest.fixture(autouse=True)
def _blank_picture(monkeypatch):
    """Skips drawing the curves, which takes as long as the rest of a small run; ``finished`` draws them."""
    monkeypatch.setattr(reporter, "write_curves", lambda run, model: (run / "curves.png").write_bytes(b""))
