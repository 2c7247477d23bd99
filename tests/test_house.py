"""The house: who may import whom, and that what the docs show runs."""

import re

import pytest
import torch
from PIL import Image

from inversion import PRIORS, STRATEGIES
from models import families
from quant import OBSERVERS
from tests.conftest import ROOT
from tests.import_graph import ENTRY, floors, import_graph, modules

GRAPH = import_graph()


def test_imports_go_in_no_circle_and_entry_scripts_stand_on_top():
    found = floors(GRAPH)
    assert all(not GRAPH[name] & set(ENTRY) for name in GRAPH)
    assert all(found[name] == 1 + max(found[other] for other in GRAPH[name]) for name in ENTRY)
    inside = {other for name, others in GRAPH.items() if not name.startswith("scripts") for other in others}
    assert not [name for name in inside if name.startswith("scripts")]


@pytest.mark.parametrize(
    ("package", "others"),
    [
        ("models", ("inversion", "quant", "kt")),
        ("inversion", ("quant", "kt")),
        ("quant", ("inversion", "kt")),
        ("kt", ("inversion", "quant")),
    ],
)
def test_a_package_knows_nothing_of_those_beside_and_above_it(package, others):
    mine = {name: used for name, used in GRAPH.items() if name.split(".")[0] == package}
    assert len(mine) > 3
    assert not [(name, other) for name, used in mine.items() for other in used if other.split(".")[0] in others]


def test_utils_has_a_floor_that_packages_stand_on_and_one_that_stands_on_them():
    tasks = {"inversion", "quant", "kt"}
    upper = {name for name, used in GRAPH.items() if tasks & {other.split(".")[0] for other in used}}
    upper = {name for name in upper if name.startswith("utils.")}
    assert {"utils.images", "utils.evaluation", "utils.flags"} <= upper
    packages = {name: used for name, used in GRAPH.items() if name.split(".")[0] in (*tasks, "models")}
    assert not [(name, other) for name, used in packages.items() for other in used & upper]


def test_the_graph_has_what_it_is_read_for():
    assert {"utils.images", "inversion", "quant"} <= GRAPH["utils.quant_task"] | {"utils.images"}
    assert "models" in GRAPH["inversion.engine"]
    assert "quant.onnx_graph" in GRAPH["quant.export"]  # inside a function
    assert "inversion.engine" in GRAPH["inversion"]  # when it is asked for


def test_a_namespace_goes_no_further_than_parsing():
    """Those that read one turn it into configurations; nothing else of a package names it, but a file may hold one."""
    named = {name for name, file in modules().items() if "Namespace" in file.read_text()}
    parsing = {"utils.flags", "utils.cli", "scripts.comparison", "scripts.compare", "scripts.compare_kt"}
    assert named <= parsing | {"models.formats"}


def python_blocks() -> list:
    """Every Python example of the pages that promise to run."""
    found = []
    for page in ("docs/api.md", "docs/models.md", "CONTRIBUTING.md"):
        blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
        found += [pytest.param(block, id=f"{page}-{number}") for number, block in enumerate(blocks, start=1)]
    return found


def test_the_pages_have_their_examples():
    assert len(python_blocks()) >= 8


@pytest.fixture
def tables(monkeypatch):
    """What examples add to the tables is taken out again."""
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES)
    before = [(table, dict(table)) for table in (PRIORS, STRATEGIES, OBSERVERS)]
    yield
    for table, rows in before:
        table.clear()
        table.update(rows)


@pytest.mark.parametrize("block", python_blocks())
def test_examples_run_as_they_stand(tmp_path, monkeypatch, capfd, tables, block):
    (tmp_path / "photos" / "2024").mkdir(parents=True)
    for number in range(8):
        noise = torch.rand(40, 50, 3, generator=torch.Generator().manual_seed(number)).mul(255).byte().numpy()
        Image.fromarray(noise).save(tmp_path / "photos" / "2024" / f"{number}.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "example", "exec"), {"__name__": "example"})
    assert capfd.readouterr() == ("", "")  # an API does not print
