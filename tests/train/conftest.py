import pytest


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder and the summary of a whole run, which is only looked at."""
    from tests.train.test_trainer import make_trainer

    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, make_trainer(folder).train()
