"""What a search writes for TensorBoard, read back."""
import pytest
import torch

from conas.darts.genotype import derive
from conas.draw.tensorboard import EDGES, Board

PRIMITIVES = ["none", "skip_connect", "sep_conv_3x3"]


def test_what_is_written_can_be_read(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    torch.manual_seed(0)
    board, epochs = Board(tmp_path), []
    for epoch in range(3):
        alphas = {f"alphas_{kind}": torch.randn(14, 3) for kind in ("normal", "reduce")}
        if epoch == 2:
            alphas = epochs[1]  # the cells stay as they are, and are not drawn again
        epochs.append(alphas)
        board.epoch({"epoch": epoch, "train_loss": 1.5 - epoch, "learning_rate": 0.1}, alphas, PRIMITIVES,
                    derive(*alphas.values(), PRIMITIVES))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0, "images": 0})
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(0, 1.5), (1, 0.5), (2, -0.5)]
    assert len(EDGES) == 14 and EDGES[2] == "0_to_3"
    for index, edge in ((0, "0_to_2"), (13, "4_to_5")):
        read = events.Scalars(f"alphas_reduce/{edge}/sep_conv_3x3")
        assert [e.value for e in read] == pytest.approx(
            [alphas["alphas_reduce"].softmax(dim=1)[index, 2].item() for alphas in epochs], abs=1e-6)
    assert [e.step for e in events.Images("cell/normal")] == [0, 1]
    picture = events.Images("cell/reduce")[0]
    assert picture.width > 300 and picture.height > 100 and picture.encoded_image_string[1:4] == b"PNG"
