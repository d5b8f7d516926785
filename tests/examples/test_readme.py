"""The README's code runs, its limits hold, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*")

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()


def test_code_blocks_run_in_order_in_one_session(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where they may leave files
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    session: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), session)


def test_it_is_short_and_opens_with_the_difference_to_plain_lora():
    assert len(TEXT.splitlines()) <= 90
    diff = re.search(r"```diff\n(.*?)```", TEXT, re.DOTALL)
    assert diff
    assert len(diff.group(1).splitlines()) <= 5
    assert "+ tx = lorapro_adamw(" in diff.group(1)


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", TEXT))
def test_relative_links_lead_to_files(target):
    assert (ROOT / target).exists()
