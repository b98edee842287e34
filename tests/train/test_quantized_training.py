"""Training with quantised weights: it rounds as the file does, steps are worth their bits, and it resumes exactly."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from test_step import READS_BACK, Operations
from test_trainer import StopAfter, assert_same_state, make_trainer

from hflfnerv._log_step import Levels, log_steps
from hflfnerv.codec.quantization import dequantize, quantize, quantize_to_levels
from hflfnerv.errors import CheckpointError, TrainingInterrupted
from hflfnerv.models import MODELS
from hflfnerv.train import EMBEDDINGS, Quantization, QuantizationConfig, StepChooser, TrainConfig, fake_quantize

QUANTIZATION = QuantizationConfig(epochs=2, rate_weight=0.5, weight_bits=8, embedding_bits=6)
CONFIG = TrainConfig(epochs=4, lr=0.02, batch_size=2, seed=3, optimizer="muon", quantization=QUANTIZATION)


@pytest.fixture(params=MODELS)
def model_name(request):
    return request.param


@pytest.fixture(scope="module")
def trained(moving_frames):
    trainer = make_trainer("hflf", moving_frames, dataclasses.replace(CONFIG, epochs=30, quantization=None))
    trainer.run()
    return trainer


def assert_same_run(a, b):
    assert_same_state(a, b)
    assert a.levels == b.levels
    assert [(r.epoch, r.psnr_db, r.lr) for r in a.history] == [(r.epoch, r.psnr_db, r.lr) for r in b.history]


@pytest.mark.parametrize("exponent", [-300, -101, -64, -37, 0, 5])
def test_rounds_as_the_file_does(exponent):
    step = log_steps(np.array(exponent))
    generator = np.random.default_rng(0)
    values = generator.standard_normal((7, 300), dtype=np.float32) * np.float32(300 * step)
    values[0, :200] = step * (np.arange(200, dtype=np.float32) - 100 + np.float32(0.5))  # halfway, or next to it
    values[1, :3] = [0.0, -0.0, step / 4]
    for low, high in ((-2000, 2000), (-31, 32), (-200, -100)):
        ours = fake_quantize(torch.from_numpy(values), torch.from_numpy(step), low, high).numpy()
        assert np.array_equal(ours, dequantize(quantize_to_levels(values, Levels(exponent, low, high))))


def test_the_gradient_is_that_of_the_identity_within_the_range():
    x = torch.tensor([-50.0, -0.88, -0.87, 0.1, 1.12, 1.13, 7.0], requires_grad=True)
    gradient = torch.randn(7)
    fake_quantize(x, torch.tensor(0.25), -3, 4).backward(gradient)
    assert torch.equal(x.grad, gradient * torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]))


def test_levels_take_as_many_bits_as_they_need():
    values = np.linspace(-1, 1, 1001, dtype=np.float32)
    for exponent, bits in ((0, 2), (-16, 3), (-80, 7), (-144, 11)):
        quantized = quantize_to_levels(values, Levels(exponent, -2048, 2047))
        assert (quantized.bits, int(quantized.step.exponent)) == (bits, exponent)
        assert np.abs(dequantize(quantized) - values).max() <= quantized.step.steps / 2
    clipped = quantize_to_levels(values, Levels(-80, -3, 12))
    assert clipped.bits == 4
    assert (dequantize(clipped).min(), dequantize(clipped).max()) == (-3 / 32, 12 / 32)
    for levels, message in (
        ((2048, 0, 1), r"levels\.exponent must be in -2016\.\.2047, got 2048"),
        ((0, 0, 4096), r"levels must be at most 4096 within ±32767, got 0\.\.4096"),
        ((0, -32768, 0), r"got -32768\.\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_to_levels(values, Levels(*levels))


def test_curvatures_foretell_the_error_of_rounding(trained):
    chooser = StepChooser(trained.model, trained.clip, seed=0)
    index = torch.arange(len(trained.clip))

    @torch.no_grad()
    def error():
        image = trained.model(trained.clip.inputs(index), index)
        return float((image - trained.clip.targets(index)).square().mean())

    assert chooser.error == pytest.approx(error(), rel=1e-4)
    for name, parameter in trained.model.coded_parameters().items():
        if parameter.numel() < 300:
            continue
        # Noise of both signs: what is odd in it, the gradient's part, cancels.
        step = float(np.sqrt(24 * 0.02 * chooser.error / (chooser.curvatures[name] * parameter.numel())))
        noise = (torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) - 0.5) * step
        before, changes = parameter.detach().clone(), []
        for sign in (-1, 1):
            parameter.data.copy_(before + sign * noise)
            changes.append(error() - chooser.error)
        parameter.data.copy_(before)
        assert 0.4 < np.mean(changes) / (0.02 * chooser.error) < 2.5, name


def test_steps_grow_with_the_weight_of_the_rate(trained):
    chooser = StepChooser(trained.model, trained.clip, seed=0)
    weights = (0.0, 0.1, 0.5, 2.0)
    found = []
    for weight in weights:
        levels = chooser.choose(dataclasses.replace(QUANTIZATION, rate_weight=weight))
        found.append({name: of.exponent for name, of in levels.items()})
    bits = [chooser.bits(exponents) for exponents in found]
    assert bits == sorted(bits, reverse=True)
    assert len(set(bits)) == len(bits)
    for finer, coarser in itertools.pairwise(found):
        assert all(finer[name] <= coarser[name] for name in chooser.values)
    # The steps are those of the formula for the bits that come of them, as far as sixteenths of an octave can tell.
    for weight, exponents, total in list(zip(weights, found, bits, strict=True))[1:]:
        for name, exponent in exponents.items():
            step, size = float(log_steps(np.array(exponent))), float(np.sqrt(np.square(chooser.values[name]).mean()))
            if found[0][name] < exponent and step < 0.9 * size:
                best = 12 * weight * chooser.error / (total * chooser.curvatures[name] * np.log(2))
                assert step == pytest.approx(np.sqrt(best), rel=0.06), name


def test_without_a_rate_steps_are_between_the_extremes(trained):
    chooser = StepChooser(trained.model, trained.clip, seed=0)
    config = QuantizationConfig(0, 0.0, 5, 4)
    levels = chooser.choose(config)
    for name, values in chooser.values.items():
        bits = 4 if name == EMBEDDINGS else 5
        assert levels[name].high - levels[name].low == 2**bits - 1
        quantized = quantize_to_levels(values, levels[name])
        assert quantized.bits <= bits
        assert np.abs(dequantize(quantized) - values).max() <= quantized.step.steps * 0.501  # none is clipped
        usual = quantize(values, bits, max_pair_ratio=0).step
        assert abs(levels[name].exponent - int(usual.exponent)) <= 1, name


def test_no_step_is_larger_than_the_values(trained):
    chooser = StepChooser(trained.model, trained.clip, seed=0)
    name = max(chooser.values, key=lambda name: chooser.values[name].size)
    chooser.curvatures[name] = 0.0
    levels = chooser.choose(QUANTIZATION)
    size = np.sqrt(np.square(chooser.values[name]).mean())
    assert size / 2 ** (1 / 16) < log_steps(np.array(levels[name].exponent)) < size * 2 ** (1 / 16)
    assert 1 < chooser.bits({name: levels[name].exponent}) / chooser.values[name].size < 2.5


def test_weights_come_back_exactly(model_name, moving_frames):
    trainer = make_trainer(model_name, moving_frames, dataclasses.replace(CONFIG, epochs=2))
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = 0.0
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.run()
    assert trainer.step == 6
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_the_network_sees_what_the_file_holds(moving_frames):
    trainer = make_trainer("hflf", moving_frames, CONFIG)
    seen = []
    plain = trainer.model.distortion

    def watched(embeddings, index, frames):
        if trainer.training_step.quantization is not None:
            weights = {name: p.detach().clone() for name, p in trainer.model.coded_parameters().items()}
            seen.append((weights, embeddings.detach().clone()))
        return plain(embeddings, index, frames)

    trainer.model.distortion = watched
    exact = []
    trainer.run(lambda t: exact.append({name: p.detach().clone() for name, p in t.model.coded_parameters().items()}))
    levels = trainer.levels
    assert len(seen) == 2 * trainer.steps_per_epoch
    for step, (weights, embeddings) in enumerate(seen, start=2 * trainer.steps_per_epoch):
        for name, value in weights.items():
            stored = quantize_to_levels(exact[step - 1][name].numpy(), levels[name])
            assert np.array_equal(value.numpy(), dequantize(stored)), name
        assert np.array_equal(
            embeddings.numpy(), dequantize(quantize_to_levels(embeddings.numpy(), levels[EMBEDDINGS]))
        )


def test_all_weights_are_rounded_as_one_is(trained):
    levels = StepChooser(trained.model, trained.clip, seed=0).choose(QUANTIZATION)
    narrow = {name: of._replace(low=-2, high=3) for name, of in levels.items()}
    parameters = trained.model.coded_parameters()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for chosen in (levels, narrow):
        quantization = Quantization(trained.model, chosen)
        quantization.round_weights()
        for name, parameter in parameters.items():
            step, of = torch.from_numpy(log_steps(np.array(chosen[name].exponent))), chosen[name]
            assert torch.equal(parameter, fake_quantize(before[name], step, of.low, of.high)), name
        quantization.restore_weights()
        for name, parameter in parameters.items():
            # As they were, but for those beyond the range.
            step, of = float(log_steps(np.array(chosen[name].exponent))), chosen[name]
            assert torch.equal(parameter, before[name].clamp(of.low * step, of.high * step)), name
        moved = [not torch.equal(parameter, before[name]) for name, parameter in parameters.items()]
        assert any(moved) == (chosen is narrow)


def test_with_a_rate_weights_may_grow(trained):
    chooser = StepChooser(trained.model, trained.clip, seed=0)
    levels = chooser.choose(QUANTIZATION)
    for name, values in chooser.values.items():
        step, of = float(log_steps(np.array(levels[name].exponent))), levels[name]
        assert of.high - of.low == 2**12 - 1
        for extreme in (values.min() - 7 * np.ptp(values), values.max() + 7 * np.ptp(values)):
            assert of.low <= extreme / step <= of.high, name


def test_weights_stay_in_their_range(moving_frames):
    quantization = QuantizationConfig(epochs=12, rate_weight=0.0, weight_bits=3, embedding_bits=3)
    trainer = make_trainer("hflf", moving_frames, dataclasses.replace(CONFIG, epochs=16, quantization=quantization))
    exact = []
    trainer.run(lambda t: exact.append({name: p.detach().clone() for name, p in t.model.coded_parameters().items()}))
    reached = set()
    for name, of in trainer.levels.items():
        if name == EMBEDDINGS:
            continue
        step = float(log_steps(np.array(of.exponent)))
        before, after = (state[name] / step for state in exact[-2:])
        # A step of the optimisers may leave it, and the next begins at the end again.
        moved = (after - before.clamp(of.low, of.high)).abs().max()
        assert (after - after.clamp(of.low, of.high)).abs().max() <= moved + 1e-3, name
        reached |= {name} if (before.clamp(of.low, of.high) != before).any() else set()
    assert reached


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "muon"), ("bf16", "muon"), ("fp16", "adam")])
def test_a_step_reads_nothing_back(model_name, moving_frames, precision, optimizer):
    trainer = make_trainer(
        model_name, moving_frames, dataclasses.replace(CONFIG, precision=precision, optimizer=optimizer)
    )
    assert not trainer._quantize_if_due()
    trainer.step = 2 * trainer.steps_per_epoch
    assert trainer._quantize_if_due()
    assert not trainer._quantize_if_due()
    step = trainer.training_step
    step()
    with Operations() as first:
        step()
    with Operations() as second:
        step()
    assert "_foreach_round_" in first.names  # one kernel for all weights
    assert not READS_BACK & set(first.names)
    assert first.names == second.names


@pytest.mark.parametrize("steps", [1, 6, 7, 11])
def test_resume_is_bit_identical(model_name, moving_frames, tmp_path, steps):
    whole = make_trainer(model_name, moving_frames, CONFIG)
    whole.run()
    broken = make_trainer(model_name, moving_frames, CONFIG, workdir=tmp_path)
    with pytest.raises(TrainingInterrupted):
        broken.run(StopAfter(steps))
    resumed = make_trainer(model_name, moving_frames, CONFIG, workdir=tmp_path)
    assert resumed.step == steps
    torch.manual_seed(99)
    resumed.run()
    assert_same_run(whole, resumed)


def test_steps_alone_are_chosen_at_the_end(moving_frames, tmp_path):
    config = dataclasses.replace(CONFIG, quantization=dataclasses.replace(QUANTIZATION, epochs=0))
    plain = make_trainer("hflf", moving_frames, dataclasses.replace(CONFIG, quantization=None))
    plain.run()
    assert plain.levels is None
    trainer = make_trainer("hflf", moving_frames, config, workdir=tmp_path)
    trainer.run()
    assert_same_state(plain, trainer)
    again = make_trainer("hflf", moving_frames, config, workdir=tmp_path)
    again.run()
    assert_same_run(trainer, again)


def test_checkpoint_of_other_quantisation_is_refused(moving_frames, tmp_path):
    make_trainer("hflf", moving_frames, CONFIG, workdir=tmp_path).run()
    other = dataclasses.replace(CONFIG, quantization=dataclasses.replace(QUANTIZATION, rate_weight=0.25))
    with pytest.raises(CheckpointError, match=r"train\.quantization\.rate_weight is 0\.5 there and 0\.25 here"):
        make_trainer("hflf", moving_frames, other, workdir=tmp_path)


def test_epochs_are_at_most_all(moving_frames):
    with pytest.raises(ValueError, match=r"quantization\.epochs must be in 0\.\.1, got 2"):
        dataclasses.replace(CONFIG, epochs=1)


def test_the_step_is_captured_anew_when_quantisation_begins(moving_frames):
    trainer = make_trainer("hflf", moving_frames, CONFIG)
    taken = []
    plain = trainer._taker
    trainer._taker = lambda: taken.append(trainer.step) or plain()
    trainer.run()
    assert taken == [0, 2 * trainer.steps_per_epoch]
