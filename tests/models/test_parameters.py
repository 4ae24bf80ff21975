"""The table of what trains, against a model counted by hand."""

import torch
from torch import nn

from engine.models.parameters import Row, format_table, parameter_table, totals


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
        self.text_encoder = nn.Embedding(10, 2).requires_grad_(False)
        self.projection = nn.Linear(3, 2, bias=False)
        self.logit_scale = nn.Parameter(torch.ones(1))
        self.register_buffer("logit_bias", torch.ones(1))


def test_parts_in_the_models_order():
    assert parameter_table(Towers()) == [
        Row("image_encoder", 4 * 3 + 3 + 3 + 3, 4, "trained"),
        Row("text_encoder", 20, 1, "frozen"),
        Row("projection", 6, 1, "trained"),
        Row("logit_scale", 1, 1, "trained"),
    ]


def test_a_partly_frozen_part_has_two_rows():
    model = Towers()
    model.image_encoder[0].requires_grad_(False)
    rows = [row for row in parameter_table(model) if row.part == "image_encoder"]
    assert rows == [Row("image_encoder", 6, 2, "trained"), Row("image_encoder", 15, 2, "frozen")]


def test_optimizer_groups_split_the_rows():
    model = Towers()
    groups = [
        {"params": [model.image_encoder[0].weight], "lr_scale": 0.1, "weight_decay": 0.2},
        {"params": [model.image_encoder[0].bias, *model.image_encoder[1].parameters(),
                    model.logit_scale], "weight_decay": 0.0},
    ]  # fmt: skip
    assert parameter_table(model, groups) == [
        Row("image_encoder", 12, 1, "trained", 0.1, 0.2),
        Row("image_encoder", 9, 3, "trained", 1.0, 0.0),
        Row("text_encoder", 20, 1, "frozen"),
        Row("projection", 6, 1, "frozen"),  # wants a gradient, but no optimizer steps it
        Row("logit_scale", 1, 1, "trained", 1.0, 0.0),
    ]


def test_param_groups_of_a_torch_optimizer():
    model = Towers()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.3)
    rows = parameter_table(model, optimizer.param_groups)
    assert {row.weight_decay for row in rows if row.state != "frozen"} == {0.3}
    assert totals(rows) == (21 + 6 + 1, 20)


def test_a_shared_tensor_counts_once():
    model = Towers()
    model.head = nn.Linear(2, 10, bias=False)
    model.head.weight = model.text_encoder.weight
    assert sum(totals(parameter_table(model))) == sum(p.numel() for p in model.parameters())


def test_text_holds_every_row_and_the_totals():
    text = format_table(parameter_table(Towers()))
    lines = text.splitlines()
    assert len(lines) == 1 + 4 + 1
    assert lines[0].split() == ["part", "parameters", "tensors", "state", "lr", "scale", "weight",
                                "decay"]  # fmt: skip
    assert lines[2].split() == ["text_encoder", "20", "1", "frozen"]
    assert lines[-1] == "28 trained, 20 frozen"
