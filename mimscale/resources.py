"""What comes with mimscale beside its modules: launchers, recipes, studies, DeepSpeed configurations, Slurm files.

They are at the top of a clone; a wheel carries the same folders inside the package. Wherever a file of one of the kinds below is
asked for, its name does, from any folder: ``swinv2_b``, ``finetune/demo``, ``zero2``.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mimscale.wording import printable

# Of a folder's files in a message.
LISTED = 20
_PACKAGE = Path(__file__).resolve().parent
_CARRIED = _PACKAGE / "carried"  # setup.py puts it into a wheel
ROOT = _CARRIED if _CARRIED.is_dir() else _PACKAGE.parent
LAUNCHERS = ROOT / "launchers"


@dataclass(frozen=True)
class Kind:
    """One kind of file that is found by name.

    Args:
        what: it is called in messages.
        folder: of those that come with mimscale.
        suffix: of its files.
        aliases: further names, each with the one that it stands for.
    """

    what: str
    folder: Path
    suffix: str
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False)

    def find(self, name: str | Path) -> Path:
        """The file that ``name`` means; ``name`` itself where there is none, so that reading it fails.

        A file of that path counts first, then one of the same path in a clone (``launchers/recipes/demo.yaml``), then a name.
        """
        path = Path(name)
        if path.is_absolute() or _holds(path, stat.S_ISDIR) is False:  # a folder may have a recipe's name
            return path
        if _holds(ROOT / path, stat.S_ISREG):
            return ROOT / path
        named = self.folder / f"{self.aliases.get(str(path), path)}{self.suffix}"
        return named if _holds(named, stat.S_ISREG) else path

    def names(self) -> list[str]:
        """What :meth:`find` knows by name."""
        found = (path.relative_to(self.folder).with_suffix("") for path in self.folder.rglob(f"*{self.suffix}"))
        return sorted(map(str, found), key=lambda name: ("/" in name, name))

    def missing(self, name: str | Path) -> str:
        """What to report where :meth:`find` has found nothing: the nearest name, where it was looked for, and all names."""
        path, names = Path(name), self.names()
        stem = path.name.removesuffix(self.suffix)
        near = difflib.get_close_matches(stem[:100], names, n=1, cutoff=0.6)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        for kind, command in ((RECIPES, "pretrain"), (FINETUNE_RECIPES, "finetune")):
            if kind.folder != self.folder and self.what == kind.what and kind.find(stem) != Path(stem):
                hint = f"; '{stem}' is a recipe of mimscale {command}"
        looked = f"{printable(os.path.realpath(path.parent))} has {self._beside(path.parent)}"
        inner = [other for other in names if "/" in other]
        more = f", and {len(inner)} in {inner[0].partition('/')[0]}/" if inner else ""
        own = ", ".join(other for other in names if other not in inner)
        return f"there is no {self.what} {printable(name)}{hint}\n{looked}\nmimscale has {own}{more}"

    def _beside(self, folder: Path) -> str:
        """The files of this kind in a folder, the first of very many."""
        try:
            with os.scandir(folder) as entries:
                found = sorted(e.name for e in entries if e.name.endswith(self.suffix) and not e.name.startswith("."))
        except (OSError, ValueError):
            found = []
        more = [f"and {len(found) - LISTED} more"] if len(found) > LISTED else []
        return ", ".join([*(printable(name, 80) for name in found[:LISTED]), *more]) or f"no {self.suffix} file"


def _holds(path: Path, kind: Callable[[int], bool]) -> bool | None:
    """Whether there is something of that kind; ``None`` where there is nothing, as of what can be no path (a NUL, very long)."""
    try:
        return kind(path.stat().st_mode)
    except (OSError, ValueError):
        return None


RECIPES = Kind("recipe", LAUNCHERS / "recipes", ".yaml")
FINETUNE_RECIPES = Kind("recipe", LAUNCHERS / "recipes" / "finetune", ".yaml", {"demo_classification": "demo"})
STUDIES = Kind("study", LAUNCHERS / "studies", ".yaml")
DS_CONFIGS = Kind("DeepSpeed configuration", ROOT / "ds_configs", ".json")
