"""The pages: what they name exists, their links and anchors lead somewhere, their commands parse, their code runs."""

import functools
import importlib
import re
import shlex
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from gen.cli import COMMANDS, _split_modules, parse
from gen.errors import GenError
from gen.experiments import presets
from gen.pretrained.systems import SYSTEMS, system
from scripts import notebook

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / name for name in ("benchmarks/RESULTS.md", "experiments/launch/README.md")),
]
METHOD_PAGES = ("tokenizers", "backbones", "token-generators", "solvers", "guidance", "distillers", "measures")
# code of these pages is executed by other tests, which look at what it does as well
EXECUTED = {"CONTRIBUTING.md": "test_contributing", "README.md": "test_readme"}
EXECUTED |= {f"docs/own-{name}.md": "test_own" for name in ("experiment", "method", "solver-and-student")}
CODE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.M | re.S)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    return CODE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and the site make them."""
    found = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", text).lower()).strip().replace(" ", "-") for text in found}


def resolve(dotted: str) -> object:
    """What a dotted name means: the longest prefix that is a module, then its attributes."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        path = Path(ROOT, *parts[:end])
        if parts[:2] == ["gen", "experiments"]:
            path = Path(ROOT, *parts[1:end])
        if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file():
            found: object = importlib.import_module(".".join(parts[:end]))
            for part in parts[end:]:
                found = getattr(found, part)
            return found
    raise AssertionError(dotted)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_exist_and_links_lead_somewhere(page: Path) -> None:
    text = prose(page)
    for dotted in re.findall(r"`(gen(?:\.\w+)+)`", text):
        if dotted not in ("gen.kinds", "gen.load"):  # an entry point group; a lazy name
            resolve(dotted)
    for link, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), f"{link}#{anchor}"


def test_the_walks_and_words_are_of_this_code() -> None:
    """Each page names enough of it to be one."""
    for page, least in (("walk.md", 35), ("glossary.md", 30)):
        assert len(set(re.findall(r"`gen\.[\w.]+`", (ROOT / "docs" / page).read_text()))) >= least


def commands(page: Path) -> Iterator[str]:
    """The gen commands of a page: lines of its blocks, after ``$`` where these show output too, and inline code."""
    text = page.read_text()
    for _, language, block in CODE.findall(text):
        block = block.replace("\\\n", " ")
        prompt = r"^ *\$ " if re.search(r"^ *\$ ", block, re.M) else r"^ *"
        if language in ("", "sh"):
            yield from re.findall(rf"{prompt}(?:\S*/)?gen (.*)$", block, re.M)
    text = CODE.sub("", text)
    yield from re.findall(r"^    (?:\S*/)?gen (.*(?:\\\n.*)*)$", text, re.M)
    yield from (" ".join(found.split()) for found in re.findall(r"`gen ([^`]+)`", text))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page: Path) -> None:
    """Every flag of every command exists, on all pages; values are not looked at."""
    for line in commands(page):
        words = shlex.split(line.replace("\\\n", " ").rstrip('&" '), comments=True)
        command = next((c for n in (2, 1) if (c := " ".join(words[:n])) in COMMANDS), None)
        if command is None or len(words) == 1 or "|" in line:
            assert command or len(words) <= 1 or words[0] in ("COMMAND", "METHOD") or words[1] in ("...", "COMMAND"), (
                line
            )
            continue  # the command itself is spoken of
        words, _ = _split_modules(words[len(command.split()) :])
        words = ["1" if re.fullmatch("[A-Z]", word) else word for word in words if word != "..."]  # --cfg-scale W
        try:
            parse(command, words)
        except GenError as error:
            left_out = re.search("needs|missing|required|lacks", str(error))  # what a sentence does not repeat
            if not left_out:
                raise AssertionError(f"gen {line}: {error}") from None


@functools.cache
def preset_names() -> set[str]:
    return set(presets())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_programs_and_targets_exist(page: Path) -> None:
    """Scripts, modules, make targets and presets that a page tells to run are there."""
    text, makefile, known = page.read_text(), (ROOT / "Makefile").read_text(), preset_names()
    scripts = re.findall(r"(?<![\w/])((?:scripts|benchmarks|experiments)/[\w/]+\.(?:py|sh|sbatch))", text)
    for script in scripts if page.name != "coming-from.md" else ():  # which names those of others
        assert (ROOT / script).is_file(), script
    for module in re.findall(r"python3? -m (gen\.experiments\.\w+)", text):
        assert (ROOT / "experiments" / f"{module.rpartition('.')[2]}.py").is_file(), module
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for line in commands(page):
        words = shlex.split(line.replace("\\\n", " "), comments=True)
        if words[:1] in (["train"], ["distill"], ["compile"]) and re.fullmatch(r"[a-z][a-z0-9-]+", (*words, "")[1]):
            assert words[1] in known, line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_run(page: Path) -> None:
    blocks = [block for _, language, block in CODE.findall(page.read_text()) if language == "python"]
    if name(page) in EXECUTED:
        assert blocks
        assert (ROOT / "tests" / f"{EXECUTED[name(page)]}.py").is_file()
        return
    for block in blocks:
        exec(compile(block, name(page), "exec"), types.ModuleType("page").__dict__)


def method_sections() -> dict[str, str]:
    """The sections of the method pages that describe a method, by page and heading."""
    found = {}
    for page in METHOD_PAGES:
        for section in re.split(r"^##+ ", (ROOT / "docs" / f"{page}.md").read_text(), flags=re.M)[1:]:
            if "**Idea.**" in section:
                found[f"{page}: {section.partition(chr(10))[0]}"] = section
    return found


def test_every_method_section_has_every_part() -> None:
    sections = method_sections()
    assert len(sections) > 60
    for name, text in sections.items():
        for part in ("Formula", "When", "Cost", "Run", "Digits"):
            assert f"**{part}.**" in text, f"{name} lacks **{part}.**"
        assert re.search(r"arxiv\.org|arXiv \d|Ours; no paper|convention of this project|-log2 p", text), (
            f"{name} names no paper"
        )


def test_every_registered_method_has_a_section() -> None:
    """By its kind, or by the name of its class or module."""
    from gen.experiments.compare_distillers import METHODS
    from gen.kinds import KINDS

    text = "".join(method_sections().values()) + (ROOT / "docs" / "after-training.md").read_text()
    families = ("backbone", "solver", "adaptive", "guidance", "tokenizer", "token-model", "latent-token-model")
    families += ("text-flow", "token-student", "bit-network", "bit-process", "adapter", "task")
    # these train what any section describes
    general = {"denoiser-task", "token-task", "latent-token-task", "tokenizer-task", "adversarial-tokenizer-task"}
    missing = [
        f"{family} {kind}"
        for family in families
        for kind, target in KINDS[family].items()
        if kind not in general
        and not named_in(kind, text)
        and not any(f"`{name}`" in text for name in (target.partition(":")[0], target.replace(":", ".")))
    ]
    missing += [method for method in METHODS if not named_in(method, text)]
    assert not missing


def named_in(word: str, text: str) -> bool:
    """Whether inline code of a text is this word, or a command with it."""
    return bool(re.search(rf"`(?:[^`\n]* )?{word}(?: [^`\n]*)?`", text))


def test_every_building_block_stands_on_a_method_page() -> None:
    from gen.kinds import KINDS
    from gen.metrics.measures import MEASURES

    text = "".join((ROOT / "docs" / f"{page}.md").read_text() for page in METHOD_PAGES)
    rows = {family: list(KINDS[family]) for family in ("grid", "quantizer")}
    rows["measure"] = [measure for measure, row in MEASURES.items() if row.asked]
    missing = [f"{family} {row}" for family, named in rows.items() for row in named if not named_in(row, text)]
    assert not missing


def test_every_published_system_stands_in_the_table() -> None:
    rows = re.findall(r"^\| (`.*?) \|.*\| (.*?) \|$", (ROOT / "docs" / "weights.md").read_text(), re.M)
    rows = [(names, known) for names, known in rows if "/" not in names and "." not in names]
    named = {system_: known for names, known in rows for system_ in re.findall(r"`([\w-]+)`", names)}
    assert set(named) == set(SYSTEMS)
    for system_, known in named.items():
        assert system(system_).signature or "say" in known, system_


def test_the_version_is_the_changelogs() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[0] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_page_of_docs_is_on_the_site() -> None:
    listed = re.findall(r"- ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(listed)
    assert {f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.py")} <= set(listed)


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted((ROOT / "notebooks").glob("*.py")), ids=lambda path: path.stem)
def test_a_notebook_runs(source: Path, tmp_path: Path) -> None:
    notebook.run(source, tmp_path)
    text = (tmp_path / f"{source.stem}.md").read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert pictures
    assert all((tmp_path / picture).is_file() for picture in pictures)
