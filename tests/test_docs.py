"""The documentation keeps its word: links resolve, commands and names exist, and its examples run."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from mimscale.cli import COMMANDS, command
from mimscale.resources import DS_CONFIGS, FINETUNE_RECIPES, RECIPES, STUDIES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
# What the field says otherwise: resume, instead of, predict, duplicate, report, ...
UNUSUAL = re.compile(
    r"\b(go(es|ing)? on (with|where|from)|gone on|in place of|foret[eo]ll?d?|stands? twice|gets? on\b|without a word|"
    r"(is|are) said\b|cannot be had|told of|made again|takes? it at its word)",
    re.I,
)


def pages(test):
    """Run ``test`` once for each page."""
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))(test)


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return BLOCK.sub("", page.read_text())


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language; "" for commands and output."""
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind == language]


def anchors(page: Path) -> set[str]:
    """What may stand behind # in a link to a page: its headings, as GitHub names them."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def typed(page: Path) -> Iterator[list[str]]:
    """The words of every ``mimscale ...`` line in a page's blocks that a reader could type as it stands."""
    for line in "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines():
        line = line.strip().removeprefix("$ ")
        if line.startswith("mimscale ") and not re.search(r"\.\.\.|\[-|\[[A-Za-z@]|\|", line):
            yield shlex.split(line, comments=True)[1:]


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if path.startswith(("http:", "https:")):
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_page_is_reached_from_the_map() -> None:
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page not in reached and page.suffix == ".md" and page.exists():
            reached.add(page)
            found = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
            todo += [(page.parent / target).resolve() for target in found]
    assert not set(PAGES) - reached


@pages
def test_commands_exist_and_take_the_options_shown(page: Path) -> None:
    for word, second in re.findall(r"(?:^|`|\$ )mimscale ([a-z][\w-]*)(?: ([a-z]+))?", page.read_text(), re.M):
        assert word in COMMANDS, f"mimscale {word}"
        if second and word in ("shards", "study", "bench"):
            assert re.search(rf"\b{second}\b", command(word).parser().format_help()), f"mimscale {word} {second}"
    for word, *rest in typed(page):
        if word not in COMMANDS:
            continue  # mimscale --help
        parser = command(word).parser()
        parse = parser.parse_args if word in ("shards", "bench") else parser.parse_intermixed_args
        try:
            parse(rest)
        except SystemExit as stop:
            assert not stop.code, f"mimscale {word} {shlex.join(rest)}"


@pages
def test_files_and_names_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(
        r"\b(?:mimscale|tests|launchers|ds_configs|shards)/[\w./-]*\.(?:py|yaml|json|sbatch)\b", text
    ):
        assert (ROOT / path).exists(), path
    kinds = RECIPES, FINETUNE_RECIPES, STUDIES, DS_CONFIGS
    names = {name for kind in kinds for name in (*kind.names(), *kind.aliases)}
    families = "swinv2|vit|mae_vit|simmim_vit|imagenet1k|inat18|coco|ade20k|demo|mini|giant"
    known = names | {"vit_b", "vit_l", "vit_h"}
    for name in re.findall(rf"`((?:{families})_[\w*]+|zero\d\w*)`", text):
        assert any(fnmatch(other, name) for other in known), name
    given = (("--recipe", (RECIPES, FINETUNE_RECIPES)), ("--deepspeed_config", (DS_CONFIGS,)))
    for option, choices in given:
        for name in re.findall(rf"{option}[ =]([\w./]+)", text):
            assert name.isupper() or any(kind.find(name).is_file() for kind in choices), f"{option} {name}"
    for name in re.findall(r"mimscale submit ([a-z][\w/]*)", text):
        assert RECIPES.find(name).is_file(), f"submit {name}"
    for name in re.findall(r"mimscale study \w+ +([a-z]\w*)", text):
        assert name == "published" or STUDIES.find(name).is_file(), f"study {name}"


@pages
def test_keys_of_recipes_and_studies_are_in_the_reference(page: Path) -> None:
    reference = (ROOT / "docs/recipe.md").read_text()
    sections = "data|model|mim|optimizer|schedule|train|finetune|mix|local|speed|slurm"
    for key in re.findall(rf"(?<![\w./@])((?:{sections})\.(?!log|sbatch|py)[a-z_]+)(?=[=`])", page.read_text()):
        assert f"`{key}`" in reference, key


def test_pages_that_code_and_recipes_refer_to_are_there() -> None:
    for folder in ("mimscale", "launchers", "tests", "shards"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".sbatch"):
                for page in re.findall(r"\bdocs/[\w./-]+\.(?:md|html|png)", path.read_text()):
                    assert (ROOT / page).exists(), f"{path}: {page}"


@pages
def test_words_are_the_fields_own_and_paths_are_nobodys(page: Path) -> None:
    text = page.read_text()
    assert not UNUSUAL.search(prose(page)), UNUSUAL.search(prose(page))
    assert not re.search(r"(?<![\w.~:/*}])/(?:work|home|root|tmp|Users|mnt)\b", text)
    assert not re.search(r"\b1 (?:images|ranks|steps|samples|shards)\b", text)


@pages
def test_python_is_python_and_its_imports_are_there(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.parse(block).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(compile(ast.Module([node], []), str(page), "exec"), {})


def test_figures_that_are_computed_are_those_printed(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    guide, published = ROOT / "docs/guides/study.md", ROOT / "docs/results/published.md"
    plan = next(block for block in blocks(guide, "") if block.startswith("together"))
    budget = next(block for block in blocks(published, "") if block.startswith("For 16 times"))
    check = published.read_text().partition("median width |")[2]
    for words, shown in (
        ("plan paper", plan),
        ("predict published --budget 16 --dataset in1k_50", budget),
        ("predict published --check", check[: check.index("at most 2.44")]),
    ):
        assert command("study").main(words.split()) == 0
        printed = capsys.readouterr().out
        for line in shown.splitlines():
            figures = re.findall(r"\d[\d,.]*", line)
            found = re.search(r"\D+".join(map(re.escape, figures)), printed)
            assert not figures or found, f"mimscale study {words}: {line}"


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_examples_for_ones_own_images_run(page: str, undisturbed: Path, solar_folders: Path, tmp_path, monkeypatch):
    """On a run of the recipe that the page trains with, smaller."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(undisturbed)
    shutil.copy(next((solar_folders / "val").rglob("*.png")), "photo.jpg")
    block = next(block for block in blocks(ROOT / page, "python") if "mimscale.load" in block)
    names: dict = {}
    exec(compile(block, page, "exec"), names)
    assert names["features"].shape == (1, 8 * names["encoder"].embed_dim)
