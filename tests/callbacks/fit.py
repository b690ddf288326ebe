"""Train a toy model for a few steps."""

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from ldm.training.checkpoint_io import AtomicCheckpointIO
from tests.toys import Images, Toy


def fit(folder, callbacks, model=None, batches=8, validate=True, checkpoint=None, **settings):
    """Train a toy for one epoch of `batches` batches unless `settings` say otherwise -> (model, trainer)."""
    model = model or Toy()
    model.learning_rate = 1e-3
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    settings = {**off, "accelerator": "cpu", "max_epochs": 1, "plugins": [AtomicCheckpointIO()], **settings}
    if not validate:
        settings["limit_val_batches"] = 0  # the toy has a validation step
    trainer = pl.Trainer(default_root_dir=folder, callbacks=callbacks, **settings)
    trainer.fit(
        model, DataLoader(Images(2 * batches), batch_size=2), DataLoader(Images(4), batch_size=2), ckpt_path=checkpoint
    )
    return model, trainer
