"""The bar shows what was measured, and no version of a logger."""

from lightning.pytorch.loggers import CSVLogger
from networks import Project, loader, trainer

from bnnft.callbacks import ProgressBar


def test_it_shows_what_was_measured_and_no_version(tmp_path):
    bar, shown = ProgressBar(), []
    module = Project()
    run = trainer(tmp_path, [bar], max_epochs=1, logger=CSVLogger(tmp_path), enable_progress_bar=True)
    module.on_train_epoch_start = lambda: shown.append(bar.get_metrics(run, module))
    run.fit(module, loader(), loader())
    assert "v_num" in super(ProgressBar, bar).get_metrics(run, module)
    assert "v_num" not in bar.get_metrics(run, module)
    assert shown
