import io
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import lessons  # noqa: E402
from lessons import EVERY_STEP, LONG, accuracy, lesson, pictures, pupil, rows, small_convnet, teacher  # noqa: E402

from hasten.errors import BadInput, BuildFailed, InvalidSetting, SignatureMismatch, UnknownName, Unsupported  # noqa: E402
from hasten.graph.model import read_model  # noqa: E402
from hasten.passes.quantize_static import QuantizeStatic  # noqa: E402
from hasten.samples import Samples  # noqa: E402
from hasten.settings import build  # noqa: E402
from hasten.testing.models import Builder, convnet, mlp, stored  # noqa: E402
from hasten.torchview.batches import Split, epoch_order  # noqa: E402
from hasten.torchview.checks import outputs_of, step_sizes_of  # noqa: E402
from hasten.torchview.optimizer import make_optimizer, rate, set_rate  # noqa: E402
from hasten.torchview.training import Training, train  # noqa: E402
from hasten.torchview.view import View  # noqa: E402
from hasten.transform import run_pass  # noqa: E402

QUICK = Training(epochs=2.0, batch=32, lr=3e-3, threads=1)


def state(view):
    return {name: value.clone() for name, value in view.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_at(step):
    """Give a progress that interrupts when it has been told of so many steps."""
    calls = []

    def progress(text, share):
        calls.extend([text] * text.startswith("epoch"))
        if len(calls) == step:
            raise KeyboardInterrupt

    return progress


def noting(shares):
    """Give a progress that notes the share behind each step."""
    return lambda text, share: shares.extend([share] * text.startswith("epoch"))


def test_training_on_labels_learns_them():
    view, samples = pupil(), lesson()
    before = accuracy(view, lesson(seed=5))
    history = train(view, samples, replace(LONG, epochs=20.0, lr=1e-2))
    assert accuracy(view, lesson(seed=5)) > max(0.6, before + 0.3)
    assert history.epochs[-1].loss < 0.5 * history.epochs[0].loss
    assert [epoch.number for epoch in history.epochs] == list(range(1, 21))


def test_a_teacher_is_learned_from_without_any_label():
    view, samples = pupil(), Samples(lesson().inputs)
    history = train(view, samples, replace(LONG, epochs=20.0, lr=1e-2), teacher=teacher())
    assert accuracy(view, lesson(seed=5)) > 0.6
    assert history.epochs[history.best - 1].agreement > history.start.agreement + 0.2


def test_a_student_that_is_its_teacher_has_nothing_to_lose_at_first_and_is_told_so():
    told = []
    train(
        pupil(),
        Samples({"x": rows(16)}),
        replace(QUICK, batch=4, epochs=1.0),
        teacher=pupil(),
        progress=lambda text, share: told.append(text),
        pace=EVERY_STEP,
    )
    assert "loss 0," in next(text for text in told if text.startswith("epoch"))


def test_weights_in_half_precision_are_refused_before_the_first_step():
    net = Builder(0)
    half = net.add("MatMul", net.add("Cast", "x", to=10), net.constant(np.ones((16, 4), np.float16)))
    net.add("Cast", half, to=1)
    view = View.of(net.model(("x", ("batch", 16)), ("y", ("batch", 4))))
    with pytest.raises(Unsupported, match=r"small steps vanish in weights of torch\.float16; train the float32 model"):
        train(view, lesson(), QUICK)


def test_a_batch_of_one_row_leaves_the_statistics_of_vectors_as_they_are():
    net = Builder(0)
    net.batch_norm(net.add("MatMul", "x", net.weight(16, 4)), 4)
    view = View.of(net.model(("x", ("batch", 16)), ("y", ("batch", 4))))
    before = {name: value.clone() for name, value in view.named_buffers()}
    train(view, lesson(), replace(QUICK, batch=1, epochs=0.02))
    assert all(torch.equal(value, before[name]) for name, value in view.named_buffers())


def test_patience_of_no_epochs_is_refused():
    with pytest.raises(InvalidSetting, match="patience"):
        build(Training, {"patience": 0})


def test_the_teacher_stays_as_it_is():
    master = View.of(convnet(width=4, seed=1))
    before = state(master)
    train(small_convnet(), pictures(), QUICK, teacher=master)
    assert same(before, state(master))


def test_the_parameters_kept_are_those_that_were_best_on_held_out_rows():
    samples = lesson()
    noisy = replace(samples, labels=np.random.default_rng(3).integers(0, 4, len(samples)))  # nothing to learn: overfits
    view = pupil()
    history = train(view, noisy, replace(LONG, lr=3e-2, epochs=10.0))
    held = noisy.take(Split.of(len(noisy), 0).held)
    (logits,) = view(torch.from_numpy(held.inputs["x"]))
    loss = float(torch.nn.functional.cross_entropy(logits.detach(), torch.from_numpy(held.labels)))
    found = {0: history.start.held, **{epoch.number: epoch.held for epoch in history.epochs}}
    assert history.best == min(found, key=found.get) < 10
    assert loss == pytest.approx(found[history.best], rel=1e-4)


def test_held_out_rows_are_a_twentieth_and_never_trained_on():
    split = Split.of(400, seed=0)
    seen = {
        int(row) for epoch in range(9) for batch in epoch_order(split.train, 32, seed=0, epoch=epoch) for row in batch
    }
    assert len(split.held) == 20
    assert seen.isdisjoint(split.held.tolist())
    assert sorted((*split.train, *split.held)) == list(range(400))
    assert len(Split.of(100_000, seed=0).held) == 2000
    assert len(Split.of(19, seed=0).held) == 0


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    made = []
    for seed in (0, 0, 1):
        view = pupil()
        train(view, lesson(), replace(QUICK, seed=seed))
        made.append(state(view))
    assert same(made[0], made[1])
    assert not same(made[0], made[2])


@pytest.mark.parametrize("checkpoint_s", [0.0, 1e9])
@pytest.mark.parametrize("step", [1, 12, 25, 43])
def test_what_was_interrupted_goes_on_to_the_same_bits(step, checkpoint_s, tmp_path):
    pace = replace(EVERY_STEP, checkpoint_s=checkpoint_s)
    whole, parts = pupil(), pupil()
    expected = train(whole, lesson(), LONG, teacher=teacher())
    with pytest.raises(KeyboardInterrupt):
        train(parts, lesson(), LONG, teacher=teacher(), checkpoints=tmp_path, progress=stop_at(step), pace=pace)
    resumed = pupil()
    assert train(resumed, lesson(), LONG, teacher=teacher(), checkpoints=tmp_path, pace=pace) == expected
    assert same(state(resumed), state(whole))


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "sgd", "lr": 0.05, "weight_decay": 1e-3},
        {"average": 0.9},
        {"augment": "mirror-shift", "patience": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_convnet_goes_on_to_the_same_bits_with(change, tmp_path):
    how = replace(QUICK, **change)
    whole, resumed = small_convnet(), small_convnet()
    expected = train(whole, pictures(), how)
    with pytest.raises(KeyboardInterrupt):
        train(small_convnet(), pictures(), how, checkpoints=tmp_path, progress=stop_at(3), pace=EVERY_STEP)
    assert train(resumed, pictures(), how, checkpoints=tmp_path) == expected
    assert same(state(resumed), state(whole))


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path):
    child = subprocess.Popen([sys.executable, lessons.__file__, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    with child:
        assert all(child.stdout.readline() for _ in range(20)), "it ended before it could be killed"
        child.kill()
    assert child.returncode == -9
    shares = []
    whole, resumed = pupil(), pupil()
    train(whole, lesson(), LONG, teacher=teacher())
    train(
        resumed,
        lesson(),
        LONG,
        teacher=teacher(),
        checkpoints=tmp_path,
        progress=noting(shares),
        pace=EVERY_STEP,
    )
    assert shares[0] > 0.25  # it did not begin anew
    assert same(state(resumed), state(whole))


def test_a_finished_training_makes_no_step_again(tmp_path):
    first, again = pupil(), pupil()
    expected = train(first, lesson(), QUICK, checkpoints=tmp_path)
    assert train(again, lesson(), QUICK, checkpoints=tmp_path, progress=stop_at(1), pace=EVERY_STEP) == expected
    assert same(state(first), state(again))


@pytest.mark.parametrize("other", ["settings", "samples", "model", "graph", "teacher"])
def test_checkpoints_of_another_training_are_left_alone(other, tmp_path):
    train(pupil(), lesson(), QUICK, checkpoints=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    how = replace(QUICK, lr=1e-3) if other == "settings" else QUICK
    samples = lesson(seed=1) if other == "samples" else lesson()
    master = teacher() if other == "teacher" else None
    seed = int(other == "model")
    fresh, beside = pupil(seed), pupil(seed)
    if other == "graph":  # the same parameters, in another function
        model = mlp()
        next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Sigmoid"
        fresh, beside = View.of(model), View.of(model)
    train(fresh, samples, how, teacher=master)
    train(beside, samples, how, teacher=master, checkpoints=tmp_path)
    assert same(state(fresh), state(beside))
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_damaged_checkpoint_is_left_out_for_the_one_before(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(pupil(), lesson(), LONG, checkpoints=tmp_path, progress=stop_at(20), pace=EVERY_STEP)
    newest = max(tmp_path.iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])
    whole, resumed, shares = pupil(), pupil(), []
    train(whole, lesson(), LONG)
    train(
        resumed,
        lesson(),
        LONG,
        checkpoints=tmp_path,
        progress=noting(shares),
        pace=EVERY_STEP,
    )
    assert shares[0] == pytest.approx(20 / 44)
    assert same(state(resumed), state(whole))


def test_a_sample_that_is_not_finite_stops_the_training_and_is_named(tmp_path):
    samples = lesson()
    row = int(epoch_order(Split.of(400, 0).train, 32, seed=0, epoch=0)[4][7])
    x = samples.inputs["x"].copy()
    x[row, 3] = np.nan
    planted = replace(samples, inputs={"x": x})
    message = (
        rf"the loss is nan in epoch 1, step 5 of 44: input 'x' of sample {row} is not finite; take that sample out"
    )
    with pytest.raises(BuildFailed, match=message):
        train(pupil(), planted, LONG, checkpoints=tmp_path, pace=EVERY_STEP)


def test_a_diverging_training_stops_with_the_step_and_its_last_good_checkpoint_stays(tmp_path):
    wild = replace(LONG, optimizer="sgd", lr=1e12, clip=None, warm_up=0.0)
    message = r"in epoch 1, step \d of 44; try a lower lr than 1e\+12, or set clip; the checkpoint of step \d stays"
    with pytest.raises(BuildFailed, match=message):
        train(pupil(), lesson(), wild, checkpoints=tmp_path, pace=EVERY_STEP)
    for path in tmp_path.iterdir():
        kept = torch.load(io.BytesIO(path.read_bytes().partition(b"\n")[2]), weights_only=True)
        assert all(bool(torch.isfinite(value).all()) for value in kept["view"].values())


def test_patience_ends_a_training_that_gains_nothing():
    samples = lesson()
    noisy = replace(samples, labels=np.random.default_rng(3).integers(0, 4, len(samples)))
    history = train(pupil(), noisy, replace(LONG, lr=3e-2, epochs=40.0, patience=2))
    assert len(history.epochs) == history.best + 2 < 40
    assert history.stopped == f"no gain on held-out rows for 2 epochs, the best was epoch {history.best}"


def test_patience_needs_rows_to_hold_out():
    with pytest.raises(InvalidSetting, match="patience = 1 needs rows to hold out, of 10 there are none"):
        train(pupil(), lesson(10), replace(QUICK, patience=1))


def test_few_rows_are_all_trained_on():
    history = train(pupil(), lesson(10), QUICK)
    assert history.start is None
    assert history.best == 2
    assert [epoch.held for epoch in history.epochs] == [None, None]


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 6), (1.0, 11), (2.5, 28), (0.001, 1)])
def test_epochs_may_be_fractions(epochs, steps):
    shares = []
    how = replace(QUICK, epochs=epochs)
    history = train(pupil(), lesson(), how, progress=noting(shares), pace=EVERY_STEP)
    assert len(shares) == steps
    assert shares[-1] == 1.0
    assert len(history.epochs) == math.ceil(epochs)


def test_progress_tells_epoch_loss_speed_and_what_is_left():
    told = []
    ticks = iter(range(1000))
    pace = replace(EVERY_STEP, clock=lambda: next(ticks))
    train(
        pupil(), lesson(), QUICK, progress=lambda text, share: told.extend([text] * text.startswith("epoch")), pace=pace
    )
    assert told[0].startswith("epoch 1/2: loss 1.")
    assert told[0].endswith(" left")
    assert told[-1].startswith("epoch 2/2: loss 0.") or told[-1].startswith("epoch 2/2: loss 1.")


def test_progress_tells_of_held_out_rows_while_they_are_looked_at():
    told = []
    train(pupil(), lesson(), QUICK, progress=lambda text, share: told.append((text, share)), pace=EVERY_STEP)
    assert [share for text, share in told if text == "looking at held-out rows"] == [0.0, 0.5, 1.0]


def test_progress_is_told_no_more_often_than_asked():
    ticks, told = iter(range(10**6)), []
    pace = replace(EVERY_STEP, progress_s=1e5, clock=lambda: next(ticks))
    train(pupil(), lesson(), QUICK, progress=lambda text, share: told.append(share), pace=pace)
    assert told == [0.0, 0.5, 1.0]


def test_neither_labels_nor_a_teacher_is_refused():
    with pytest.raises(Unsupported, match="neither labels nor a teacher"):
        train(pupil(), Samples(lesson().inputs), QUICK)


def test_a_teacher_of_other_classes_is_refused_before_the_first_step():
    stranger = View.of(mlp(classes=7))
    with pytest.raises(SignatureMismatch, match=r"output 'y' of the teacher is \[n, 7\], the model's is \[n, 4\]"):
        train(pupil(), lesson(), QUICK, teacher=stranger, progress=stop_at(1), pace=EVERY_STEP)


def test_a_label_that_is_no_class_is_found_before_the_first_step():
    samples = lesson()
    labels = samples.labels.copy()
    labels[399] = 4
    with pytest.raises(BadInput, match="label 4 is no class: the output has classes 0 to 3"):
        train(pupil(), replace(samples, labels=labels), QUICK, progress=stop_at(1), pace=EVERY_STEP)


def test_student_and_teacher_see_the_same_augmented_batch():
    view, master, seen = small_convnet(), View.of(convnet(width=4, seed=1)), {"student": [], "teacher": []}
    for module, name in ((view, "student"), (master, "teacher")):
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0].clone()))
    train(view, Samples(pictures().inputs), replace(QUICK, augment="mirror-shift"), teacher=master)
    assert all(torch.equal(a, b) for a, b in zip(seen["student"], seen["teacher"], strict=True))
    plain = torch.from_numpy(pictures().inputs["x"]).flatten(1)
    assert not all(bool((plain == image).all(1).any()) for batch in seen["student"] for image in batch.flatten(1))


def test_a_hook_of_the_users_own_changes_the_batches():
    view, masks = pupil(), []

    def blind(inputs, generator):
        masks.append(torch.rand(inputs["x"].shape, generator=generator) < 0.5)
        return {"x": inputs["x"] * masks[-1]}

    train(view, lesson(), replace(QUICK, epochs=1.0), augment=blind)
    assert len(masks) == 11
    assert not torch.equal(masks[0], masks[1])


def test_dense_labels_are_not_augmented_away_from_their_images():
    net = Builder(0)
    net.add("Conv", "x", net.weight(4, 3, 3, 3), pads=[1] * 4)
    view = View.of(net.model(("x", ("batch", 3, 16, 16)), ("y", ("batch", 4, 16, 16))))
    samples = replace(pictures(), labels=np.zeros((96, 16, 16), np.int64))
    train(view, samples, replace(QUICK, epochs=0.1))
    with pytest.raises(Unsupported, match="would not move along"):
        train(view, samples, replace(QUICK, augment="mirror-shift"))


def test_batch_norm_statistics_move_while_training_and_rest_while_evaluating():
    view = small_convnet()
    name = next(n.input[3] for n in view.model().graph.node if n.op_type == "BatchNormalization")
    before = view.tensor(name).clone()
    outputs_of(view, pictures())
    assert torch.equal(view.tensor(name), before)
    train(view, pictures(), replace(QUICK, lr=1e-2))
    assert not torch.equal(view.tensor(name), before)


def test_an_inner_tensor_is_matched_to_the_teachers():
    name = mlp().graph.node[1].output[0]
    distances = []
    for weight in (0.0, 10.0):
        view, master, samples = pupil(), teacher(), Samples(lesson().inputs)
        train(view, samples, replace(LONG, match={name: name}, match_weight=weight), teacher=master)
        x = [torch.from_numpy(samples.inputs["x"])]
        own, theirs = (module.with_taps(x, [name])[1][name] for module in (view, master))
        distances.append(float((own - theirs).square().mean().detach()))
    assert distances[1] < 0.9 * distances[0]


def test_a_narrower_student_is_matched_through_a_learned_map(tmp_path):
    name = mlp().graph.node[1].output[0]
    how = replace(LONG, match={name: name}, match_weight=1.0)
    narrow, again = View.of(mlp(hidden=12)), View.of(mlp(hidden=12))
    expected = train(narrow, lesson(), how, teacher=teacher())
    with pytest.raises(KeyboardInterrupt):
        train(again, lesson(), how, teacher=teacher(), checkpoints=tmp_path, progress=stop_at(9), pace=EVERY_STEP)
    again = View.of(mlp(hidden=12))
    assert train(again, lesson(), how, teacher=teacher(), checkpoints=tmp_path) == expected
    assert expected.epochs[-1].loss < expected.epochs[0].loss
    assert same(state(narrow), state(again))


def test_a_tensor_to_match_must_be_there():
    with pytest.raises(UnknownName, match="no tensor of the graph is called 'nowhere'"):
        train(pupil(), lesson(), replace(QUICK, match={"nowhere": "y"}), teacher=teacher())
    with pytest.raises(Unsupported, match="match needs a teacher"):
        train(pupil(), lesson(), replace(QUICK, match={"y": "y"}))


def test_mixed_precision_learns_too():
    view = pupil()
    train(view, lesson(), replace(LONG, epochs=20.0, lr=1e-2, precision="bfloat16"))
    assert accuracy(view, lesson(seed=5)) > 0.6
    assert {value.dtype for value in view.parameters()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and PyTorch with CUDA")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_on_a_gpu_learns_goes_on_to_the_same_bits_and_comes_back(precision, tmp_path):
    how = replace(QUICK, device="cuda", precision=precision, augment="mirror-shift")
    whole, resumed = small_convnet(), small_convnet()
    expected = train(whole, pictures(), how, teacher=small_convnet())
    with pytest.raises(KeyboardInterrupt):
        train(
            small_convnet(),
            pictures(),
            how,
            teacher=small_convnet(),
            checkpoints=tmp_path,
            progress=stop_at(3),
            pace=EVERY_STEP,
        )
    assert train(resumed, pictures(), how, teacher=small_convnet(), checkpoints=tmp_path) == expected
    assert same(state(resumed), state(whole))
    assert {value.device.type for value in whole.parameters()} == {"cpu"}
    learnt = pupil()
    train(learnt, lesson(), replace(LONG, epochs=20.0, lr=1e-2, device="cuda", precision=precision))
    assert accuracy(learnt, lesson(seed=5)) > 0.6


def test_threads_and_the_random_state_of_the_caller_are_as_before():
    torch.manual_seed(7)
    threads, before = torch.get_num_threads(), torch.get_rng_state()
    train(pupil(), lesson(), replace(QUICK, threads=threads + 1))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(InvalidSetting, match=f"device = '{device}'"):
        train(pupil(), lesson(), replace(QUICK, device=device))


def test_samples_are_read_from_disk_batch_by_batch(tmp_path):
    lesson().save(tmp_path)
    mapped, held = pupil(), pupil()
    train(mapped, Samples.load(tmp_path), QUICK)
    train(held, lesson(), QUICK)
    assert same(state(mapped), state(held))


def test_weights_decay_and_biases_norms_and_step_sizes_do_not():
    view = small_convnet()
    named = dict(view.named_parameters())
    scale = next(name for name, value in named.items() if value.ndim == 1)
    optimizer = make_optimizer("adamw", named.items(), lr=1.0, weight_decay=0.1, step_sizes={scale})
    set_rate(optimizer, 0.5)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(named)
    for name, value in named.items():
        group = groups[id(value)]
        assert group["weight_decay"] == (0.1 if value.ndim > 1 else 0.0)
        assert group["lr"] == (0.05 if name == scale else 0.5)


@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 400), warm_up=st.floats(0, 1))
def test_the_rate_rises_then_falls_to_almost_nothing(steps, warm_up):
    rates = [rate(step, steps, warm_up=warm_up) for step in range(steps)]
    top = rates.index(max(rates))
    assert all(0 < value <= 1 for value in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert abs(top - steps * warm_up) <= 1


def test_every_epoch_sees_every_row_once_in_another_order():
    train_rows = Split.of(336, seed=0).train  # 320 rows, ten batches
    orders = [np.concatenate(epoch_order(train_rows, 32, seed=0, epoch=epoch)) for epoch in (0, 1)]
    assert all(sorted(order) == list(train_rows) for order in orders)
    assert not np.array_equal(*orders)
    seen = [[], []]

    def noted(inputs, generator):
        seen[len(seen[0]) == 10].append(inputs["x"])
        return inputs

    train(pupil(), lesson(336), QUICK, augment=noted)
    assert not torch.equal(torch.cat(seen[0]), torch.cat(seen[1]))


def test_the_first_steps_are_small():
    view, before = pupil(), state(pupil())
    with pytest.raises(KeyboardInterrupt):  # AdamW's first step is as long as the learning rate, in every parameter
        train(view, lesson(), replace(QUICK, warm_up=0.5), progress=stop_at(1), pace=EVERY_STEP)
    longest = max(float((value - before[name]).abs().max()) for name, value in state(view).items())
    assert longest == pytest.approx(QUICK.lr / 12, rel=1e-3)


def test_nothing_is_left_in_the_folder_but_two_checkpoints(tmp_path):
    train(pupil(), lesson(), QUICK, checkpoints=tmp_path, pace=EVERY_STEP)
    assert len(list(tmp_path.iterdir())) == 2


def quantized_pupil(store, ctx):
    source = stored(mlp(), store)
    return View.of(read_model(run_pass(QuantizeStatic(), source, store, replace(ctx, samples=lesson(32)))))


def test_the_last_fifth_of_a_quantized_training_runs_as_it_will_be_used(store, ctx):
    modes = {}
    for name, view in (("int8", quantized_pupil(store, ctx)), ("float32", pupil())):
        modes[name] = []
        view.register_forward_pre_hook(lambda module, _, name=name: modes[name].append(module.training))
        train(view, lesson(19), replace(QUICK, batch=19, epochs=10.0))  # one step an epoch, nothing held out
    assert modes["int8"][1:] == [True] * 8 + [False] * 2  # before them, the first batch is looked at
    assert modes["float32"][1:] == [True] * 10


def test_step_sizes_learn_slower_than_weights(store, ctx):
    view = quantized_pupil(store, ctx)
    scales = step_sizes_of(view)
    assert scales
    assert scales < {name for name, _ in view.named_parameters()}
    assert step_sizes_of(pupil()) == frozenset()
