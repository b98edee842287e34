"""Training: it learns, it repeats itself, it resumes exactly, it stops when told."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
import torch

from hflfnerv.errors import CheckpointError, TrainingDiverged, TrainingInterrupted
from hflfnerv.models import MODELS, build_model
from hflfnerv.train import TrainConfig, Trainer, prepare_clip

CONFIG = TrainConfig(epochs=4, lr=2e-3, batch_size=2, seed=3)
MUON = TrainConfig(epochs=4, lr=0.02, batch_size=2, seed=3, optimizer="muon")


@pytest.fixture(params=MODELS)
def model_name(request):
    return request.param


def make_trainer(model_name, frames, config=CONFIG, **options):
    torch.manual_seed(0)
    network = MODELS[model_name]
    clip = prepare_clip(torch.from_numpy(frames), network.encoder_input, crop=None, removed=0.8)
    model = build_model(network.plan(60_000, *frames.shape[:3]))
    return Trainer(model, clip, config, device=torch.device("cpu"), **options)


def state_of(trainer):
    tensors = dict(trainer.model.state_dict())
    for number, optimizer in enumerate(trainer.optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors.update({f"{number}.{index}.{key}": value for key, value in state.items()})
    return tensors


def assert_same_state(a, b):
    a, b = state_of(a), state_of(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class StopAfter:
    """Sends the process a signal after so many steps, as Ctrl-C would."""

    def __init__(self, steps, number=signal.SIGINT):
        self.left, self.number = steps, number

    def __call__(self, trainer):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("optimizer", "lr"), [("adam", 5e-3), ("muon", 0.02)])
def test_learns(model_name, moving_frames, optimizer, lr):
    trainer = make_trainer(model_name, moving_frames, TrainConfig(30, lr, 1, 0, optimizer=optimizer))
    trainer.run()
    assert len(trainer.history) == 30
    assert trainer.history[-1].psnr_db > trainer.history[0].psnr_db + 3


@pytest.mark.parametrize("config", [CONFIG, MUON], ids=["adam", "muon"])
def test_repeats_itself(model_name, moving_frames, config):
    first, second = (make_trainer(model_name, moving_frames, config) for _ in range(2))
    first.run()
    second.run()
    assert_same_state(first, second)


@pytest.mark.parametrize(
    ("config", "steps"),
    [(CONFIG, 1), (CONFIG, 3), (CONFIG, 7), (CONFIG, 11), (MUON, 1), (MUON, 7)],
    ids=lambda value: getattr(value, "optimizer", value),
)
def test_resume_is_bit_identical(model_name, moving_frames, tmp_path, config, steps):
    whole = make_trainer(model_name, moving_frames, config)
    whole.run()
    broken = make_trainer(model_name, moving_frames, config, workdir=tmp_path)
    with pytest.raises(TrainingInterrupted, match=r"saved in .*checkpoint\.safetensors"):
        broken.run(StopAfter(steps))
    resumed = make_trainer(model_name, moving_frames, config, workdir=tmp_path)
    assert resumed.step == steps
    torch.manual_seed(99)  # the random state comes from the checkpoint, not from the process
    resumed.run()
    assert_same_state(whole, resumed)
    assert [(r.epoch, r.psnr_db, r.lr) for r in resumed.history] == [(r.epoch, r.psnr_db, r.lr) for r in whole.history]


def test_a_finished_run_does_nothing_more(moving_frames, tmp_path):
    first = make_trainer("hflf", moving_frames, workdir=tmp_path)
    first.run()
    second = make_trainer("hflf", moving_frames, workdir=tmp_path)
    steps = []
    second.run(lambda trainer: steps.append(trainer.step))
    assert not steps
    assert_same_state(first, second)


def test_muon_has_the_hidden_weights_and_adam_all_others(model_name, moving_frames):
    trainer = make_trainer(model_name, moving_frames, MUON)
    muon, adam = ([p for g in o.param_groups for p in g["params"]] for o in trainer.optimizers)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    assert len(muon) + len(adam) == len(names)
    hidden = {names[id(p)] for p in muon}
    assert {names[id(p)] for p in adam} == set(names.values()) - hidden
    blocks = {name for name in names.values() if ".blocks." in name and name.endswith("conv.weight")}
    assert blocks
    assert blocks <= hidden
    assert not any(part in name for name in hidden for part in ("stem", "head", "bias", "norm", "gamma", ".dwconv."))
    assert [g["lr"].item() for o in trainer.optimizers for g in o.param_groups[:1]] == pytest.approx([0.02, 0.002])


def test_muon_decays_what_is_coded(moving_frames):
    trainer = make_trainer("hnerv", moving_frames, dataclasses.replace(MUON, weight_decay=0.25))
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decays = {names[id(p)]: g["weight_decay"] for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert decays == {name: 0.0 if name.startswith("encoder.") else 0.25 for name in decays}
    assert set(decays.values()) == {0.0, 0.25}
    assert [g["lr"].item() for g in trainer.optimizers[0].param_groups] == pytest.approx([0.02, 0.02])


def test_sigterm_stops_too_and_handlers_come_back(moving_frames, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingInterrupted):
        make_trainer("hflf", moving_frames, workdir=tmp_path).run(StopAfter(2, signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "checkpoint.safetensors").is_file()
    assert not [path for path in tmp_path.iterdir() if ".part" in path.name]


def test_checkpoint_of_another_run_is_refused(moving_frames, tmp_path):
    make_trainer("hflf", moving_frames, workdir=tmp_path).run()
    with pytest.raises(CheckpointError, match=r"train\.epochs is 4 there and 5 here"):
        make_trainer("hflf", moving_frames, TrainConfig(5, 2e-3, 2, 3), workdir=tmp_path)
    with pytest.raises(CheckpointError, match=r"train\.optimizer is adam there and muon here"):
        make_trainer("hflf", moving_frames, MUON, workdir=tmp_path)
    with pytest.raises(CheckpointError, match="model"):
        make_trainer("hnerv", moving_frames, workdir=tmp_path)
    with pytest.raises(CheckpointError, match="clip"):
        make_trainer("hflf", 255 - moving_frames, workdir=tmp_path)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 100])
def test_damaged_checkpoint_is_refused(moving_frames, tmp_path, damage):
    make_trainer("hflf", moving_frames, workdir=tmp_path).run()
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="damaged"):
        make_trainer("hflf", moving_frames, workdir=tmp_path)


def test_divergence_is_an_error(moving_frames):
    trainer = make_trainer("hflf", moving_frames)
    with torch.no_grad():
        trainer.model.hfd.head.weight.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match=r"epoch 1.*--lr"):
        trainer.run()


def test_batch_size_is_at_most_the_clip(moving_frames):
    trainer = make_trainer("hflf", moving_frames[:1], TrainConfig(2, 1e-3, 8, 0))
    trainer.run()
    assert trainer.step == 2


def test_training_leaves_the_global_random_state_alone(moving_frames):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trainer = make_trainer("hflf", moving_frames)
    torch.set_rng_state(before)
    trainer.run()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_learns(moving_frames, precision):
    trainer = make_trainer("hflf", moving_frames, TrainConfig(20, 5e-3, 1, 0, precision))
    trainer.run()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert trainer.history[-1].psnr_db > trainer.history[0].psnr_db + 2


@pytest.mark.parametrize("size", [(8, 6), (5, 7)])  # of whole words, and not
@pytest.mark.parametrize("encoder_input", ["frame", "highpass"])
def test_what_is_selected_of_a_clip(size, encoder_input):
    frames = torch.randint(0, 256, (5, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clip, index = prepare_clip(frames, encoder_input, crop=None, removed=0.8), torch.tensor([3, 0, 3])
    whole, images = frames[index], frames[index].permute(0, 3, 1, 2).float() / 255
    assert torch.equal(clip.select(index), whole)
    assert torch.equal(clip.targets(index), images)
    assert clip.targets(index).dtype == torch.float32
    assert clip.targets(index).is_contiguous(memory_format=torch.channels_last)
    expected = images if clip.highpass is None else clip.highpass[index].permute(0, 3, 1, 2).float()
    assert torch.equal(clip.inputs(index), expected)
    assert torch.equal(clip.inputs(index, clip.select(index)), expected)


def test_highpass_is_of_the_whole_frame(moving_frames):
    from hflfnerv.ops import highpass

    frames = torch.from_numpy(moving_frames)
    clip = prepare_clip(frames, "highpass", crop=(20, 30), removed=0.8)
    whole = highpass(frames.permute(0, 3, 1, 2).float() / 255, 0.8)[:, :, 14:34, 17:47]
    torch.testing.assert_close(clip.inputs(torch.arange(6)), whole, atol=2**-11, rtol=2**-11)
    assert torch.equal(clip.frames, frames[:, 14:34, 17:47])
