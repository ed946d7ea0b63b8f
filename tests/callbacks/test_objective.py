import pytest
from networks import Project, loader, trainer

from bnnft.callbacks import Objective


def fit(folder, names, **options):
    fit = trainer(folder, [Objective(names)], max_epochs=3, **options)
    fit.fit(Project(), loader(), loader())


def test_what_is_logged_is_left_alone(tmp_path):
    fit(tmp_path, ["val/loss", "test/anything"])


def test_what_no_validation_logs_is_refused_after_the_first_one(tmp_path):
    with pytest.raises(ValueError, match=r"optimized_metric must be among val/loss, or of the test; got 'val/acc'"):
        fit(tmp_path, "val/acc", num_sanity_val_steps=0)


def test_a_validation_that_there_is_not_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="optimized_metric='val/loss' needs validation, but limit_val_batches"):
        fit(tmp_path, "val/loss", limit_val_batches=0)
