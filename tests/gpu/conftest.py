"""Where the tests of this folder run: on a GPU, or with MIMSCALE_GPU_REHEARSAL=1 on a CPU, as a rehearsal of themselves.

``pytest -m gpu tests/gpu`` writes what was measured to gpu_report.json and gpu_report.md, or beside MIMSCALE_GPU_REPORT.
"""

import json
import os
import time
from pathlib import Path

import numpy
import pytest
import torch

REHEARSAL = os.environ.get("MIMSCALE_GPU_REHEARSAL") == "1"
FIGURES: dict[str, float | str] = {}
STARTED = time.monotonic()


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="no CUDA GPU here; MIMSCALE_GPU_REHEARSAL=1 rehearses it on a CPU")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available() and not REHEARSAL:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def pictures() -> torch.Tensor:
    """Four photographs (4, 3, 192, 192), normalised: parts of one that a package ships."""
    import matplotlib.cbook
    from PIL import Image

    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        pixels = torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    parts = [pixels[:, 60 * i : 60 * i + 192, 70 * i : 70 * i + 192] for i in range(4)]
    return (torch.stack(parts) - 0.45) / 0.225


@pytest.fixture
def figure(record_property):
    """Put a figure into the report."""

    def put(name: str, value: float) -> None:
        record_property(f"figure: {name}", value)

    return put


def pytest_runtest_logreport(report):
    # Where tests run side by side, their properties are what comes back from those that ran them.
    if report.when == "call":
        found = {name: value for name, value in report.user_properties if name.startswith("figure: ")}
        FIGURES.update({name.removeprefix("figure: "): value for name, value in found.items()})


def pytest_sessionfinish():
    if not FIGURES or "PYTEST_XDIST_WORKER" in os.environ:
        return
    import deepspeed

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (rehearsal)"
    packages = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
    if torch.cuda.is_available():
        import triton

        packages["triton"] = triton.__version__
    seconds = round(time.monotonic() - STARTED)
    report = {
        "card": card,
        "packages": packages,
        "seconds": seconds,
        "command": "pytest -m gpu tests/gpu",
        "figures": FIGURES,
    }
    target = Path(os.environ.get("MIMSCALE_GPU_REPORT", "gpu_report.json"))
    target.write_text(json.dumps(report, indent=1))
    lines = [
        f"{card}, {', '.join(f'{name} {version}' for name, version in packages.items())}; `{report['command']}`, {seconds} s",
        "",
    ]
    lines += ["| what | figure |", "| --- | --- |", *(f"| {name} | {value:.4g} |" for name, value in FIGURES.items())]
    target.with_suffix(".md").write_text("\n".join(lines) + "\n")
