"""Every bench runs on a GPU and says what it is asked."""

import pytest
import torch

from mimscale.commands.bench import main, parser
from mimscale.commands.bench.engine_step import bench_engine


def test_a_bench_of_steps_through_the_engine(figure, capsys, tmp_path):
    large = torch.cuda.is_available()
    words = [
        "--model",
        "swinv2_s",
        "--batch",
        "64" if large else "2",
        "--alone",
        "--engine",
        "--rounds",
        "3",
        "--dtype",
    ]
    words += ["bf16"] if large else ["fp32", "--image", "64", "--window", "2", "--steps", "1"]
    found = bench_engine(parser().parse_args(["step", *words, "--profile", str(tmp_path / "table.txt")]))
    printed = capsys.readouterr().out
    assert "images/s" in printed and (tmp_path / "table.txt").read_text()
    for name in ("mimscale, images/s", "mimscale, of peak", "kernels"):
        figure(f"swinv2_s, 64 images a step: {name}", found[name])
    if large:
        assert found["peak, GB"] > 0


@pytest.mark.parametrize(
    "words", [["memory", "--model", "swinv2_s", "--batch", "1"], ["step", "--alone", "--rounds", "1"]]
)
def test_the_other_benches(words, capsys):
    if words[0] == "step" and not torch.cuda.is_available():
        words = [*words, "--image", "64", "--window", "2", "--batch", "2"]
    assert main(words) == 0
    assert "MB an image" in capsys.readouterr().out or words[0] == "step"
