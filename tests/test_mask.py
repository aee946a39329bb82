"""`faultline mask`: rows held to pictures masked by hand and maps of images decoded by hand; a case study; boxes; what is refused."""

import io
import tarfile

import intervention_oracles as naive
import numpy as np
import oracles
import pytest
import shards
import test_boxes
import tiny
import torch
from PIL import Image
from test_interventions_jobs import images, profiles, rows_of, standardised, summary_of, wrong

from jobs.masked import found as sentence
from pipeline.explanation.input_saliency import InputSaliency
from pipeline.intervals import paired_shares, share_mean
from pipeline.interventions import masking
from pipeline.statistics import Reference

ASK = ("--percent", "5,20", "-k", 3, "--hosts", 2)


@pytest.fixture(scope="module")
def level(tmp_path_factory):
    """A run whose network is right about half of the images of every class."""
    folder = tmp_path_factory.mktemp("mask")
    network, small = tiny.Level().eval(), tiny.Small(folder / "run", folder / "sources")
    decoded = np.stack([np.asarray(Image.open(io.BytesIO(shards.photo(i)))) for i in range(48)])
    predictions = network(((torch.from_numpy(decoded.astype(np.float32)) / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)).argmax(1).tolist()
    for i in range(2):
        shards.write_shard(small.sources / f"val/{i}.tar", [(p + n % 2) % 5 for n, p in enumerate(predictions[24 * i : 24 * i + 24])], first=24 * i)
    ended = small.extract("val", model="tiny:level")
    assert ended.code == 0, ended.err
    return small


@pytest.fixture(scope="module")
def done(level):
    small = level
    ended = tiny.call("mask", "--run", small.run, *ASK, "--format", "json")
    assert ended.code == 0, ended.err
    return small, ended


def pixels_of(small, dataset="val"):
    """ID -> uint8 [H, W, 3]."""
    found = {}
    for path in (small.sources / dataset).glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {m.name[:-4]: np.asarray(Image.open(io.BytesIO(tar.extractfile(m).read())).convert("RGB")) for m in tar if m.name.endswith(".jpg")}
    return found


def heats_of(run, images, profiles, ids, k):
    """ID -> heat [H, W] float64 of its k most salient filters."""
    network, vectors = tiny.Level().double().eval(), standardised(run)
    mean, std = oracles.mean_and_std(np.array([row["saliency"] for row in profiles.values()]))
    engine = InputSaliency(network, Reference(mean, std, len(profiles), "abs", "test"))
    ask = [np.argsort(-vectors[i], kind="stable")[:k] for i in ids]
    return {i: engine(images[i][None], torch.tensor([profiles[i]["label"]]), [columns]).maps[0].amax(0).numpy() for i, columns in zip(ids, ask)}


def test_rows_are_those_of_pictures_masked_by_hand(done):
    """Every error, every strategy and share; and the salient region in two images of the class that the network is right about."""
    small, ended = done
    facts, network, pixels = profiles(small.run, "val"), tiny.Level().double().eval(), pixels_of(small)
    rows, errors = rows_of(small.run / "experiments/mask"), wrong(facts)
    assert {r["sample_id"] for r in rows} == set(errors) and {r["share"] for r in rows} == {0.05, 0.2}
    heats = heats_of(small.run, images(small, "val"), facts, errors, 3)
    probabilities = lambda one: naive.softmax(naive.alone(network, (torch.from_numpy(one.astype(np.float64)) / 255 - 0.5).permute(2, 0, 1) / 0.25))  # noqa: E731
    seen = set()
    for row in rows:
        i, strategy = row["sample_id"], row["strategy"]
        label, prediction = facts[i]["label"], facts[i]["prediction"]
        if strategy.startswith("transplant"):
            right = [j for j in facts if facts[j]["label"] == facts[j]["prediction"] == label]
            assert row["hosts"] == min(2, len(right)) and row["share"] == 0.05
            if row["hosts"] == len(right):  # which were taken is then known
                mask = masking.mask("random" if strategy.endswith("random") else "salient", heats[i], 0.05, 0, i)
                changes = [probabilities(np.where(mask[..., None], pixels[i], pixels[j])) - probabilities(pixels[j]) for j in right]
                assert row["wrong_confidence_change"] == pytest.approx(np.mean([c[prediction] for c in changes]), abs=2e-5)
        else:
            mask = masking.mask(strategy, heats[i], row["share"], 0, i)
            change = probabilities(np.where(mask[..., None], masking.filling(pixels[i], "mean", 0, i), pixels[i])) - probabilities(pixels[i])
            assert (row["wrong_confidence_change"], row["true_confidence_change"]) == pytest.approx((change[prediction], change[label]), abs=2e-5)
        seen.add(strategy)
    assert seen == {*masking.STRATEGIES, "transplant", "transplant_random"}
    summary = ended.json
    own = [r for r in rows if r["strategy"] == "salient" and r["share"] == 0.05]
    assert summary["samples"] == len(errors) and summary["corrected_salient"] == pytest.approx(np.mean([r["corrected"] for r in own]))
    pasted = [r for r in rows if r["strategy"] == "transplant"]
    assert summary["transplant_pairs"] == sum(r["hosts"] for r in pasted) and summary["transplant_rises"] == pytest.approx(np.mean([r["rises"] for r in pasted]))
    drawn = {r["sample_id"]: r["rises"] for r in rows if r["strategy"] == "transplant_random"}
    shares, others = (np.array(values) for values in zip(*((r["rises"], drawn[r["sample_id"]]) for r in sorted(pasted, key=lambda r: r["sample_id"]))))
    told = summary_of(small.run, "mask")["transplant"]
    for name, interval in (("rises", share_mean(shares)), ("rises_random", share_mean(others)), ("rises_minus_random", paired_shares(shares, others))):
        assert [told[name][key] for key in ("estimate", "low", "high")] == pytest.approx([interval.estimate, interval.low, interval.high]), "shares have intervals of shares"


def test_what_is_said_and_drawn(done):
    small, ended = done
    said = ended.err.splitlines()[-1]
    assert said.startswith("masking the 5% most salient pixels corrects ") and "pasted into" in said and "boxes" not in said
    figures = sorted(p.name for p in (small.run / "experiments/mask").iterdir() if p.suffix in (".png", ".svg"))
    assert figures == [f"{name}.{end}" for name in ("corrected", "true_confidence", "wrong_confidence") for end in ("png", "svg")]
    again = tiny.call("mask", "--run", small.run, *ASK, "--format", "json")
    assert again.code == 0 and again.json == ended.json and "forwards" not in again.err, "it is free"
    assert "hosts 2, not 10" in tiny.call("mask", "--run", small.run, "--percent", "5,20", "-k", 3).refused()


def test_boxes_of_some_images(copied, tmp_path):
    """Pixels outside the box alone are masked, of those samples that have one that can be read; paired tests."""
    facts = profiles(copied.run, "val")
    errors = wrong(facts)
    for i in errors[:12]:
        (tmp_path / f"{i}.xml").write_text(test_boxes.xml([("anything", 0, 0, 6, 10)], 12, 10))
    (tmp_path / f"{errors[12]}.xml").write_text("<broken")
    (tmp_path / f"{errors[13]}.xml").write_text(test_boxes.BOMB + test_boxes.xml([("anything", 0, 0, 6, 10)], 12, 10))
    (tmp_path / f"{errors[14]}.xml").write_text(test_boxes.xml([("anything", 0, 0, 24, 30)], 24, 30))
    ended = tiny.call("mask", "--run", copied.run, "--percent", "10", "--hosts", 0, "--boxes", tmp_path, "--format", "json")
    assert ended.code == 0, ended.err
    rows = rows_of(copied.run / "experiments/mask")
    assert {r["sample_id"] for r in rows if r["strategy"].endswith("_outside")} == set(errors[:12])
    box, found = summary_of(copied.run, "mask")["outside_box"], ended.json
    change = {s: np.array([r["wrong_confidence_change"] for r in rows if r["strategy"] == s]) for s in ("salient_outside", "random_outside")}
    assert box["samples"] == 12 and box["wrong"]["estimate"] == pytest.approx(np.mean(change["salient_outside"] - change["random_outside"]))
    from scipy.stats import ttest_rel, wilcoxon

    assert box["wrong_p_t"] == pytest.approx(ttest_rel(*change.values()).pvalue) and box["wrong_p_wilcoxon"] == pytest.approx(wilcoxon(*change.values()).pvalue)
    none = len(errors) - 15
    unused = {"there is no annotation of it": none, "its annotation is no XML": 1, "its annotation has a DTD, which is not read": 1, "its boxes cover all that the network sees": 1}
    assert summary_of(copied.run, "mask")["boxes"] == {"used": 12, "unused": unused} and next(iter(unused)) == next(iter(summary_of(copied.run, "mask")["boxes"]["unused"])) and found["outside_box_unused"] == none + 3
    assert {r["unboxed"] for r in rows if r["sample_id"] in errors[:12]} == {None} and {r["unboxed"] for r in rows if r["sample_id"] == errors[14]} == {"its boxes cover all that the network sees"}
    assert f"--boxes: 12 of {len(errors)} samples have an annotation that can be used; the others not: there is no annotation of it ({none}); " in ended.err and "is no XML (1)" in ended.err
    again = tiny.call("mask", "--run", copied.run, "--percent", "10", "--hosts", 0, "--boxes", tmp_path)
    assert again.code == 0 and "the others not: " in again.err and "forwards" not in again.err, "told again, and free"
    (tmp_path / f"{errors[12]}.xml").write_text(test_boxes.xml([("anything", 0, 0, 6, 10)], 12, 10))
    assert "the annotations have changed" in tiny.call("mask", "--run", copied.run, "--percent", "10", "--hosts", 0, "--boxes", tmp_path).refused()
    assert f"outside the object's boxes (12 samples, {none + 3} more have no annotation that can be used)" in ended.err and found["outside_box_samples"] == 12 and not any("transplant" in key for key in found)


@pytest.mark.parametrize(
    "text, says",
    [
        ("<broken", "(30 of 24: its annotation is no XML)"),
        (test_boxes.xml([("anything", 0, 0, 24, 30)], 24, 30), "(30 of 24: its boxes cover all that the network sees)"),
    ],
)
def test_annotations_of_which_none_can_be_used_are_refused(copied, tmp_path, text, says):
    """Before anything is computed, with the most frequent reason."""
    errors = wrong(profiles(copied.run, "val"))
    for i in errors[:30]:
        (tmp_path / f"{i}.xml").write_text(text)
    asked = tiny.call("mask", "--run", copied.run, "--percent", "10", "--hosts", 0, "--boxes", tmp_path).refused()
    assert f"--boxes: no annotation below {tmp_path} can be used for any of these samples" in asked and says.replace("24", str(len(errors))) in asked
    assert not list((copied.run / "experiments").rglob("*.parquet")) and not (copied.run / "experiments/mask/settings.json").exists()


def test_boxes_of_an_annotation_of_another_shape(copied, tmp_path):
    """A box is where it lies in the image, whatever size and shape the annotation states: pixels are those of a mask drawn by hand."""
    errors, network, pixels = wrong(profiles(copied.run, "val")), tiny.net().double().eval(), pixels_of(copied)
    for i in errors:
        (tmp_path / f"{i}.xml").write_text(test_boxes.xml([("anything", 0, 0, 6 * 2, 5 * 7)], 12 * 2, 10 * 7))
    assert tiny.call("mask", "--run", copied.run, "--percent", "50", "--hosts", 0, "--boxes", tmp_path).code == 0
    among = np.ones((10, 12), bool)
    among[:5, :6] = False
    for row in [r for r in rows_of(copied.run / "experiments/mask") if r["strategy"] == "random_outside"][:5]:
        i, fact = row["sample_id"], profiles(copied.run, "val")[row["sample_id"]]
        mask = masking.mask("random", np.zeros((10, 12)), 0.5, 0, i, among)
        images_ = [(torch.from_numpy(one.astype(np.float64)) / 255 - 0.5).permute(2, 0, 1) / 0.25 for one in (pixels[i], np.where(mask[..., None], masking.filling(pixels[i], "mean", 0, i), pixels[i]))]
        before, after = (naive.softmax(naive.alone(network, one)) for one in images_)
        assert row["wrong_confidence_change"] == pytest.approx((after - before)[fact["prediction"]], abs=2e-5)


def summary_with(random: tuple, least: tuple, moved: tuple, n: int = 60) -> dict:
    """Of `mask`, with these intervals of the differences."""
    gap = lambda ends: {"estimate": sum(ends) / 2, "low": ends[0], "high": ends[1], "n": n}  # noqa: E731
    curve = {key: [0.2] for key in ("mean", "low", "high")}
    return {
        "samples": n, "shares": [0.05], "curves": {s: {"corrected": curve} for s in masking.STRATEGIES}, "transplant": None, "outside_box": None, "boxes": None,
        "paired": {"salient_minus_random": gap(random), "salient_minus_least": gap(least), "salient_minus_moved": gap(moved)},
    }  # fmt: skip


def test_only_the_papers_own_pairs_are_held_against_the_paper():
    """The control is ours: where it alone is reversed, the paper found nothing that could be."""
    above, below, over = (0.01, 0.05), (-0.05, -0.01), (-0.02, 0.03)
    said = sentence(summary_with(above, above, below), 0)
    assert "reverse" not in said and ", as the paper found against random pixels and the least salient; our own control, the same shape elsewhere, corrects 0.200" in said and said.endswith("the difference is -0.030 (-0.050 to -0.010)")
    assert ", the reverse of what the paper found against random pixels, not clearly apart from the least salient; our own control" in sentence(summary_with(below, over, above), 0)
    assert ", as the paper found against the least salient, not clearly apart from random pixels; " in sentence(summary_with(over, above, above), 0)
    assert "9 are too few to conclude anything from" in sentence(summary_with(above, above, above, 9), 0)


def test_one_image(level, tmp_path):
    """Confidences and the saliency of its filters after every mask, a region of one's own among them, and the picture of it."""
    small, facts = level, profiles(level.run, "val")
    i = next(i for i in wrong(facts) if sum(f["label"] == f["prediction"] == facts[i]["label"] for f in facts.values()) > 2)
    ended = tiny.call("mask", f"val:{i}", "--run", small.run, "--percent", 10, "-k", 3, "--region", "2,3,6,8", "--out", tmp_path / "a.png", "--format", "json")
    assert ended.code == 0, ended.err
    found, network, pixels = ended.json, tiny.Level().double().eval(), pixels_of(small)[i]
    assert [(s["name"], round(s["share"], 3)) for s in found["steps"]] == [("as it is", 0), *((n, 0.1) for n in ("salient", "next", "random", "least")), ("region", round(20 / 120, 3))]
    heat = heats_of(small.run, images(small, "val"), facts, [i], 3)[i]
    own = np.zeros((10, 12), bool)
    own[3:8, 2:6] = True
    mean, std = oracles.mean_and_std(np.array([row["saliency"] for row in facts.values()]))
    chosen = np.argsort(-standardised(small.run)[i], kind="stable")[:3]
    for step in found["steps"]:
        mask = np.zeros_like(own) if step["name"] == "as it is" else own if step["name"] == "region" else masking.mask(step["name"], heat, 0.1, 0, i)
        image = (torch.from_numpy(np.where(mask[..., None], masking.filling(pixels, "mean", 0, i), pixels).astype(np.float64)) / 255 - 0.5).permute(2, 0, 1) / 0.25
        confidence = naive.softmax(naive.alone(network, image))
        assert (step["true_confidence"], step["wrong_confidence"]) == pytest.approx((confidence[facts[i]["label"]], confidence[facts[i]["prediction"]]), abs=2e-5)
        profile = oracles.standardise(oracles.saliency(network, image[None], torch.tensor([facts[i]["label"]]), "abs"), mean, std)[0]
        assert (step["filters_standardised"], step["all_standardised"]) == pytest.approx((profile[chosen].mean(), profile.mean()), abs=1e-3)
    pasted = found["transplant"]
    assert pasted["hosts"] == len(pasted["each"]) > 2 and pasted["rises"] == sum(e["after"] > e["before"] for e in pasted["each"])
    with Image.open(tmp_path / "a.png") as image:
        assert image.size[0] > 1500 and len(image.convert("RGB").getcolors(2**24)) > 200


def test_a_file_without_a_run(level, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small, facts, pixels = level, profiles(level.run, "val"), pixels_of(level)
    i = wrong(facts)[0]
    Image.fromarray(pixels[i]).save("image.png")
    Image.fromarray(np.uint8(255) * (np.indices((10, 12)).sum(0) < 5).astype(np.uint8)).save("region.png")
    words = ("--percent", 10, "-k", 3, "--format", "json")
    one = tiny.call("mask", "image.png", "--label", facts[i]["label"], "--model", "tiny:level", "--statistics", small.run / "statistics/val.parquet", "--region", "region.png", *words)
    assert one.code == 0 and "nothing to paste into: an image of a run is needed" in one.err and len(list(tmp_path.glob("image.png*.masked.png"))) == 1, one.err
    other = tiny.call("mask", i, "--run", small.run, "--out", tmp_path / "b.svg", *words).json
    assert [s["true_confidence"] for s in one.json["steps"][:3]] == pytest.approx([s["true_confidence"] for s in other["steps"][:3]], abs=1e-5)
    assert one.json["transplant"] is None and one.json["steps"][-1]["name"] == "region" and 0.05 < one.json["steps"][-1]["share"] < 0.3


@pytest.mark.parametrize(
    "words, said",
    [
        ((), "--run: say which run, or name an image file"),
        (("--run", "RUN", "--percent", "0,5"), "--percent: '0,5' is no list of numbers above 0 and up to 50"),
        (("--run", "RUN", "--percent", ""), "--percent: '' is no list"),
        (("--run", "RUN", "--fill", "black", "--hosts", "-1", "--boost", "1"), "--fill: 'black' is not one of mean, blur, noise"),
        (("--run", "RUN", "-k", "25"), "-k: 25 is more than the 24 live filters"),
        (("--run", "RUN", "--boxes", "EMPTY"), "--boxes: there is no .xml below"),
        (("--run", "RUN", "--region", "1,1,3,3", "--out", "a.png"), "--region, --out: not for a whole data set; leave them out, or name an image"),
        (("ID", "--run", "RUN", "--boxes", "EMPTY", "--fresh"), "--boxes, --fresh: not for one image; leave them out"),
        (("ID", "--run", "RUN", "--percent", "5,10"), "--percent: '5,10' are several; one image is masked by one of them"),
        (("ID", "--run", "RUN", "--region", "20,20,30,30"), "--region: '20,20,30,30' covers none of the 12 x 10 pixels"),
        (("ID", "--run", "RUN", "--region", "nowhere.png"), "--region: 'nowhere.png' is neither LEFT,TOP,RIGHT,BOTTOM in pixels nor a PNG"),
        (("val:nobody", "--run", "RUN"), "there is no sample 'val:nobody'"),
    ],
)
def test_is_refused(small, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    places = {"RUN": str(small.run), "EMPTY": "empty", "ID": f"val:{wrong(profiles(small.run, 'val'))[0]}"}
    assert said in tiny.call("mask", *(places.get(w, w) for w in words)).refused()
    assert not list(tmp_path.glob("*.png")) and not (small.run / "experiments/mask").exists()
