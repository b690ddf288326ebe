"""A loss or gradient that is not finite never reaches the weights."""

import pytest
import pytorch_lightning as pl
import torch

from ldm.callbacks import StopOnNonFinite
from ldm.models.training import NonFiniteError
from tests.callbacks.fit import fit
from tests.toys import Toy, ToyGan


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("kind", [Toy, ToyGan])
def test_a_nonfinite_value_stops_before_the_step_and_is_located(tmp_path, poison, kind):
    class Poisoned(kind):
        def backward(self, loss, *args, **kwargs):
            super().backward(loss, *args, **kwargs)
            if poison == "gradient" and self.trainer.global_step == 5 and self.net.weight.grad is not None:
                self.net.weight.grad[0, 0] = float("inf")

    model = Poisoned(at={5: "nan"} if poison == "loss" else None)
    before = {}
    model.on_train_batch_start = lambda batch, batch_idx: before.update(
        {k: v.clone() for k, v in model.state_dict().items()}
    )
    message = "the loss is nan" if poison == "loss" else r"the loss is finite .*net\.weight"
    with pytest.raises(NonFiniteError, match=rf"epoch 0, step 5, rank 0: {message}"):
        fit(tmp_path, [StopOnNonFinite()], model, validate=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_sparse_gradients_are_checked(tmp_path):
    class Words(Toy):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Embedding(9, 4, sparse=True)

        def training_step(self, batch, batch_idx):
            return self.net(torch.tensor([1, 2, 1])).sum() * (float("nan") if batch_idx == 3 else 1.0)

        def optimizer_step(self, *args, **kwargs):
            pl.LightningModule.optimizer_step(self, *args, **kwargs)

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    with pytest.raises(NonFiniteError, match="step 3"):
        fit(tmp_path, [StopOnNonFinite()], Words(), validate=False)
