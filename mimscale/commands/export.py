"""``mimscale export``: a run's weights as a file for mimscale, timm, transformers or the released code."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mimscale.commands import Parser
from mimscale.commands.numbers import whole


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(prog="mimscale export", description=__doc__, allow_abbrev=False)
    made.add_argument("run", help="run folder; RUN@STEP for an earlier checkpoint")
    made.add_argument(
        "--to", required=True, metavar="FORMAT", help="safetensors (mimscale's own), timm, huggingface, or released"
    )
    made.add_argument("--step", type=whole(0), help="which checkpoint (default: the newest)")
    made.add_argument("--output", type=Path, help="file, or folder for huggingface (default: in RUN/export)")
    return made


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    arguments = parser().parse_args(argv)
    from mimscale.models.weights.export import ending, export_weights, usage
    from mimscale.models.weights.released import all_weights
    from mimscale.training.run_folder import step_name
    from mimscale.transfer.load import load_run

    try:
        run = load_run(arguments.run, arguments.step)
        checkpoint, module = run.checkpoint, run.meta_module
        checkpoint.check_shapes({name: tuple(part.shape) for name, part in all_weights(module).items()})
        model, prefix = (module, "") if run.kind else (module.model, "model.")
        name = f"{model.encoder.made_from['name']}_{step_name(checkpoint.step)}_{arguments.to}"
        output = arguments.output or run.folder / "export" / f"{name}{ending(arguments.to, model)}"
        written = export_weights(model, arguments.to, output, lambda name: checkpoint.trained(prefix + name))
    except (ValueError, OSError) as error:
        print(f"mimscale: error: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    print(usage(arguments.to, output, model.encoder))
    return 0
