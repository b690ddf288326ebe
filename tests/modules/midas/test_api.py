"""Depth by a tiny DPT that is saved and loaded locally."""

import pytest
import torch
import transformers

from ldm.modules.midas.api import MiDaSInference
from tests.reference import randn


@torch.no_grad()
def test_depth_is_that_of_the_local_dpt_and_the_weights_stay_out_of_checkpoints(tmp_path):
    torch.manual_seed(0)
    network = transformers.DPTForDepthEstimation(
        transformers.DPTConfig(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=32,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8] * 4,
            fusion_hidden_size=8,
            is_hybrid=False,
            patch_size=16,
        )
    ).eval()
    network.save_pretrained(tmp_path)
    model = MiDaSInference(weights=str(tmp_path))
    depth = model(torch.tanh(randn(0, 2, 3, 24, 40)))
    assert depth.shape == (2, 1, 24, 40) and depth.isfinite().all() and model.state_dict() == {}
    square = torch.tanh(randn(0, 1, 3, 32, 32))
    assert torch.allclose(model(square)[:, 0], network(pixel_values=square).predicted_depth, atol=1e-5)


def test_missing_weights_and_unknown_models_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere has no config\.json\. Set depth_stage_config\.params\.weights"):
        MiDaSInference(weights=str(tmp_path / "nowhere"))(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="'dpt_huge': choose one of dpt_large"):
        MiDaSInference("dpt_huge")
