"""The ``mimscale`` command: one word, and the module that does it."""

from __future__ import annotations

import sys
from importlib import import_module

# words -> (module with main(argv) -> exit status, how many of the words it wants to see itself, what it does)
COMMANDS = {
    "reconstruct": ("mimscale.commands.reconstruct", 0, "fill in hidden parts of images with a run's model, as a PNG"),
    "submit": ("mimscale.commands.submit", 0, "a recipe as a Slurm job: writes the file, shows it, and queues it"),
    "keys": (
        "mimscale.commands.keys",
        0,
        "every key of recipes and studies: what it does, its default, and from where",
    ),
    "status": ("mimscale.commands.status", 0, "progress, rate, ETA and health of runs, from another terminal"),
    "export": (
        "mimscale.commands.export",
        0,
        "write a run's weights for timm, transformers, the released code, or as safetensors",
    ),
    "plan-memory": (
        "mimscale.training.planning.zero",
        0,
        "what fits on which GPUs, how long it takes and what it costs",
    ),
    "plan-communication": (
        "mimscale.commands.plan_communication",
        0,
        "bytes between GPUs in a step, and the efficiency to expect, on 8 to 512 of them",
    ),
    "verify-checkpoint": (
        "mimscale.commands.verify_checkpoint",
        0,
        "a released weight's validation loss, l1 and l2, beside the published one",
    ),
    "evaluate": ("mimscale.commands.evaluate", 0, "a fine-tuned model's figures on held-out data"),
    "predict": ("mimscale.commands.predict", 0, "what a fine-tuned model says of any images"),
    "probe": ("mimscale.transfer.probe", 0, "linear probe and nearest neighbours on frozen features, in minutes"),
    "bench data": (
        "mimscale.commands.bench.data",
        0,
        "reading and decoding against ImageFolder, webdataset and the decoder's limit",
    ),
    "bench step": (
        "mimscale.commands.bench.step",
        1,
        "a training step against timm's SwinV2 and the machine's matrix products",
    ),
    "bench communication": (
        "mimscale.commands.bench.communication",
        0,
        "bytes that ranks exchange in real steps, against the model of docs/scaling.md",
    ),
    "bench save": (
        "mimscale.commands.bench.save",
        0,
        "how long a step waits for a checkpoint, beside training and in line",
    ),
    "bench memory": ("mimscale.commands.bench.step", 1, "activation memory, bytes an image"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first word names."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: mimscale COMMAND ...  (mimscale COMMAND --help says more)\n\n{_listing()}")
        return 0 if words else 2
    for name, (module, seen, _) in COMMANDS.items():
        length = len(name.split())
        if words[:length] == name.split():
            return import_module(module).main(words[length - seen :])
    print(f"mimscale: there is no command '{' '.join(words[:2])}'; there are\n\n{_listing()}", file=sys.stderr)
    return 2


def _listing() -> str:
    return "\n".join(f"  {name:<19} {text}" for name, (_, _, text) in COMMANDS.items())


if __name__ == "__main__":
    sys.exit(main())
