import pytest
import torch
from torch import nn

from distill import KD, DistillError, Schedule, Specialists, steps
from distill.specialists.specialists import choose_active, combine
from tests.distill.tiny_models import mlp, spread, vectors


def logits(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def objective(q, generalist, specialists, classes, active):
    """KL(p_g ‖ q) + Σ_active KL(p_m ‖ q_m), written as the definition says, from log q."""
    p = generalist.softmax(-1)
    total = (p * (p.log() - q)).sum(-1)
    for m, (answer, inside) in enumerate(zip(specialists, classes, strict=True)):
        p = answer.softmax(-1)
        outside = [j for j in range(q.shape[-1]) if j not in inside]
        merged = torch.cat([q[..., list(inside)], q[..., outside].logsumexp(-1, keepdim=True)], -1)
        total = total + active[..., m] * (p * (p.log() - merged)).sum(-1)
    return total


CASES = {
    "one": (5, [[0, 2]]),
    "disjoint": (6, [[0, 1], [2, 3]]),
    "overlapping": (6, [[0, 1, 2], [2, 3], [5]]),
    "many": (12, [[i, (i + 1) % 12, (i + 5) % 12] for i in range(12)]),
}


def case(name, scale=1.0, batch=(7,), share=0.7):
    count, classes = CASES[name]
    generalist = logits(*batch, count, scale=scale)
    answers = [logits(*batch, len(inside) + 1, seed=m + 1, scale=scale) for m, inside in enumerate(classes)]
    active = torch.rand(*batch, len(classes), generator=torch.Generator().manual_seed(9)) < share
    return generalist, answers, classes, active


@pytest.mark.parametrize("dustbin", [None, -30.0, 3.0])
def test_a_specialist_for_all_classes_equal_to_the_generalist_changes_nothing(dustbin):
    generalist = logits(5, 4)
    answer = generalist if dustbin is None else torch.cat([generalist, torch.full((5, 1), dustbin).double()], -1)
    found = combine(generalist, [answer], [range(4)], torch.ones(5, 1).bool())
    assert torch.allclose(found, generalist.log_softmax(-1), atol=1e-8)


def test_three_classes_by_hand():
    """Outside of S the classes keep their proportions, and the rest is the mean of what the two say."""
    generalist = torch.tensor([[0.5, 0.3, 0.2]]).double().log()
    specialist = torch.tensor([[0.1, 0.9]]).double().log()  # of class 0; the dustbin is for 1 and 2
    q = combine(generalist, [specialist], [[0]], torch.tensor([[True]])).exp()
    assert torch.allclose(q, torch.tensor([[0.3, 0.7 * 0.6, 0.7 * 0.4]]).double(), atol=1e-9)
    # Stationary in the logits of q: c_j + d_m q_j [j outside] / Q_m = N q_j.
    inflow = torch.tensor([[0.5 + 0.1, 0.3 + 0.9 * 0.42 / 0.7, 0.2 + 0.9 * 0.28 / 0.7]]).double()
    assert torch.allclose(inflow, 2 * q, atol=1e-8)
    for z in (torch.eye(3).double() * 0.1).repeat(2, 1) * torch.tensor([1.0] * 3 + [-1.0] * 3)[:, None]:
        moved = (q.log() + z).log_softmax(-1)
        arguments = generalist, [specialist], [[0]], torch.tensor([[True]])
        assert objective(moved, *arguments) > objective(q.log(), *arguments)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_the_objective_is_nought_at_the_answer(name, scale):
    arguments = case(name, scale)
    z = combine(*arguments).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(z.log_softmax(-1), *arguments).sum(), z)
    assert gradient.abs().max() < 1e-7
    assert torch.allclose(z.exp().sum(-1), torch.ones(7).double())


@pytest.mark.parametrize("name", ["overlapping", "many"])
def test_it_is_where_gradient_descent_arrives(name):
    arguments = case(name)
    z = arguments[0].clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [z], max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = objective(z.log_softmax(-1), *arguments).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(combine(*arguments), z.detach().log_softmax(-1), atol=1e-5)


@pytest.mark.parametrize("batch", [(7,), (3, 4)])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_a_batch_is_row_by_row(batch, scale):
    generalist, answers, classes, active = case("overlapping", scale, batch)
    whole = combine(generalist, answers, classes, active)
    assert whole.shape == generalist.shape
    for place in torch.cartesian_prod(*map(torch.arange, batch)).reshape(-1, len(batch)).tolist():
        at = tuple(place)
        alone = combine(generalist[at], [each[at] for each in answers], classes, active[at])
        assert torch.allclose(whole[at], alone, atol=1e-7)


def test_inactive_specialists_have_no_effect():
    generalist, answers, classes, active = case("overlapping")
    off = torch.zeros_like(active)
    assert torch.allclose(combine(generalist, answers, classes, off), generalist.log_softmax(-1), atol=1e-8)
    first = active.clone()
    first[:, 1:] = False
    alone = combine(generalist, answers[:1], classes[:1], active[:, :1])
    assert torch.allclose(combine(generalist, answers, classes, first), alone, atol=1e-8)
    assert not torch.allclose(combine(generalist, answers, classes, active | True), alone, atol=1e-3)


def test_sure_answers_that_contradict_each_other():
    """Both specialists are sure that it is neither of theirs, and the generalist that it is nothing else."""
    generalist = torch.tensor([[0.0, 0.0, -600.0]]).double()
    answers = [torch.tensor([[-500.0, 0.0]]).double() for _ in range(2)]
    q = combine(generalist, answers, [[0], [1]], torch.ones(1, 2).bool()).exp()
    # q_0 = q_1 = x: maximise log x + 2 log(1 − x), where 1 − x = x + q_2 is the mass outside of {0}.
    assert torch.allclose(q, torch.tensor([[1 / 3, 1 / 3, 1 / 3]]).double(), atol=1e-4)


def test_no_answer_within_the_iterations_is_said():
    with pytest.raises(DistillError, match=r"not combined to within 1e-09 nats in 1 iterations: .* are left"):
        combine(*case("many", 5.0), iterations=1)
    generalist, answers, classes, active = case("one")
    with pytest.raises(DistillError, match="some logits are not finite"):
        combine(generalist * torch.nan, answers, classes, active)


def test_the_most_probable_classes_choose():
    z = torch.tensor([[5.0, 4.0, 1.0, 0.0], [0.0, 1.0, 2.0, 9.0]])
    classes = [[0], [1, 2], [3]]
    assert choose_active(z, classes, 1).tolist() == [[True, False, False], [False, False, True]]
    assert choose_active(z, classes, 2).tolist() == [[True, True, False], [False, True, True]]
    assert choose_active(z, classes, 4).all()


def network(outputs, seed):
    return spread(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs)), seed, scale=1.0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("k", [1, 2, 99])
def test_the_teacher_answers_with_the_combination(k, temperature):
    generalist, first, second = network(4, 0), network(3, 1), network(2, 2)
    teacher = Specialists(generalist, {first: [0, 2], second: [3]}, k=k, temperature=temperature)
    x = vectors().batch(range(9))["inputs"]
    with torch.no_grad():
        found = teacher(x).logits
        active = choose_active(generalist(x), [[0, 2], [3]], min(k, 4))
        softened = [each(x) / temperature for each in (generalist, first, second)]
        q = combine(softened[0], softened[1:], [[0, 2], [3]], active)
    assert found.dtype == torch.float32
    assert torch.allclose((found / temperature).softmax(-1).double(), q.exp(), atol=1e-6)
    assert active.any()
    assert not active.all() or k == 99
    untouched = ~active.any(-1)
    assert torch.allclose(found[untouched].softmax(-1), generalist(x)[untouched].softmax(-1), atol=1e-6)


def test_a_student_learns_from_them():
    teacher = Specialists(network(3, 0), {network(2, 1): [1], network(3, 2): [0, 2]}, k=2)
    before = [parameter.clone() for parameter in teacher.parameters()]
    records = list(
        steps(teacher, spread(mlp()), None, vectors(), objective=KD(1.0), schedule=Schedule(steps=60, lr=3e-2))
    )
    assert records[-1].terms["kd"] < 0.5 * records[0].terms["kd"]
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Specialists(network(3, 0), {}), "Specialists were given none"),
        (lambda: Specialists(network(3, 0), {network(2, 1): [0]}, k=0), "k=0, temperature=1.0"),
        (lambda: Specialists(network(3, 0), {network(2, 1): [0]}, temperature=0.0), "both must be above 0"),
        (lambda: Specialists(network(3, 0), {network(2, 1): []}), r"specialist 1 has the classes \[\]"),
        (
            lambda: Specialists(network(3, 0), {network(3, 1): [1, 1]}),
            r"classes \[1, 1\]; give at least one, each once",
        ),
        (lambda: Specialists(network(3, 0), {network(2, 1): [-1]}), "each once, from 0 on"),
        (
            lambda: Specialists(network(3, 0), {network(2, 1): [3]})(torch.zeros(2, 6)),
            r"specialist 1 is for class 3 and the generalist has 3 classes \(0 to 2\)",
        ),
        (
            lambda: Specialists(network(3, 0), {network(2, 1): [0, 1]})(torch.zeros(2, 6)),
            r"specialist 1 gives \[2, 2\] and the generalist \[2, 3\]; it needs 3 outputs",
        ),
    ],
)
def test_what_does_not_fit_together(make, message):
    with pytest.raises(DistillError, match=message):
        make()
