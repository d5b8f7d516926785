"""The documentation: its code runs, and it has every public name and every error."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import lorapro_jax
import lorapro_jax.diagnostics
import lorapro_jax.initializers
import lorapro_jax.keras
import lorapro_jax.peft

pytestmark = [
    pytest.mark.usefixtures("quick_compiles"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*"),
]

ROOT = Path(__file__).parents[2]
DOCS, PACKAGE = ROOT / "docs", ROOT / "lorapro_jax"
RECIPES = ROOT / "examples" / "recipes"
PAGES = {
    path.relative_to(DOCS).as_posix(): path.read_text() for path in DOCS.rglob("*.md")
}
MODULES = (
    lorapro_jax,
    lorapro_jax.diagnostics,
    lorapro_jax.initializers,
    lorapro_jax.keras,
    lorapro_jax.peft,
)
BLOCK = re.compile(r"^(?:<!-- needs: (\w+) -->\n)?```python\n(.*?)^```", re.S | re.M)


def code_of(page):
    """The Python blocks of a page that are its own: what each needs, and its code.

    Indented ones are whole files of `examples`, which have tests of their own.
    """
    return BLOCK.findall(PAGES[page])


def run(page, blocks):
    session: dict[str, object] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, page, "exec"), session)


@pytest.mark.parametrize("page", [page for page in sorted(PAGES) if code_of(page)])
def test_code_runs_page_by_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, [code for needs, code in code_of(page) if not needs])


@pytest.mark.parametrize(("needs", "page"), [("peft", "adapters.md")])
def test_code_that_needs_more_runs_where_there_is_more(
    needs, page, tmp_path, monkeypatch
):
    pytest.importorskip(needs)
    monkeypatch.chdir(tmp_path)
    blocks = code_of(page)
    assert any(other == needs for other, _ in blocks)
    run(page, [code for other, code in blocks if other in ("", needs)])


def test_no_block_needs_what_nothing_runs():
    needs = {(x, page) for page in PAGES for x, _ in code_of(page) if x}
    assert needs == {("peft", "adapters.md")}


def included(pages):
    """The files that pages show, by what says so to MkDocs."""
    text = "\n".join(pages.values())
    return set(re.findall(r'^ *--8<-- "(.+)"$', text, re.M))


def test_pages_show_every_recipe_and_files_that_exist():
    """Ruff formats what is fenced as `python`, and takes `--8<--` for arithmetic."""
    recipes = {f"examples/recipes/{x.name}" for x in RECIPES.glob("[!_]*.py")}
    assert recipes - included(PAGES) == {"examples/recipes/digits.py"}
    assert all((ROOT / path).is_file() for path in included(PAGES))
    assert not any("8 <" in page for page in PAGES.values())
    # Negative control: as Ruff would have it.
    spoilt = {"x.md": '    --8 < --"examples/recipes/merge.py"'}
    assert included(spoilt) == set()


def documented(pages):
    """The objects that the API's pages show."""
    text = "\n".join(x for path, x in pages.items() if path.startswith("api/"))
    return set(re.findall(r"^::: lorapro_jax\.(\S+)$", text, re.M))


def public_names():
    """Each public object by its shortest name, and the other names that it has."""
    return {
        f"{module.__name__}.{name}".removeprefix("lorapro_jax."): getattr(module, name)
        for module in MODULES
        for name in module.__all__
    }


def undocumented(pages):
    """Public names of which no API page shows the object."""
    names, shown = public_names(), documented(pages)
    there = [id(names[name]) for name in shown & names.keys()]
    return sorted(name for name, value in names.items() if id(value) not in there)


def aliases():
    """Types of this package in public signatures that are not public themselves."""
    places = {}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for name in re.findall(r"^(\w+)(?:: TypeAlias)? = ", path.read_text(), re.M):
            places.setdefault(name, []).append(f"{module}.{name}")
    functions = list(filter(inspect.isfunction, public_names().values()))
    written = [str(x) for f in functions for x in f.__annotations__.values()]
    names = set(re.findall(r"\w+", " ".join(written)))
    names -= {name.rpartition(".")[2] for name in public_names()}
    return {place for name in names for place in places.get(name, [])}


def test_every_public_name_is_in_the_api():
    assert undocumented(PAGES) == []
    private = {x for x in documented(PAGES) if re.search(r"(^|\.)_", x)}
    assert documented(PAGES) - private <= public_names().keys()


def test_control_a_name_that_is_left_out_is_missed():
    page = PAGES["api/weights.md"].replace("::: lorapro_jax.merge_model", "")
    assert undocumented({**PAGES, "api/weights.md": page}) == ["merge_model"]


def test_every_type_in_a_public_signature_is_in_the_api():
    assert "pairs._scale.ScaleSpec" in aliases()
    assert aliases() - documented(PAGES) == set()


def text_of(node):
    """A literal with `…` where an f-string has a value, on one line; or None."""
    if isinstance(node, ast.JoinedStr):
        parts = [x.value if isinstance(x, ast.Constant) else "…" for x in node.values]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        parts = [node.value]
    else:
        return None
    return re.sub("…+", "…", " ".join("".join(parts).split()))


def is_sentence(text):
    return len(re.findall(r"\w+", text)) >= 4 and len(text.split()) >= 3


def texts(source):
    """What errors of a module say: every literal that is raised, or that is in words.

    Messages are also put together by functions, of parts that are not complete; so any
    literal of four words counts that is no docstring.
    """
    tree = ast.parse(source)
    apart, raised = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            apart.add(node.value)
        elif isinstance(node, ast.JoinedStr):
            apart |= set(ast.walk(node)) - {node}
        elif isinstance(node, ast.FunctionDef) and node.name == "__str__":
            apart |= set(ast.walk(node))
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            raised |= set(node.exc.args)
    return {
        text
        for node in ast.walk(tree)
        if node not in apart and (text := text_of(node))
        if node in raised or is_sentence(text)
    }


def texts_of_the_library():
    """Of all modules but the one that describes pairs in a table."""
    paths = set(PACKAGE.rglob("*.py")) - {PACKAGE / "pairs" / "_describe.py"}
    return set().union(*(texts(path.read_text()) for path in paths))


def texts_on(page):
    """The texts in a page's blocks, divided by blank lines."""
    blocks = re.findall(r"^```text\n(.*?)^```", page, re.S | re.M)
    return {" ".join(x.split()) for block in blocks for x in block.split("\n\n")}


def test_every_error_text_is_on_its_page_and_no_other():
    """A new or changed text has to be put there, under what there is to do."""
    expected, found = texts_of_the_library(), texts_on(PAGES["trouble/errors.md"])
    assert expected - found == set()
    assert found - expected == set()


def test_every_group_of_error_texts_says_what_to_do():
    sections = re.split(r"^##+ ", PAGES["trouble/errors.md"], flags=re.M)[1:]
    with_texts = [section for section in sections if "```text" in section]
    assert len(with_texts) > 20
    for section in with_texts:
        title, _, rest = section.partition("\n")
        assert len(rest.partition("```text")[0].split()) >= 10, title


CHANGED = {
    "a message": ("raise ValueError('`x` is no number.')", "`x` is no number."),
    "a value in it": ("raise TypeError(f'`{x}` is {y!r}.')", "`…` is …."),
    "two words": ("raise ValueError(f'{x} is damaged')", "… is damaged"),
    "a function's": ("def f(x): return f'No pair in {x}, no.'", "No pair in …, no."),
    "lines": ("raise ValueError('Pass it '\n  f'as {x} too.')", "Pass it as … too."),
}


@pytest.mark.parametrize("case", CHANGED)
def test_control_a_text_that_is_not_on_the_page_is_seen(case):
    source, text = CHANGED[case]
    assert texts(source) == {text}
    assert text not in texts_on(PAGES["trouble/errors.md"])


def test_control_docstrings_and_names_are_no_texts():
    source = '"""A docstring of four words."""\nNAME = "adapter_config.json"\n'
    assert texts(source) == set()


def consoles_of(path):
    """What the consoles that a file makes are given by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Console":
            yield {x.arg: ast.literal_eval(x.value) for x in node.keywords
                   if isinstance(x.value, ast.Constant)}  # fmt: skip


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_no_console_takes_an_extra_in_brackets_for_markup(folder):
    """`pip install -e '.[text]'` would become `pip install -e '.'`."""
    given = [x for path in (ROOT / folder).rglob("*.py") for x in consoles_of(path)]
    assert given
    assert all(x.get("markup") is False for x in given)


def test_control_a_console_of_rich_drops_what_is_in_brackets():
    console = pytest.importorskip("rich.console").Console
    for markup, left in ((True, "'.'"), (False, "'.[text]'")):
        with (printer := console(markup=markup)).capture() as got:
            printer.print("'.[text]'")
        assert got.get().strip() == left
