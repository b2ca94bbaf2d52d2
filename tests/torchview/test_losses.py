import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from hasten.errors import BadInput, SignatureMismatch, Unsupported  # noqa: E402
from hasten.metrics import METRICS, predicted  # noqa: E402
from hasten.torchview.losses import IGNORED, Regressors, class_logits, distillation, settle  # noqa: E402

F = torch.nn.functional


def logits(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def settled(outputs, labels=None, taught=None, *, loss="auto", alpha=0.9, temperature=2.0):
    outputs = outputs if isinstance(outputs, dict) else {"y": outputs}
    taught = taught if taught is None or isinstance(taught, dict) else {"y": taught}
    return settle(outputs, labels, taught, loss=loss, alpha=alpha, temperature=temperature)


def value(objective, outputs, labels=None, taught=None):
    """Give the loss of arrays."""
    tensors = [None if a is None else [torch.from_numpy(np.asarray(x)) for x in a] for a in (outputs, taught)]
    targets = None
    if labels is not None:
        targets = torch.from_numpy(objective.targets(labels, outputs[objective.main].shape))
    return float(objective.loss(tensors[0], targets, tensors[1]))


def softmax(x, axis=1):
    e = np.exp(x.astype(np.float64) - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


@settings(max_examples=20, deadline=None)
@given(temperature=st.floats(0.5, 20.0), seed=st.integers(0, 99))
def test_distillation_is_the_divergence_of_softened_classes(temperature, seed):
    student, teacher = logits(5, 7, seed=seed), logits(5, 7, seed=seed + 1)
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    expected = (p * np.log(p / q)).sum(1).mean() * temperature**2
    got = distillation(torch.from_numpy(student), torch.from_numpy(teacher), temperature=temperature)
    assert float(got) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_class_that_both_mask_out_costs_nothing_and_leaves_gradients_finite():
    masked = logits(5, 4)
    masked[:, 3] = -np.inf
    other = masked + logits(5, 4, seed=1)
    objective = settled(masked, taught=other)
    student = torch.from_numpy(masked).requires_grad_()
    loss = objective.loss([student], None, [torch.from_numpy(other)])
    loss.backward()
    whole = settled(masked[:, :3], taught=other[:, :3])
    expected = whole.loss([torch.from_numpy(masked[:, :3])], None, [torch.from_numpy(other[:, :3])])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert bool(student.grad.isfinite().all())


def test_values_that_are_infinite_in_both_cost_nothing():
    y, t = logits(6, 4), logits(6, 4, seed=1)
    y[0, 0] = t[0, 0] = np.inf
    student = torch.from_numpy(y).requires_grad_()
    loss = settled(y, taught=t, loss="mse").loss([student], None, [torch.from_numpy(t)])
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(student.grad.isfinite().all())


def test_rows_that_mark_several_classes_are_no_targets_also_beyond_the_first_rows():
    labels = np.eye(4, dtype=np.float32)[np.arange(8) % 4]
    objective = settled(logits(8, 4), labels)
    assert objective.kind == "cross-entropy"
    labels[5] = [1, 1, 0, 0]
    with pytest.raises(BadInput, match="several classes of a row"):
        objective.targets(labels, (8, 4))
    assert settled(logits(8, 4), labels).kind == "mse"


def test_a_hot_distillation_pulls_as_hard_as_a_cold_one():
    gradients = []
    for temperature in (10.0, 100.0):
        student = torch.zeros(4, 5, requires_grad=True)
        distillation(student, torch.from_numpy(logits(4, 5)), temperature=temperature).backward()
        gradients.append(float(student.grad.norm()))
    assert gradients[1] == pytest.approx(gradients[0], rel=0.1)


def test_labels_and_teacher_share_the_loss_by_alpha():
    y, t, labels = logits(6, 4), logits(6, 4, seed=1), np.array([0, 1, 2, 3, 0, 1])
    alone = value(settled(y, labels), [y], labels)
    taught = value(settled(y, None, t), [y], None, [t])
    both = value(settled(y, labels, t, alpha=0.3), [y], labels, [t])
    assert both == pytest.approx(0.3 * taught + 0.7 * alone, rel=1e-5)
    assert alone == pytest.approx(float(F.cross_entropy(torch.from_numpy(y), torch.from_numpy(labels))), rel=1e-5)


def test_probabilities_give_the_loss_of_their_logits():
    y, t, labels = logits(6, 4), logits(6, 4, seed=1), np.array([0, 1, 2, 3, 0, 1])
    p, q = softmax(y).astype(np.float32), softmax(t).astype(np.float32)
    plain = value(settled(y, labels, t), [y], labels, [t])
    assert value(settled(p, labels, q), [p], labels, [q]) == pytest.approx(plain, rel=1e-4)
    assert value(settled(y, labels, q), [y], labels, [q]) == pytest.approx(plain, rel=1e-4)


def test_a_probability_of_zero_costs_much_and_not_infinitely_much():
    p, labels = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32), np.array([1, 1])
    assert 10 < value(settled(p, labels), [p], labels) < 20


@pytest.mark.parametrize("column", [True, False])
def test_a_single_number_is_a_binary_classifier(column):
    z, labels = logits(8, 1) if column else logits(8), np.arange(8) % 2
    expected = float(
        F.binary_cross_entropy_with_logits(torch.from_numpy(z).reshape(8), torch.from_numpy(labels).float())
    )
    assert value(settled(z, labels), [z], labels) == pytest.approx(expected, rel=1e-5)
    assert value(settled(z, labels * 2 - 1), [z], labels * 2 - 1) == pytest.approx(expected, rel=1e-5)
    p = (1 / (1 + np.exp(-z))).astype(np.float32)
    assert value(settled(p, labels), [p], labels) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("form", ["index", "column", "one-hot", "float"])
def test_class_labels_may_come_in_any_form_that_metrics_read(form):
    y, labels = logits(6, 4), np.array([0, 1, 2, 3, 0, 1])
    expected = value(settled(y, labels), [y], labels)
    formed = {
        "index": labels.astype(np.uint8),
        "column": labels[:, None],
        "one-hot": np.eye(4, dtype=np.float32)[labels],
        "float": labels.astype(np.float32),
    }[form]
    METRICS["accuracy"].value({"y": y}, formed)
    assert value(settled(y, formed), [y], formed) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 5, 3)], ids=["segmentation", "tokens"])
def test_classes_are_on_the_axis_where_metrics_see_them(shape):
    y = logits(*shape)
    labels = predicted(y)
    objective = settled(y, labels)
    near = value(settled(100 * y, labels), [100 * y], labels)
    assert near < 0.05
    assert class_logits(torch.from_numpy(y), objective.axis).shape[:2] == (2, 3)


def test_positions_without_a_class_do_not_count():
    y = logits(2, 3, 4, 4)
    labels = predicted(y)
    before = value(settled(y, labels), [y], labels)
    marked = labels.copy()
    marked[0, :2] = 255
    marked[1, 3] = -1
    targets = settled(y, marked).targets(marked, y.shape)
    assert (targets == IGNORED).sum() == 12
    expected = F.cross_entropy(torch.from_numpy(y), torch.from_numpy(targets), ignore_index=IGNORED)
    assert value(settled(y, marked), [y], marked) == pytest.approx(float(expected), rel=1e-5) != before
    nothing = np.full_like(labels, 255)
    assert value(settled(y, labels), [y], nothing) == 0.0


@pytest.mark.parametrize("wrong", [4, -1])
def test_a_label_that_is_no_class_is_named(wrong):
    labels = np.array([0, 1, 2, 3, 0, wrong])
    objective = settled(logits(6, 4), labels)
    with pytest.raises(BadInput, match=f"label {wrong} is no class: the output has classes 0 to 3"):
        objective.targets(labels, (6, 4))


def test_labels_of_another_length_are_refused():
    with pytest.raises(BadInput, match=r"labels have shape \[6, 3\], which does not fit outputs \[6, 4\]"):
        settled(logits(6, 4), logits(6, 3))


def test_values_are_judged_by_squared_error_in_units_of_their_variance():
    y, labels = logits(64, 1), 1000 * logits(64, seed=1)
    objective = settled(y, labels)
    assert objective.kind == "mse"
    constant = np.full_like(y, labels.mean())
    assert value(objective, [constant], labels) == pytest.approx(1.0, rel=1e-3)
    assert value(objective, [labels[:, None]], labels) == 0.0


def test_without_labels_only_outputs_that_look_like_classes_are_taken_for_some():
    assert settled(logits(6, 4), None, logits(6, 4)).kind == "cross-entropy"
    assert settled(logits(6, 3, 8, 8), None, logits(6, 3, 8, 8)).kind == "mse"
    assert settled(logits(6, 4), None, logits(6, 4), loss="mse").kind == "mse"


def test_a_few_rows_do_not_decide_whether_labels_are_classes():
    y, values = logits(2, 1), np.array([3.0, 4.0], np.float32)
    many = np.arange(50, dtype=np.float32)
    assert settle({"y": y}, values, None, loss="auto", alpha=1.0, temperature=1.0, many=many).kind == "mse"


def test_every_float_output_of_the_teacher_is_learned():
    outputs = {"label": np.arange(6), "a": logits(6, 4), "b": logits(6, 2, 3)}
    taught = {"label": np.arange(6), "a": outputs["a"], "b": outputs["b"] + 1}
    objective = settled(outputs, None, taught)
    assert (objective.main, objective.floats) == (1, (1, 2))
    expected = 1 / taught["b"].astype(np.float64).var()
    assert value(objective, list(outputs.values()), None, list(taught.values())) == pytest.approx(expected, rel=1e-4)


def test_integers_alone_cannot_be_learned():
    with pytest.raises(Unsupported, match="output 'y' is int64: no gradient comes through it"):
        settled(np.arange(6), np.arange(6))


def test_a_teacher_of_other_shapes_is_refused():
    with pytest.raises(SignatureMismatch, match=r"the teacher is \[n, 7\], the model's is \[n, 4\]"):
        settled(logits(6, 4), None, logits(6, 7))
    with pytest.raises(SignatureMismatch, match="the teacher has 2 outputs, the model 1"):
        settled(logits(6, 4), None, {"y": logits(6, 4), "z": logits(6, 4)})


def test_agreement_is_the_share_of_equal_classes():
    y, t = logits(50, 4), logits(50, 4, seed=1)
    got = settled(y, None, t).agreement([torch.from_numpy(y)], [torch.from_numpy(t)])
    assert got == pytest.approx(METRICS["agreement"].value({"y": y}, t))
    assert settled(y, None, t, loss="mse").agreement([torch.from_numpy(y)], [torch.from_numpy(t)]) is None


def test_matched_tensors_of_one_shape_need_no_map():
    own, other = ({"a": torch.from_numpy(logits(3, 8, 4, 4, seed=seed))} for seed in (0, 1))
    regressors = Regressors({"a": "a"}, own, other)
    assert not list(regressors.parameters())
    expected = F.mse_loss(own["a"], other["a"]) / other["a"].var()
    assert float(regressors(own, other)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("mine", "theirs"), [((3, 5, 4, 4), (3, 8, 4, 4)), ((3, 6, 5), (3, 6, 8))])
def test_matched_tensors_of_another_width_get_a_map_along_it(mine, theirs):
    own, other = {"a": torch.from_numpy(logits(*mine))}, {"b": torch.from_numpy(logits(*theirs))}
    regressors = Regressors({"a": "b"}, own, other)
    assert [tuple(p.shape) for p in regressors.parameters()] == [(8, 5)]
    regressors(own, other).backward()
    assert all(bool(p.grad.any()) for p in regressors.parameters())


def test_matched_tensors_that_differ_in_two_axes_are_refused():
    own, other = {"a": torch.zeros(3, 5, 4, 4)}, {"a": torch.ones(3, 8, 2, 4)}
    with pytest.raises(SignatureMismatch, match="may differ in one axis"):
        Regressors({"a": "a"}, own, other)
