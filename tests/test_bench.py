"""`faultline bench engine`: every contender on the same images, as ratios to the step, with memory and error beside."""

import pytest
import tiny


def bench(*more):
    return tiny.call("bench", "engine", "--batch-size", 4, "--rounds", 2, "--format", "json", *more)


def test_every_contender_has_its_row():
    ended = bench("--models", "resnet20")
    rows = {row["engine"]: row for row in ended.json}
    assert ended.code == 0 and set(rows) == {"step", "step-folded", "fused", "vmap", "loop"}
    assert rows["step"]["ratio_to_step"] == 1 and all(row["images_per_s"] > 0 and row["batch_size"] == 4 and row["device"] == "cpu" for row in rows.values())
    for row in rows.values():
        assert row["ratio_to_step"] == pytest.approx(rows["step"]["images_per_s"] / row["images_per_s"])
    assert all(rows[engine]["relative_error"] < 1e-4 for engine in ("fused", "vmap")) and rows["step"]["relative_error"] is None


def test_the_step_is_always_there_and_a_network_without_a_fused_engine_says_why():
    ended = bench("--models", "tiny:twice", "--engines", "fused,vmap")
    assert [row["engine"] for row in ended.json] == ["step", "vmap"] and "tiny:twice: no fused engine (" in ended.err


@pytest.mark.parametrize(
    "words, message",
    [
        (("--models", "resnet5"), "there is no 'resnet5'"),
        (("--models", "resnet20", "--engines", "fast"), "--engines: 'fast' is not one of step"),
        (("--models", "resnet20", "--precision", "fp8"), "--precision: 'fp8'"),
        (("--models", "resnet20", "--precision", "tf32"), "tf32 exists on CUDA"),
        (("--models", "resnet20", "--rounds", "0"), "--rounds: 0 is less than 1"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is(words, message):
    assert message in bench(*words).refused()
