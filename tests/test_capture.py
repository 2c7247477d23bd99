"""What a GPU records and reads back, without one: a recording is a list of operations on the tensors that it found."""

import itertools
import warnings

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import inversion.capture
from inversion import InversionConfig, Inverter
from inversion.canvas import Jitter
from inversion.config import DEFAULT_VIEWS
from inversion.engine import COPIES, REFRESH, LossLog, changing
from inversion.self_check import verdict
from inversion.views import Draw
from kt import DistillConfig, Distiller
from models.packed import PackedBlock, PackedLinear
from quant import QuantConfig, quantize
from quant.integers import IntegerLinear, with_integer_products
from tests.conftest import tiny_model
from utils import Noise, calibration_images
from utils.device import fitting_batch, multiplies_bytes
from utils.errors import UserError, UserNote, run_main
from utils.flags import quant_parser, quant_task, transfer_parser, transfer_task
from utils.images import Inverted, Synthesis

CPU = torch.device("cpu")
FALLING = {"iterations": 16, "prune_it": (6,), "prune_ratio": (0.3,), "lr_schedule": "cosine", "batch_size": 2}


class Recording(TorchDispatchMode):
    """The operations of a step, with the tensors that they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def read(self) -> dict[int, Tensor]:
        """The memory that was there before, by its address."""
        made, found = self.made_memory(), {}
        for _, args, kwargs, _ in self.calls:
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor) and x.layout == torch.strided:
                    found[x.untyped_storage().data_ptr()] = x
        return {address: x for address, x in found.items() if address not in made}

    def made_memory(self) -> set[int]:
        read, made = set(), set()
        for _, args, kwargs, out in self.calls:
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.layout == torch.strided]
            read |= {address for x in given if (address := x.untyped_storage().data_ptr()) not in made}
            for x in tree_leaves(out):
                if isinstance(x, Tensor) and x.layout == torch.strided:
                    address = x.untyped_storage().data_ptr()
                    made |= {address} - read
        return made


class Tape:
    """A `Recorder` for the CPU, which computes when it records and puts the state back."""

    def __init__(self, state) -> None:
        self.agrees, self.state, self.replays = None, state, 0

    def run(self, step):
        return step()

    def record(self, step):
        before = [x.clone() for x in self.state()]
        with Recording() as recording:
            loss = step()
        with torch.no_grad():
            for x, kept in zip(self.state(), before, strict=True):
                x.copy_(kept)

        def replay() -> Tensor:
            """Every operation again, in the memory of the recording."""
            self.replays += 1
            with torch.no_grad():
                for func, args, kwargs, out in recording.calls:
                    again = func(*args, **kwargs)
                    for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                            old.copy_(new)
            return loss

        return replay


class TapedInverter(Inverter):
    """An inverter that records as on a GPU."""

    def __init__(self, model, **config) -> None:
        super().__init__(model, InversionConfig(**config), CPU)
        self.recorder = Tape(lambda: self.state())

    def adam(self, canvas):
        lr = torch.tensor(self.config.lr)
        return torch.optim.Adam([canvas.parameter], lr=lr, betas=self.config.betas, fused=True)

    def stepper(self, canvas, optimizer, *rest):
        self.state = lambda: changing(canvas, optimizer)
        return super().stepper(canvas, optimizer, *rest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recording_goes_on_over_a_stage_change_and_a_falling_learning_rate(model, dtype):
    """The losses and pixels of launches, whatever the recorder; the check of the recording leaves no trace."""
    recorded = TapedInverter(model, dtype=dtype, **FALLING)
    batch = recorded.invert(0)
    assert recorded.recorder.agrees is True
    assert recorded.recorder.replays == 1 + 16 - 2 * inversion.capture.EAGER_STEPS
    launched = TapedInverter(model, dtype=dtype, **FALLING)
    launched.recorder.agrees = False  # so that nothing is recorded
    wanted = launched.invert(0)
    assert launched.recorder.replays == 0
    torch.testing.assert_close(batch.losses, wanted.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(batch.images.patches, wanted.images.patches, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stale", ["pixels", "jitter", "learning rate"])
def test_a_recording_that_reads_something_stale_is_found_and_left_alone(model, stale, monkeypatch):
    recorded, step = TapedInverter(model, **FALLING), Inverter._step
    wanted = TapedInverter(model, **FALLING).invert(0)
    recording, record, early = [], recorded.recorder.record, {}
    recorded.recorder.record = lambda run: (recording.append(1), record(run), recording.pop())[1]

    def wrong(self, canvas, optimizer, targets, draws, span=None):
        """What a recording would keep: a copy, numbers, a number."""
        if not recording:
            early.setdefault(canvas.pixels.shape, canvas.pixels.detach().clone())
            return step(self, canvas, optimizer, targets, draws, span)
        if stale == "pixels":
            with torch.no_grad():
                canvas.pixels.copy_(early[canvas.pixels.shape])
        if stale == "jitter":
            draws = (
                Draw(Jitter(*draws[0, :2].long().tolist(), bool(draws[0, 2])), torch.zeros(len(canvas.positions), 0)),
            )
        if stale != "learning rate":
            return step(self, canvas, optimizer, targets, draws, span)
        group = optimizer.param_groups[0]
        kept, group["lr"] = group["lr"], group["lr"].item()
        loss = step(self, canvas, optimizer, targets, draws, span)
        group["lr"] = kept
        return loss

    monkeypatch.setattr(TapedInverter, "_step", wrong)
    with pytest.warns(UserNote, match="recorded CUDA graph does not compute what the step does.*--eager") as notes:
        batch = recorded.invert(0)
    assert len(notes) == 1
    assert recorded.recorder.agrees is False
    assert recorded.recorder.replays == 1
    torch.testing.assert_close(batch.losses, wanted.losses, rtol=1e-4, atol=1e-6)


def test_a_step_that_cannot_be_recorded_goes_on(model):
    inverter = TapedInverter(model, **FALLING)

    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    inverter.recorder.record = refuse
    with pytest.warns(UserNote, match="capturing$"):
        batch = inverter.invert(0)
    assert batch.losses.isfinite().all()


def test_a_step_reads_the_same_memory_every_time_and_leaves_nothing(model):
    """Over a stage change and a falling learning rate; loss and gradient are what a step leaves, anew every time."""
    inverter = TapedInverter(model, **FALLING)
    inverter.plain = True  # packed layers are no tensors with an address, and no GPU has them
    inverter._prepare(plain=True)
    inverter.recorder.agrees = False
    step, seen = inverter._step, []

    def watched(canvas, optimizer, targets, jitter, span):
        optimizer.zero_grad()  # what the step before left
        with Recording() as recording:
            loss = step(canvas, optimizer, targets, jitter, span)
        state = changing(canvas, optimizer)
        seen.append((canvas, recording.read().keys(), [x.data_ptr() for x in state], state))
        return loss

    inverter._step = watched
    inverter.invert(0)
    assert len(seen) == 16
    for (canvas, read, state, _), (after, read_after, state_after, held) in itertools.pairwise(seen[1:]):
        if canvas is after:
            assert read == read_after
            assert state == state_after
            assert {x.untyped_storage().data_ptr() for x in held} <= set(read_after)
    assert len({id(canvas) for canvas, *_ in seen}) == 2


class Event:
    """Something that happens when it is told to, or waited for."""

    def __init__(self, happen) -> None:
        self.happen, self.done = happen, False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        if not self.done:
            self.happen()
        self.done = True


def test_a_loss_is_shown_once_it_has_arrived_and_the_host_does_not_run_away():
    events = []

    def start(target, source):
        kept = source.clone()
        events.append(Event(lambda: target.copy_(kept)))
        return events[-1]

    log, shown = LossLog(200, CPU, start), []
    for iteration in range(160):
        log.record(iteration, torch.tensor(float(iteration + 1)))
        if (iteration + 1) % REFRESH == 0:
            shown.append(log.latest(iteration + 1, wait=False))
            assert len(events) - sum(event.done for event in events) <= COPIES
    assert shown[0] != shown[0]  # nothing has arrived: not a loss of 0
    assert shown[COPIES:] == [float(REFRESH * n) for n in range(1, len(shown) - COPIES + 1)]
    events[-2].synchronize(), events[-1].synchronize()
    log.record(160, torch.tensor(161.0))
    assert log.latest(161, wait=False) == 160.0
    assert log.latest(161, wait=True) == 161.0
    assert torch.equal(log.values()[:161], torch.arange(1.0, 162.0))


def test_wrong_fast_paths_are_found_once_and_plain_code_runs(monkeypatch):
    model = tiny_model()
    how = {"iterations": 4, "batch_size": 2, "weights": {"oh": 1.0, "tv2": 0.01}}
    if not any(isinstance(block, PackedBlock) for block in Inverter(model, InversionConfig(), CPU).vit.blocks):
        pytest.skip("this torch has no packed layers")
    wanted = Inverter(model, InversionConfig(**how), CPU, eager=True).invert(0)
    assert verdict(model, CPU, torch.float32, DEFAULT_VIEWS) is None
    with monkeypatch.context() as broken:
        broken.setattr(PackedLinear, "plus", lambda self, x, residual: residual)
        with pytest.warns(UserNote, match="packed layers.*--eager") as notes:
            found = Inverter(model, InversionConfig(**how), CPU).invert(0)
        assert len(notes) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = Inverter(model, InversionConfig(**how), CPU).invert(0)
    for batch in (found, again):
        assert torch.equal(batch.images.patches, wanted.images.patches)


def test_a_wrong_total_variation_is_found(model, monkeypatch):
    monkeypatch.setattr("inversion.total_variation._norm", lambda parts, *_: (parts[0].sum(), parts))
    with pytest.warns(UserNote, match="gradients written out"):
        Inverter(model, InversionConfig(iterations=1, batch_size=2), CPU).invert(0)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"global_pool": "avg"}, {"init_values": 0.3}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_fast_paths_are_told_apart_from_rounding(options, dtype):
    model = tiny_model(**options)
    weights = {"oh": 1.0, "tv1": 0.1, "tv2": 0.01}
    config = InversionConfig(iterations=2, batch_size=3, dtype=dtype, weights=weights, importance="all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = Inverter(model, config, CPU).invert(0)
    assert verdict(model, CPU, getattr(torch, dtype), DEFAULT_VIEWS) is True
    eager = Inverter(model, config, CPU, eager=True)
    assert not any(isinstance(block, PackedBlock) for block in eager.vit.blocks)
    torch.testing.assert_close(batch.losses, eager.invert(0).losses, rtol=1e-4 if dtype == "float32" else 5e-2, atol=0)


def test_wrong_integer_products_are_found(model, monkeypatch):
    if not multiplies_bytes():
        pytest.skip("this CPU is not fast at integer products")
    quantized = quantize(model.sparse(), calibration_images(model, Noise(), 8), QuantConfig(8, 8))
    images = torch.randn(8, 3, 32, 32)
    assert with_integer_products(quantized, images) is not quantized
    forward = IntegerLinear.forward
    monkeypatch.setattr(IntegerLinear, "forward", lambda self, x: 2 * forward(self, x))
    with pytest.warns(UserNote, match="integer products"):
        assert with_integer_products(quantized, images) is quantized


def no_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("free", "answer"), [(1000, "about 8 would fit"), (150, "about 1 would fit"), (90, "not even 1 would fit")]
)
def test_too_large_a_batch_is_one_line_with_what_would_fit(model, monkeypatch, capsys, free, answer):
    """Made up: a batch holds 20 bytes, and 100 an image; a tenth of what is free is left alone."""
    monkeypatch.setattr("utils.device.free_memory_bytes", lambda device: free)
    sizes = []

    def step(self, canvas, *_, **how):
        sizes.append(len(canvas.pixels))
        if len(canvas.pixels) > 9:
            no_memory()
        return torch.zeros(())

    monkeypatch.setattr(Inverter, "_step", step)
    monkeypatch.setattr("utils.device.memory_taken", lambda run, device: (run(), 20 + 100 * sizes[-1])[1])
    inverter = Inverter(model, InversionConfig(batch_size=32, iterations=2), CPU)
    with pytest.raises(SystemExit) as code:
        run_main(lambda: inverter.invert(0))
    told = capsys.readouterr().err
    assert code.value.code == 2
    assert told.startswith("error: 32 images a batch")
    assert answer in told
    assert "--calib-batchsize" in told
    assert told.count("\n") == 1


def test_memory_that_not_even_the_trial_finds():
    assert fitting_batch(no_memory, 10**9, 31) == 0
    assert fitting_batch(lambda images: 1 if images == 1 else no_memory(), 10**9, 31) == 1


def test_other_places_that_run_out_of_memory(model, monkeypatch, capsys):
    monkeypatch.setattr("utils.device.memory_taken", lambda run, device: 400)
    images = calibration_images(model, Noise(), 8)
    distiller = Distiller(model, tiny_model(depth=1), DistillConfig(batch_size=8), CPU)
    monkeypatch.setattr("utils.device.free_memory_bytes", lambda device: 1000)
    monkeypatch.setattr(distiller.student, "forward", no_memory)
    with pytest.raises(UserError, match=r"8 images a batch.*about 7 would fit \(--kr-batchsize\)"):
        distiller.run(images, 1)
    with pytest.raises(SystemExit):
        run_main(no_memory)
    told = "error: there is no memory left (for 2.00 GiB); ask for smaller batches, fewer images or a smaller model\n"
    assert capsys.readouterr().err == told


def test_eager_goes_through_and_pools_are_found_again(model, tmp_path, monkeypatch):
    plain, eager = (quant_task(quant_parser("").parse_args(flags)) for flags in ([], ["--eager"]))
    assert eager.run.eager and not plain.run.eager
    assert eager.settings() == plain.settings()
    kt = [transfer_task(transfer_parser("").parse_args(flags)) for flags in ([], ["--eager"])]
    assert kt[1].run.eager and kt[0].settings() == kt[1].settings()
    made, prepare = [], Inverter._prepare
    monkeypatch.setattr(Inverter, "_prepare", lambda self, plain: (made.append(plain), prepare(self, plain))[1])
    source = Inverted(InversionConfig(iterations=2, batch_size=2), tmp_path)
    pools = []
    for how in (False, True):
        synthesis = Synthesis(model, source, CPU, eager=how)
        synthesis.first(2 + 2 * how)
        pools.append(synthesis.pool.path)
    assert made == [False, True]
    assert pools[0] == pools[1]
    student = tiny_model(depth=1)
    for how in (False, True):
        distiller = Distiller(model, student, DistillConfig(batch_size=2), CPU, eager=how)
        blocks = [*distiller.teacher.blocks, *distiller.student.blocks]
        assert [getattr(block, "plain", False) for block in blocks] == [how] * 3  # a packed one never is
