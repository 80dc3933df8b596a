"""``mimscale verify-checkpoint``: a released weight's validation loss, measured here, beside the published one.

Centre crops and one fixed mask an image, in fp32, as every validation of mimscale; l1 and l2 both, for the paper names
l2 and the code that was released with it used l1. The authors' own protocol is unpublished.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mimscale.commands import Parser
from mimscale.commands.numbers import whole


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from mimscale.study.results.published import DATASETS

    made = Parser(prog="mimscale verify-checkpoint", description=__doc__, allow_abbrev=False)
    made.add_argument("file", type=Path, help="weights in the released names (.pth or .safetensors)")
    made.add_argument("--shards", type=Path, required=True, metavar="VAL", help="shards with a split 'val'")
    made.add_argument("--recipe", type=Path, help="model and objective (default: recognised from the weights)")
    made.add_argument("--dataset", choices=list(DATASETS), help="pre-trained on (default: from the file's name)")
    made.add_argument("--iterations", type=whole(), help="pre-trained for (default: from the file's name)")
    made.add_argument("--images", type=whole(), help="of the validation set, at most (default: all)")
    made.add_argument("--batch", type=whole(1, 65_536), default=32, help="images at once (default: 32)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return made


def table(found: dict[str, Any]) -> str:
    """The figures as a person reads them."""
    published_value = found["published_val_loss"]
    about = [
        found["model"] or "a SwinV2 of none of Table 1's sizes",
        f"{found['encoder_parameters'] / 1e6:.2f} M parameters",
    ]
    about += [f"{found['image_size']} px", f"{found['validation_images']:,} validation images"]
    lines = [f"{found['file']}: {', '.join(about)}"]
    lines += [f"{'':<4}{'measured':>10}{'published':>11}{'difference':>12}{'predicting the mean':>21}"]
    for loss in ("l1", "l2"):
        value = found[f"val_loss_{loss}"]
        beside = f"{published_value:.4f}" if published_value is not None else "unknown"
        apart = f"{value - published_value:+.4f}" if published_value is not None else ""
        lines.append(f"{loss:<4}{value:>10.4f}{beside:>11}{apart:>12}{found[f'baseline_{loss}']:>21.4f}")
    if published_value is not None:
        near = min(("l1", "l2"), key=lambda loss: abs(found[f"val_loss_{loss}"] - published_value))
        lines.append(
            f"published: {found['dataset']}, {found['iterations']:,} iterations. {near} is the nearer. The authors' crop and "
            "masks are unpublished, so the last digits can differ."
        )
    else:
        lines.append(f"nothing published to compare with: {_why_unknown(found)}")
    return "\n".join(lines)


def _why_unknown(found: dict[str, Any]) -> str:
    named = {"model": found["model"], "--dataset": found["dataset"], "--iterations": found["iterations"]}
    unknown = [name for name, value in named.items() if value is None]
    if found["model"] is None:
        return "the weights are of none of Table 1's sizes"
    if unknown:
        return f"neither the file's name nor the command line says {' and '.join(unknown)}"
    return f"{found['model']} on {found['dataset']} for {found['iterations']:,} iterations is not among the 63 released runs"


def main(argv: list[str]) -> int:
    """Run the command; returns its exit status."""
    options = parser().parse_args(argv)
    from mimscale.data import ShardError
    from mimscale.files import write_text
    from mimscale.study.results.released import verify
    from mimscale.training.recipe import RecipeError

    try:
        about = (options.recipe, options.dataset, options.iterations, options.images, options.batch)
        found = verify(options.file, options.shards, *about)
        if options.json is not None:
            write_text(options.json, json.dumps(found, indent=1) + "\n")
    except (RecipeError, ShardError, ValueError, OSError) as error:
        print(f"mimscale: error: {error}", file=sys.stderr)
        return 1
    print(table(found))
    return 0
