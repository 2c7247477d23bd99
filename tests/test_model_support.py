"""Which models can be used: the table, the page that it goes into, and the checks of small models."""

import pytest
import timm
import torch
from torch import nn

from models import SparseViT
from scripts import model_checks, model_support
from scripts.model_checks import CHECKS, checked, kind, small_model, with_random_weights
from scripts.model_support import BEGIN, END, architecture, main, support_table, with_table
from tests.conftest import ROOT, run_script, tiny_vit
from utils.errors import UserError

NAMES = {
    "vit_tiny_patch16_224": ["vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"],
    "vit_small_patch14_dinov2": ["vit_small_patch14_dinov2.lvd142m"],
    "vit_tiny_r_s16_p8_224": ["vit_tiny_r_s16_p8_224.augreg_in21k"],
    "eva02_tiny_patch14_336": ["eva02_tiny_patch14_336.mim_in22k_ft_in1k"],
}


@pytest.fixture
def few_names(monkeypatch):
    """timm as if it had these models alone, of which DINOv2 has no classifier."""
    names = {name: ours for name, ours in NAMES.items() if timm.list_pretrained(f"{name}.*")}
    assert len(names) == len(NAMES)
    monkeypatch.setattr(model_support, "names_of", lambda modules, patterns: names)


def table_of(printed):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]


@pytest.mark.usefixtures("few_names")
def test_the_table_counts_names_by_family_and_says_why_some_are_refused(capsys):
    main([])
    printed = capsys.readouterr().out
    head, _, *rows = table_of(printed)
    assert head == ["timm's class", "names", "accepted", "refused", "to start with"]
    vit, eva = rows
    assert vit[:3] == ["`VisionTransformer`", "3", "2"]
    assert vit[3] == "1: its patches are embedded by a HybridEmbed, not by one convolution"
    assert vit[4] == "`vit_tiny_patch16_224.augreg_in21k_ft_in1k`"
    assert eva == ["`Eva`", "1", "1", "", "`eva02_tiny_patch14_336.mim_in22k_ft_in1k`"]
    assert "3 of 4 names with a classifier" in printed
    assert "; 1 more have none." in printed


@pytest.mark.usefixtures("few_names")
def test_names_are_printed_one_by_one(capsys):
    main(["--names"])
    printed = capsys.readouterr().out.splitlines()
    assert "vit_tiny_patch16_224.augreg_in21k  accepted" in printed
    assert (
        "vit_tiny_r_s16_p8_224.augreg_in21k  its patches are embedded by a HybridEmbed, not by one convolution"
        in printed
    )
    assert not [line for line in printed if "dinov2" in line]


def test_filters_take_what_timm_has(capsys):
    main(["--family", "deit", "--model", "deit_tiny_*", "deit3_small_patch16_224.fb_in1k", "--names"])
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.endswith("  accepted")}
    assert {"deit_tiny_patch16_224.fb_in1k", "deit3_small_patch16_224.fb_in1k"} <= names
    assert not [name for name in names if name.startswith(("deit_base", "deit3_base", "deit3_small_patch16_384"))]


def test_every_module_is_one_of_timms():
    assert set(model_support.MODULES) <= set(timm.list_modules())


@pytest.mark.usefixtures("few_names")
def test_the_table_of_a_page_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{BEGIN}\n| old |\n{END}\n\nAfter, | as | it | was\n")
    main(["--write", str(page)])
    once = page.read_text()
    before, table, after = once.replace(END, BEGIN).split(BEGIN)
    assert (before, after) == ("# Before\n\n", "\n\nAfter, | as | it | was\n")
    assert "old" not in table
    assert "| `Eva` | 1 | 1 |" in table
    main(["--write", str(page)])
    assert page.read_text() == once


@pytest.mark.parametrize("page", ["none", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_a_page_without_a_place_for_the_table_is_left_alone(tmp_path, page):
    with pytest.raises(UserError, match="no place for the table"):
        with_table(page, "", tmp_path)


def test_the_page_of_models_has_a_place_and_the_table_of_the_command():
    text = (ROOT / "docs" / "models.md").read_text()
    assert with_table(text, "", ROOT).count(BEGIN) == 1
    assert "| timm's class | names | accepted | refused | to start with |" in text


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--family", "resnet"], "invalid choice: 'resnet'"),
        (["--model", "vit_nobody"], "timm has no pretrained model of that name"),
        (["--write", "nowhere.md"], "there is no such file"),
        (["--write", "README.md"], "there is no place for the table"),
        (["--write", "docs/models.md", "--family", "eva"], "leave --family and --model out"),
        (["--write", "docs/models.md", "--model", "eva*"], "leave --family and --model out"),
        (["--chek"], "unrecognized arguments"),
    ],
)
def test_wrong_flags_are_refused_before_any_model_is_made(flags, why, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(model_support, "architecture", None)
    with pytest.raises(UserError, match=why):
        main(flags)


def test_as_a_program_a_wrong_flag_is_one_line_and_code_2():
    result = run_script("scripts/model_support.py", "--model", "vit_nobody")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert result.stderr.startswith("error: ")


def test_two_small_models_hold_what_is_promised(capsys):
    main(["--check", "--model", "deit_tiny_patch16_224.*", "vit_relpos_medium_patch16_cls_224.*"])
    printed = capsys.readouterr().out
    assert "2 kinds of models, 0 failures" in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith(("deit_tiny", "vit_relpos"))]
    assert [row[:2] for row in rows] == [["deit_tiny_patch16_224", "1"], ["vit_relpos_medium_patch16_cls_224", "1"]]
    assert all(float(error) < 1e-3 for error in rows[0][2:4])


def test_a_model_that_does_not_compute_what_timm_computes_fails_with_code_1(capsys, monkeypatch):
    """Here its blocks' attention has another scale; a check that is no number fails as well."""

    class Wrong(SparseViT):
        def __init__(self, vit: nn.Module) -> None:
            super().__init__(vit)
            self.blocks[0].scale *= 1.1

    monkeypatch.setattr(model_checks, "SparseViT", Wrong)
    monkeypatch.setitem(CHECKS, "permuted", lambda case: 1 / 0)
    with pytest.raises(SystemExit) as end:
        main(["--check", "--model", "deit_tiny_patch16_224.*"])
    assert end.value.code == 1
    printed = capsys.readouterr().out
    for name in ("logits", "gradients", "packed", "sparse"):
        assert f"deit_tiny_patch16_224: {name}: " in printed
    assert "permuted: inf ZeroDivisionError" in printed


def test_kinds_are_told_apart_by_options_and_not_by_sizes():
    plain = kind(tiny_vit())
    assert plain == kind(tiny_vit(depth=3, embed_dim=64, img_size=64))
    for options in ({"qk_norm": True}, {"global_pool": "avg"}, {"no_embed_class": True}, {"reg_tokens": 1}):
        assert kind(tiny_vit(**options)) != plain


def test_kept_tokens_of_timm_do_not_see_the_others():
    """The reference of the sparse check gives other logits than the whole image, and notices other positions."""
    vit = with_random_weights(tiny_vit())
    found = dict(checked(vit))
    assert found["sparse"].held
    case = model_checks.Case(vit)
    case.sparse.pos_embed = nn.Parameter(case.sparse.pos_embed.flip(1))
    with torch.no_grad():
        assert not model_checks.sparse(case).held


@pytest.mark.parametrize(
    "name", ["swin_s3_tiny_224", "swinv2_tiny_window8_256", "cait_xxs24_224", "vit_pwee_patch16_reg1_gap_256"]
)
def test_small_models_have_the_same_grid_whatever_a_patch_is(name):
    assert architecture(name, [f"{name}.x"]).why == ""
    grid = SparseViT(small_model(name)).grid
    assert (grid.rows, grid.cols) == model_checks.GRID
    assert grid.height == (32 if name.startswith("swin") else 16)


def test_a_model_that_timm_does_not_make_small_is_a_failure(capsys, monkeypatch):
    monkeypatch.setattr(model_checks, "SMALL", {"no_such_argument": 1})
    with pytest.raises(UserError, match="cannot be made small"):
        small_model("deit_tiny_patch16_224")
    with pytest.raises(SystemExit):
        main(["--check", "--model", "deit_tiny_patch16_224.*"])
    assert "1 kinds of models, 1 failures" in capsys.readouterr().out


def test_refused_architectures_have_no_model_to_start_with():
    cait = architecture("cait_xxs24_224", ["cait_xxs24_224.fb_dist_in1k"])
    if not cait.why:
        pytest.skip("this family is supported")
    assert table_of(support_table([cait], 0))[2][-1] == ""
