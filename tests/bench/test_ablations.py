"""What was tried: every variant trains, and the pages hold what the rows say."""

from __future__ import annotations

import pytest
import torch

from bench import ablations, rate, stability
from bench.reproduce import read_rows


@pytest.fixture
def data(tmp_path, moving_frames):
    from PIL import Image

    folder = tmp_path / "davis480p" / "clip"
    folder.mkdir(parents=True)
    for number, frame in enumerate(moving_frames):
        Image.fromarray(frame).save(folder / f"{number}.png")
    return tmp_path


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module in (ablations, rate, stability):
        for name, value in (("FRAMES", "0:5"), ("RESIZE", (54, 96)), ("CROP", (48, 96))):
            monkeypatch.setattr(module, name, value)
    for module in (ablations, stability):
        monkeypatch.setattr(module, "SIZE", 60_000)


@pytest.fixture
def trained(monkeypatch):
    """The configurations of what was trained."""
    configs = []
    for module in (ablations, stability):

        def trainer(model, clip, config, trainer=module.Trainer, **options):
            configs.append((config, clip))
            return trainer(model, clip, config, **options)

        monkeypatch.setattr(module, "Trainer", trainer)
    return configs


def used(config, clip):
    """Return the settings of a row that was made with these."""
    assert config.quantization is None
    names = ("optimizer", "lr", "weight_decay", "batch_size", "schedule")
    settings = {name: getattr(config, name) for name in names} | {"encoder_input": clip.encoder_input}
    return settings | {"quantization_share": 0.0, "rate_weight": 0.0}


@pytest.mark.parametrize("module", [ablations, rate, stability])
def test_names_may_follow_the_options(module, tmp_path, capsys):
    with pytest.raises(SystemExit):
        module.main(["run", "--data", str(tmp_path), "--seeds", "2", "--clips", "x", "--results", "y", "nonsense"])
    assert "unknown" in (said := capsys.readouterr().err)
    assert said.strip().endswith("nonsense")


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_every_variant_trains(name, data, trained):
    row = ablations.run(name, "clip", 1, data, epochs=2)
    assert row["settings"] == used(*trained[0])
    assert 5 < row["psnr_db"] < 60
    assert row["parameters"] > 20_000
    torch.manual_seed(1)
    assert ablations.run(name, "clip", 1, data, epochs=2)["psnr_db"] == row["psnr_db"]


def test_a_stability_run(data, trained):
    row = stability.run("dual stream, best", "clip", 1, data, epochs=2)
    assert row["settings"] == used(*trained[0])
    assert len(row["contrast_frame"]) == len(row["contrast_layers"]) == 3
    # Embedding, stem, which has the first block in it, blocks, head.
    assert {len(layers) for layers in row["contrast_layers"]} == {1 + 1 + 2 + 1}
    assert all(value > 0 for layers in row["contrast_layers"] for value in layers)


@pytest.mark.parametrize("name", rate.VARIANTS)
def test_every_way_to_quantise_makes_a_file(name, data):
    row = rate.run(name, "clip", "60k", 1, data, epochs=4)
    assert row["bits_per_pixel"] == 8 * row["bytes"] / (5 * 48 * 96)
    assert 5 < row["psnr_db"] < 60
    assert 1 < row["bits_per_value"] < 9
    assert row["config"].items() >= rate.VARIANTS[name].changes.items()
    assert len(row["epochs_psnr_db"]) == 4


def test_what_is_done_afterwards_shares_a_training(data, monkeypatch):
    trained = []
    run = rate.Trainer.run
    monkeypatch.setattr(rate.Trainer, "run", lambda self, *args: (trained.append(self), run(self, *args))[1])
    rows = [rate.run(name, "clip", "60k", 1, data, epochs=3) for name in ("bits-8", "bits-4", "steps-0.4")]
    assert len({row["training_seconds"] for row in rows}) == 1
    assert rows[0]["bytes"] > rows[2]["bytes"] > 0
    assert len(trained) == 1
    rate.run("qat", "clip", "60k", 1, data, epochs=3)
    assert len(trained) == 2


def test_stalled_epochs():
    assert stability.stalled_epochs({"contrast_frame": [0.01, 0.3, 0.05, 0.2]}) == 2
    assert stability.stalled_epochs({"contrast_frame": [0.5, 0.5]}) == 0


@pytest.mark.parametrize("module", [ablations, rate, stability])
def test_the_page_is_what_the_rows_say(module):
    document = module.DOCUMENT.read_text()
    assert module.filled(document, read_rows(module.PATH)) == document
