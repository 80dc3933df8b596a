"""``mimscale export``: a run's weights as a file for mimscale, timm, transformers or the released code."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mimscale.models.weights import KINDS


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="mimscale export", description=__doc__, allow_abbrev=False)
    made.add_argument("run", type=Path, help="run folder of a pre-training")
    made.add_argument("--to", required=True, choices=KINDS)
    made.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    made.add_argument("--output", type=Path, help="file, or folder for huggingface (default: in RUN/export)")
    return made


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    arguments = parser().parse_args(argv)
    import torch

    from mimscale.models.weights.export import export_weights, usage
    from mimscale.training.checkpoint import open_newest
    from mimscale.training.pretraining.module import build_objective
    from mimscale.training.recipe import stored_recipe
    from mimscale.training.run_folder import step_name

    try:
        checkpoint = open_newest(arguments.run, arguments.step)
        with torch.device("meta"):
            objective = build_objective(stored_recipe(checkpoint.manifest["recipe"], str(checkpoint.path)))
        checkpoint.check_shapes({name: tuple(p.shape) for name, p in objective.named_parameters()})
        endings = {"released": ".pth", "huggingface": ""}
        name = f"{objective.model.encoder.made_from['name']}_{step_name(checkpoint.step)}_{arguments.to}"
        output = arguments.output or arguments.run / "export" / f"{name}{endings.get(arguments.to, '.safetensors')}"
        written = export_weights(objective.model, arguments.to, output, lambda name: checkpoint.tensor(f"model.{name}"))
    except (ValueError, OSError) as error:
        print(f"mimscale: error: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    print(usage(arguments.to, output, objective.model.encoder))
    return 0
