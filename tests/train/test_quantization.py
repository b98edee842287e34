"""Training with quantised weights: it rounds as the file does, steps are worth their bits, and it resumes exactly."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from test_step import READS_BACK, Operations
from test_trainer import StopAfter, assert_same_state, make_trainer

from hflfnerv._log_step import log_steps
from hflfnerv.codec.quantization import dequantize, quantize, quantize_with_step
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
    assert a.step_exponents == b.step_exponents
    assert a.training_step.quantization.bit_worth == b.training_step.quantization.bit_worth
    assert [(r.epoch, r.psnr_db, r.lr) for r in a.history] == [(r.epoch, r.psnr_db, r.lr) for r in b.history]


@pytest.mark.parametrize("exponent", [-300, -101, -64, -37, 0, 5])
def test_rounds_as_the_file_does(exponent):
    step = log_steps(np.array(exponent))
    generator = np.random.default_rng(0)
    values = generator.standard_normal((7, 300), dtype=np.float32) * np.float32(300 * step)
    values[0, :200] = step * (np.arange(200, dtype=np.float32) - 100 + np.float32(0.5))  # halfway, or next to it
    values[1, :3] = [0.0, -0.0, step / 4]
    ours = fake_quantize(torch.from_numpy(values), torch.from_numpy(step)).numpy()
    assert np.array_equal(ours, dequantize(quantize_with_step(values, exponent)))


def test_the_gradient_is_that_of_the_identity():
    x = torch.randn(5, 6, requires_grad=True)
    gradient = torch.randn(5, 6)
    fake_quantize(x, torch.tensor(0.25)).backward(gradient)
    assert torch.equal(x.grad, gradient)


def test_a_step_takes_as_many_bits_as_it_needs():
    values = np.linspace(-1, 1, 1001, dtype=np.float32)
    for exponent, bits in ((0, 2), (-16, 3), (-80, 7), (-144, 11)):
        quantized = quantize_with_step(values, exponent)
        assert (quantized.bits, int(quantized.step.exponent)) == (bits, exponent)
        assert np.abs(dequantize(quantized) - values).max() <= quantized.step.steps / 2
    widened = quantize_with_step(values, -300)
    assert widened.bits == 12
    assert int(widened.step.exponent) > -300
    with pytest.raises(ValueError, match=r"exponent must be in -2016\.\.2047, got 2048"):
        quantize_with_step(values, 2048)


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
    found = [chooser.choose(dataclasses.replace(QUANTIZATION, rate_weight=weight)) for weight in weights]
    bits = [chooser.bits(exponents) for exponents, _ in found]
    assert bits == sorted(bits, reverse=True)
    assert len(set(bits)) == len(bits)
    assert [worth for _, worth in found] == sorted(worth for _, worth in found)
    for finer, coarser in itertools.pairwise(found):
        assert all(finer[0][name] <= coarser[0][name] for name in chooser.values)
    # It holds what it says, the worth of a bit is w E / R, as far as bits follow steps of a sixteenth of an octave.
    for weight, (_, worth), total in list(zip(weights, found, bits, strict=True))[1:]:
        assert worth == pytest.approx(weight * chooser.error / total, rel=0.1)


def test_without_a_rate_steps_are_between_the_extremes(trained):
    chooser = StepChooser(trained.model, trained.clip, seed=0)
    config = QuantizationConfig(0, 0.0, 5, 4)
    exponents, worth = chooser.choose(config)
    assert worth == 0
    for name, values in chooser.values.items():
        bits = 4 if name == EMBEDDINGS else 5
        assert quantize_with_step(values, exponents[name]).bits <= bits
        usual = quantize(values, bits, max_pair_ratio=0).step
        assert abs(exponents[name] - int(usual.exponent)) <= 1, name


def test_no_step_is_larger_than_the_values(trained):
    chooser = StepChooser(trained.model, trained.clip, seed=0)
    name = max(chooser.counts, key=chooser.counts.get)
    chooser.curvatures[name] = 0.0
    exponents, _ = chooser.choose(QUANTIZATION)
    size = np.sqrt(np.square(chooser.values[name]).mean())
    assert size / 2 ** (1 / 16) < log_steps(np.array(exponents[name])) < size * 2 ** (1 / 16)
    assert 1 < chooser.bits({name: exponents[name]}) / chooser.counts[name] < 2.5


def test_the_rate_is_near_the_entropy(trained):
    model, count = trained.model, len(trained.clip)
    exponents, _ = StepChooser(model, trained.clip, seed=0).choose(QUANTIZATION)
    before = {name: p.detach().clone() for name, p in model.coded_parameters().items()}
    for parameter in model.coded_parameters().values():
        parameter.data.copy_(torch.distributions.Laplace(0, parameter.abs().mean()).sample(parameter.shape))
    chooser = StepChooser(model, trained.clip, seed=0)
    embeddings = torch.from_numpy(chooser.values[EMBEDDINGS])
    for shift in (0, 24, 48):
        coarser = {name: exponent + shift for name, exponent in exponents.items()}
        quantization = Quantization(model, coarser, 1.0, frames=count)
        quantization.round_weights()
        with torch.no_grad():
            rate = float(quantization.rate(quantization.round_embeddings(embeddings)))
        quantization.restore_weights()
        assert rate == pytest.approx(chooser.bits(coarser), rel=0.15), shift
    for name, parameter in model.coded_parameters().items():
        parameter.data.copy_(before[name])


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
    exponents = trainer.step_exponents
    assert len(seen) == 2 * trainer.steps_per_epoch
    for step, (weights, embeddings) in enumerate(seen, start=2 * trainer.steps_per_epoch):
        for name, value in weights.items():
            stored = quantize_with_step(exact[step - 1][name].numpy(), exponents[name])
            assert np.array_equal(value.numpy(), dequantize(stored)), name
        assert np.array_equal(
            embeddings.numpy(), dequantize(quantize_with_step(embeddings.numpy(), exponents[EMBEDDINGS]))
        )


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
    assert "round" in first.names
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
    assert plain.step_exponents is None
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
