"""Where the files are that come with mimscale: launchers, recipes, studies, DeepSpeed configurations."""

from pathlib import Path

_CLONE = Path(__file__).resolve().parents[1]
LAUNCHERS = _CLONE / "launchers"
RECIPES = LAUNCHERS / "recipes"
STUDIES = LAUNCHERS / "studies"
DS_CONFIGS = _CLONE / "ds_configs"
