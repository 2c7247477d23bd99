"""What images are worth: every figure, the judges that some of them ask, and the script."""

import json
from dataclasses import replace

import pytest
import torch

from inversion import InversionConfig, invert
from inversion.inits import pink, white
from models import SparseImages, load_model
from scripts.studies import image_quality, train_judges, what_teaches
from scripts.studies.image_quality import FIGURES, Bench, Images, noise_sample, real_sample, ridge
from scripts.studies.train_judges import JudgeConfig, Training, real_images
from tests.conftest import ROOT
from utils.config import DataConfig
from utils.errors import UserError

MODEL = load_model("deit_nano_4_digits")
LETTERS = f"local-dir:{ROOT / 'models/weights/deit_nano_4_letters'}"
JUDGE = ["--judge_epochs", "3", "--judge_images", "400", "--val_limit", "60"]
TRAINED = JudgeConfig(epochs=3, images=400)
DATA = DataConfig(val_limit=60)
COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two pools, `smi` and `dense`, of the bundled model, and with `judges`."""
    root = tmp_path_factory.mktemp("quality")
    schedule = {"smi": {"prune_it": (5, 10), "prune_ratio": (0.3, 0.3)}, "dense": {}}
    for name, settings in schedule.items():
        config = InversionConfig(iterations=20, batch_size=12, strategy=name, init="pink", flip=False, **settings)
        invert(MODEL, config, count=COUNT, datapool=root / "made").path.rename(root / name)
    (root / "judges").mkdir()
    return root


@pytest.fixture(scope="module")
def bench(folder):
    return Bench(MODEL, DATA, train_judges.judges(MODEL, DATA, TRAINED, folder / "judges"))


def images_of(sparse: SparseImages, seed: int = 0) -> Images:
    return Images("some", sparse, MODEL, seed)


@pytest.mark.parametrize(
    "name", [name for name, figure in FIGURES.items() if name not in ("slope", "spread") and not figure.student]
)
def test_real_images_are_better_than_noise(bench, name):
    real, noise = (
        FIGURES[name].measure(bench, images_of(sparse))
        for sparse in (real_sample(bench, 48, 0), noise_sample(MODEL, 48, 0))
    )
    if FIGURES[name].best == "high":
        assert real > noise + (1 if name == "inception" else 5)  # in classes, not in per cent
    elif name != "roughness":  # strokes are rough
        assert real < noise


def test_recognized_is_the_share_of_labels_that_the_judge_names(bench):
    images = images_of(real_sample(bench, 20, 3))
    logits = bench.judges["cnn"].net(train_judges.standardized(images.seen))
    assert FIGURES["recognized_cnn"].measure(bench, images) == pytest.approx(
        100 * (logits.argmax(1) == images.labels).float().mean().item()
    )
    wrong = images_of(replace(images.sparse, labels=(logits.argmax(1) + 1) % 10))
    assert FIGURES["recognized_cnn"].measure(bench, wrong) == 0


def test_real_images_are_none_of_the_reference_and_each_seed_has_its_own(bench):
    reference = set(bench.order[: bench.references].tolist())
    assert len(reference) == 718
    first, second = (real_sample(bench, 30, seed) for seed in (0, 1))
    assert not torch.equal(first.patches, second.patches)
    assert torch.equal(first.patches, real_sample(bench, 30, 0).patches)
    pixels, labels = real_images(MODEL, DATA, "train", only=bench.order[:5].tolist())
    assert torch.equal(bench.judges["cnn"].features(pixels / 255), bench.reference[0][:5])
    assert torch.equal(labels, bench.reference[1][:5])
    with pytest.raises(UserError, match="719 real training images are left"):
        real_sample(bench, 720, 0)


def test_frechet_distance_is_that_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(60, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    theirs = theirs @ torch.randn(5, 5, generator=generator, dtype=torch.float64) + 1
    a, b = torch.cov(ours.T), torch.cov(theirs.T)
    root = torch.linalg.eigvals(a @ b).sqrt().real.sum()
    plain = (ours.mean(0) - theirs.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root
    assert image_quality.frechet_distance(ours, theirs) == pytest.approx(plain.item())
    assert image_quality.frechet_distance(ours, ours) == pytest.approx(0, abs=1e-9)
    assert image_quality.frechet_distance(ours, ours + 2) == pytest.approx(5 * 4)
    few = ours[:3]  # fewer than dimensions
    assert image_quality.frechet_distance(few, few) == pytest.approx(0, abs=1e-6)


def test_spread_is_the_mean_distance_within_classes():
    features = torch.tensor([[0.0, 0], [3, 4], [1, 1], [1, 1], [9, 9]])
    assert image_quality.class_spread(features, torch.tensor([0, 0, 1, 1, 2])) == pytest.approx(2.5)
    assert image_quality.class_spread(features[:2], torch.tensor([0, 1])) != pytest.approx(0, nan_ok=False)


@pytest.mark.parametrize(("init", "expected"), [(pink, -2), (white, 0)])
def test_spectrum_of_known_noise(init, expected):
    pixels = 0.5 + 0.05 * init((64, 3, 32, 32), torch.Generator().manual_seed(0))
    noise = images_of(SparseImages.whole(MODEL.grid, MODEL.preprocessing.normalize(pixels), torch.zeros(64).long()))
    assert FIGURES["slope"].measure(None, noise) == pytest.approx(expected, abs=0.35)
    waves = torch.fft.fftfreq(32, 1 / 32)
    radius = torch.hypot(waves[:, None], waves)
    power = radius.clamp(min=1) ** expected * (radius >= 1)
    above = 100 * power[radius > 8].sum() / power.sum()
    assert FIGURES["high"].measure(None, noise) == pytest.approx(above.item(), abs=4)


def test_brightness_has_no_power():
    grey = torch.full((2, 3, 32, 32), 0.7)
    assert image_quality.power_spectrum(grey)[0].max() < 1e-6


def test_views_are_crops_of_the_image_in_range_and_the_seeds_alone():
    ramp = torch.linspace(0.2, 0.6, 32).expand(400, 3, 32, 32)
    first, again = (image_quality.view(ramp, torch.Generator().manual_seed(5), False) for _ in range(2))
    assert torch.equal(first, again)
    assert first.min() >= 0
    assert first.max() <= 1
    growth = first.diff(dim=3).mean(dim=(1, 2, 3)) / ramp.diff(dim=3).mean()  # of a crop's side, times the contrast
    assert growth.min() > 0.35**0.5 * 0.8 - 0.05
    assert growth.max() < 1.2
    mirrored = image_quality.view(ramp, torch.Generator().manual_seed(5), True).diff(dim=3).mean(dim=(1, 2, 3))
    assert 120 < (mirrored < 0).sum() < 280


def test_agreement_and_sharpness_are_those_of_the_views(bench, monkeypatch):
    images = images_of(real_sample(bench, 16, 0))
    monkeypatch.setattr(image_quality, "view", lambda pixels, generator, flip: pixels)
    same = Bench(MODEL, DATA, bench.judges)
    assert FIGURES["agreement"].measure(same, images) == 100
    confidence = same.probabilities(images.pixels).max(1).values.mean()
    assert FIGURES["sharpness"].measure(same, images) == pytest.approx(100 * confidence.item(), rel=1e-5)


def test_roughness_is_the_mean_step():
    steps = torch.zeros(1, 3, 32, 32)
    steps[..., ::2] = 1
    images = images_of(SparseImages.whole(MODEL.grid, MODEL.preprocessing.normalize(steps), torch.zeros(1).long()))
    assert FIGURES["roughness"].measure(None, images) == pytest.approx(50)


def test_stopped_patches_are_filled_before_anything_is_measured():
    whole = noise_sample(MODEL, 2, 0)
    kept = SparseImages(whole.patches[:, :1], whole.positions[:, :1], whole.labels)
    pixels = images_of(kept).pixels
    assert torch.equal(pixels[:, :, :4, :4], pixels[:, :, 28:, 12:16])


def test_ranks_of_equal_values_are_their_mean():
    assert image_quality.spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1)
    assert image_quality.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert image_quality.spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert image_quality.spearman([1, 1, 1], [1, 2, 3]) is None


def test_correlations_are_over_pools_and_turned_to_higher_is_better():
    def line(name: str, roughness: float, frechet: float, slope: float) -> dict:
        return {"images": name, "roughness": roughness, "frechet": frechet, "slope": slope}

    lines = [line("real", 1, 1, -2), line("noise", 9, 90, 0)]
    lines += [line("a", 2, 10, -1.9), line("b", 3, 20, -2.5), line("c", 4, 30, -1)]
    (found,) = image_quality.correlations(lines)
    assert found == pytest.approx({"without": "roughness", "frechet": 1, "slope": 1, "mean": 1})
    assert image_quality.correlations(lines[:4]) == []


def run(folder, output, *flags: str) -> list[dict]:
    pools = [str(folder / "smi"), f"whole={folder / 'dense'}"]
    where = ["--judges", str(folder / "judges"), "--output", str(output)]
    return image_quality.main(["--pools", *pools, "--num_images", str(COUNT), *JUDGE, *where, *flags])


def test_the_script_goes_on_where_it_was(folder, bench, tmp_path, capsys, monkeypatch):
    lines = run(folder, tmp_path)
    assert [line["images"] for line in lines] == ["real", "noise", "smi", "whole"]
    shown, page = capsys.readouterr().out, (tmp_path / "quality.md").read_text()
    assert "epoch" not in shown  # judges were there
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["summary"] == lines
    assert report["judges"].keys() == {"cnn", "vit"}
    assert f"{report['judges']['cnn']['top1']:.2f}" in page
    there = {name for name, figure in FIGURES.items() if not figure.student}
    for name in there:
        assert isinstance(lines[0][name], float)
        assert name in page
    before = (tmp_path / "rows.jsonl").read_text()
    assert len(before.splitlines()) == 4 * len(there)
    with monkeypatch.context() as patch:
        patch.setattr(Bench, "probabilities", None)
        assert run(folder, tmp_path) == lines
    assert (tmp_path / "rows.jsonl").read_text() == before
    both = run(folder, tmp_path, "--seeds", "0", "1")
    assert (tmp_path / "rows.jsonl").read_text().startswith(before)
    assert both[0]["slope_std"] > 0
    assert both[2]["slope_std"] == 0  # the same images


def test_a_head_is_taught(bench):
    real, noise = (
        FIGURES["head"].measure(bench, images_of(sparse))
        for sparse in (real_sample(bench, 60, 0), noise_sample(MODEL, 60, 0))
    )
    assert real > noise
    assert "flip" not in bench.lesson_settings()["augment"]


def test_a_ridge_regression_finds_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    features, tested = torch.randn(200, 5, generator=generator), torch.randn(7, 5, generator=generator)
    weights, offset = torch.randn(5, 3, generator=generator), torch.tensor([1.0, -2.0, 0.5])
    found = ridge(features, features @ weights + offset, tested, 1e-9)
    torch.testing.assert_close(found, (tested @ weights + offset).double(), rtol=1e-4, atol=1e-4)
    flat = ridge(features, features @ weights + offset, tested, 1e9)
    mean = (features @ weights + offset).mean(0).double()
    torch.testing.assert_close(flat, mean.expand(7, 3), rtol=1e-4, atol=1e-4)


def test_a_judge_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    kind, config = train_judges.KINDS["cnn"], JudgeConfig(epochs=2, images=130)
    train, test = (real_images(MODEL, DATA, split, limit=130) for split in ("train", "test"))
    made = {}
    for name in ("whole", "stopped"):
        training = Training("cnn", kind, MODEL, DATA, config, tmp_path / name)
        if name == "stopped":
            epoch, calls = training._epoch, []

            def once(*args, epoch=epoch, calls=calls):
                if calls:
                    raise KeyboardInterrupt
                calls.append(1)
                return epoch(*args)

            monkeypatch.setattr(training, "_epoch", once)
            with pytest.raises(KeyboardInterrupt):
                training.run(train, test)
            training = Training("cnn", kind, MODEL, DATA, config, tmp_path / name)
            assert not training.finished
        training.run(train, test)
        made[name] = Training("cnn", kind, MODEL, DATA, config, tmp_path / name).judge()
    ours, theirs = (judge.net.state_dict() for judge in made.values())
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert made["whole"].top1 == made["stopped"].top1
    file = next((tmp_path / "whole").glob("cnn-*.pt"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="remove it, and the judge is trained again"):
        Training("cnn", kind, MODEL, DATA, config, tmp_path / "whole")


def test_training_images_are_moved_and_mirrored_only_where_asked():
    pixels = torch.arange(32).byte().mul(8).expand(300, 3, 32, 32)
    assert (train_judges.augmented(pixels, False)[:, 0, 0].diff()[:, 8:24] > 0).all()
    mirrored = (
        train_judges.augmented(pixels, True)[:, 0, 0, 20] < train_judges.augmented(pixels, True)[:, 0, 0, 12]
    ).sum()
    assert 90 < mirrored < 210


def test_judges_are_trained_by_their_own_script(tmp_path, capsys):
    flags = ["--judge_epochs", "1", "--judge_images", "130", "--val_limit", "10", "--output", str(tmp_path)]
    rows = train_judges.main(flags)
    assert [row["judge"] for row in rows] == ["cnn", "vit"]
    assert capsys.readouterr().out.count("epoch 1 of 1") == 2
    assert train_judges.main(flags) == rows
    assert "epoch" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--pools", "nowhere"], "not an image pool"),
        (["--pools", "{folder}/smi", "--num_images", "25"], "--num_images 25: the pool .* has 24"),
        (["--pools", "{folder}/smi", "{folder}/smi"], "more than one row; give NAME=DIR"),
        (["--pools", "real={folder}/smi"], "real is the name of more than one row"),
        (["--seeds", "1", "1"], "a seed is given twice"),
        (["--figures", "beauty"], "--figures beauty is none of recognized_cnn, "),
        (["--num_images", "0"], "--num_images"),
        (["--judge_epochs", "0"], "--judge_epochs"),
        (["--pools", "{folder}/smi", "--num_images", "24", "--model", LETTERS], "a pool of another model"),
    ],
)
def test_wrong_inputs_are_refused_before_judges_are_trained(folder, tmp_path, monkeypatch, flags, why):
    monkeypatch.setattr(image_quality, "judges", None)
    flags = [flag.format(folder=folder) for flag in flags]
    with pytest.raises(UserError, match=why):
        image_quality.main([*flags, "--output", str(tmp_path / "out"), "--judges", str(tmp_path / "judges")])


def test_without_data_there_are_figures_all_the_same(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image_quality, "has_data", lambda model, data: False)
    monkeypatch.setattr(train_judges, "split_of", None)
    lines = run(folder, tmp_path)
    assert [line["images"] for line in lines] == ["noise", "smi", "whole"]
    wanted = {name for name, figure in FIGURES.items() if not figure.real and not figure.student}
    assert {name for name in FIGURES if name in lines[0]} == wanted


def test_only_the_judges_that_are_asked_for_are_trained(folder, tmp_path):
    flags = ["--judges", str(tmp_path), "--output", str(tmp_path), "--num_images", "8", *JUDGE]
    assert "slope" in image_quality.main(["--figures", "slope", "agreement", *flags])[0]
    assert not list(tmp_path.glob("*.pt"))


def test_half_of_the_images_teaches_what_the_teacher_says_of_the_other(bench):
    """Of real images much, of answers that go with nothing at all no more than the most frequent class."""
    images = images_of(real_sample(bench, 60, 0))
    right = FIGURES["learnable"].measure(bench, images)
    lessons = bench.lessons(images)
    assert bench.lessons(images_of(images.sparse)) is lessons
    assert lessons.features.shape[0] == lessons.logits.shape[0] == 4 * 60
    shuffled = lessons.logits[torch.randperm(240, generator=torch.Generator().manual_seed(0))]
    lessons.__dict__["logits"] = shuffled
    assert right > FIGURES["learnable"].measure(bench, images) + 30


def test_the_inception_score_of_known_answers(bench):
    images = images_of(real_sample(bench, 20, 1))
    lessons, sure = bench.lessons(images), 1000 * torch.eye(10)
    for logits, score in ((sure, 10), (sure[:5], 5), (sure[:1], 1), (torch.zeros(4, 10), 1)):
        lessons.__dict__["logits"] = logits
        assert FIGURES["inception"].measure(bench, images) == pytest.approx(score)


def teach(output, *flags: str) -> list[dict]:
    where = ["--output", str(output), "--datapool", str(output / "pools")]
    return what_teaches.main(
        ["--seconds", "0.1", "--batch", "8", "--val_limit", "60", "--num_images", "16", *where, *flags]
    )


def test_what_teaches_makes_its_rows_once(tmp_path, capsys, monkeypatch):
    rows = ["--row", "dense", "--iterations 4", "--row", "sparse", "--iterations 4 --prune_it 2 --prune_ratio 0.5"]
    lines = teach(tmp_path, *rows, "--only", "pri")
    assert [line["images"] for line in lines] == ["real", "noise", "pri", "dense", "sparse"]
    assert [line["count"] for line in lines] == [16, 16, 8, 8, 8]
    assert "rank correlation with head" in capsys.readouterr().out
    page = (tmp_path / "table.md").read_text()
    assert "| sparse" in page and "inception" in page
    with monkeypatch.context() as patch:
        patch.setattr(image_quality, "ridge", None)
        assert teach(tmp_path, *rows, "--only", "pri") == lines


def test_a_row_may_look_with_the_backbone_and_join_what_a_trajectory_is(tmp_path):
    rows = ["--row", "looked at", "--iterations 4 --prior natural", "--row", "joined", "--strategy pri --join"]
    lines = teach(tmp_path, *rows)
    assert [(line["images"], line["count"]) for line in lines[2:]] == [("looked at", 8), ("joined", 2)]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--row", "some", "--adv 1"], "--row some: --adv is about a student that learns"),
        (["--row", "some", "--strategy dense --join"], "--row some: --join puts the images of pri"),
        (["--row", "real", "--iterations 4"], "always there"),
        (["--row", "some", "--iterations none"], "--iterations"),
        (["--row", "some", "--init 'pink"], "No closing quotation"),
        (["--model", LETTERS, "--row", "some", "--iterations 4"], "give --dataset"),
    ],
)
def test_what_teaches_refuses(tmp_path, flags, said, capsys):
    with pytest.raises((UserError, SystemExit)) as raised:
        teach(tmp_path, *flags)
    assert said in f"{raised.value}{capsys.readouterr().err}"
    assert not (tmp_path / "pools").exists()
