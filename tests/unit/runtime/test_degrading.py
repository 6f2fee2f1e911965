"""What low precision costs: weights are rounded as records are, put back, and their cost is written down."""

import pytest
import torch
from click.testing import CliRunner

from agent.calibrating import calibrate as command
from runtime.degrading import precision_costs
from runtime.errors import InvalidInput
from runtime.forcing import Bench
from runtime.loading import load_whole
from runtime.precision import empty_parts, unpack_parts
from runtime.rounding import degraded, fused_experts
from schemas.calibration import load_calibration
from schemas.files import InvalidFile
from tests.demo import DEMO, TEXT


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_weights_are_what_packed_records_give(family, checkpoint, packed_store):
    opened, model = packed_store(family), load_whole(checkpoint(family), dtype="float32")
    before = [module.down_proj.detach().clone() for module in fused_experts(model)]
    packed, parts = opened.manifest.packed_as("int4"), empty_parts(opened.manifest.layout)
    names = [part.name for part in packed.layout.parts]
    with degraded(model, "int4", [2]):
        for record in packed.records:
            unpack_parts(
                torch.frombuffer(bytearray(opened.read(record.sha256)), dtype=torch.uint8), packed.layout, parts
            )
            found = fused_experts(model)[record.layer].down_proj[record.expert]
            assert torch.equal(found, parts[names.index("down_proj")]) == (record.layer == 2)
    for was, module in zip(before, fused_experts(model), strict=True):
        assert torch.equal(was, module.down_proj)


def test_fewer_bits_cost_more(bench):
    seen = []
    int8, int4 = precision_costs(bench, ["int8", "int4"], progress=lambda done, total: seen.append((done, total)))
    assert 0 < int8.divergence < int4.divergence
    for cost in (int8, int4):
        assert cost.low <= cost.rise <= cost.high
        assert len(cost.nll_per_row) == 4
        assert all(each >= 0 for each in cost.nll_per_row)
    assert abs(int8.rise) < 0.01
    assert seen[-1] == (11, 11)


def test_what_does_not_fit_is_said_and_left_out(bench, monkeypatch, caplog):
    monkeypatch.setattr("runtime.precision.GROUP", 40)
    assert [cost.precision for cost in precision_costs(bench, ["int8", "int4"])] == ["int8"]
    assert "int4 does not fit this model" in caplog.text
    few = Bench(bench.model, bench.pieces[:3], bench.supply, 2)
    with pytest.raises(InvalidInput, match="3 pieces of 64 tokens"):
        precision_costs(few, ["int8"])


def test_the_command_writes_it_beside_the_budgets(tmp_path):
    output = tmp_path / "c.json"
    options = ["--text", str(TEXT), "--capacity", "12", "--budget", "100 %", "--window", "64", "--tokens", "640"]
    result = CliRunner().invoke(command, [str(DEMO), *options, "--precision", "int8", "-o", str(output)])
    assert result.exit_code == 0, result.output
    assert "every expert in int8: perplexity" in result.stdout
    found = load_calibration(output)
    assert [cost.precision for cost in found.precisions] == ["int8"]
    old = found.model_dump(exclude={"precisions"})
    assert type(found).model_validate(old).precisions == ()
    wrong = found.precisions[0].model_copy(update={"nll_per_row": (0.1,)})
    output.write_text(found.model_copy(update={"precisions": (wrong,)}).model_dump_json())
    with pytest.raises(InvalidFile, match=r"precisions\[0\].nll_per_row: has 1 numbers, the model has 4 layers"):
        load_calibration(output)
