"""The laws of every subspace, then what each one is for."""

import copy
import json

import pytest
import torch
from torch import nn

from interventions import InterventionError
from interventions.subspaces import PCA, BoundlessRotation, Mask, Rotation, SparseCoder

WIDTH, FEATURES = 12, 20


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(inputs: int, outputs: int, seed: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(draw(seed, outputs, inputs) / inputs**0.5)
        layer.bias.copy_(draw(seed + 1, outputs))
    return layer


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = linear(WIDTH, FEATURES, 2), linear(FEATURES, WIDTH, 4)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x).relu()

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.down(z)


def methods() -> SparseCoder:
    coder = Autoencoder()
    return SparseCoder(coder.encode, coder.decode)


def spread(mask: Mask) -> Mask:
    mask.coordinates(torch.zeros(1, WIDTH))  # the number of entries is known from here on
    mask.logits.data = draw(6, len(mask.logits))
    return mask


def pca(dims: int = 3) -> PCA:
    return PCA.fit(draw(0, 50, WIDTH) + 3, dims)


def of_modules() -> SparseCoder:
    return SparseCoder(nn.Sequential(linear(WIDTH, FEATURES, 2), nn.ReLU()), linear(FEATURES, WIDTH, 4))


def some_features() -> SparseCoder:
    return SparseCoder(linear(WIDTH, FEATURES, 2), linear(FEATURES, WIDTH, 4), features=[7, 2])


SUBSPACES = {
    "rotation": lambda: Rotation(4, WIDTH),
    "rotation of unknown width": lambda: Rotation(4),
    "rotation of everything": lambda: Rotation(WIDTH, WIDTH),
    "boundless": lambda: BoundlessRotation(WIDTH, temperature=2.0),
    "boundless of unknown width": lambda: BoundlessRotation(temperature=2.0),
    "boundless, hard": lambda: BoundlessRotation(WIDTH).eval(),
    "mask": lambda: spread(Mask(WIDTH)),
    "mask, hard": lambda: spread(Mask(WIDTH)).eval(),
    "pca": pca,
    "pca fitted later": lambda: PCA(3, WIDTH).fit_to(draw(0, 50, WIDTH) + 3),
    "coder of modules": of_modules,
    "coder of methods": methods,
    "coder of functions": lambda: SparseCoder(lambda x: x.exp(), lambda z: 2 * z),
    "coder, some features": some_features,
    "mask in a rotation": lambda: spread(Mask(within=Rotation(4, WIDTH))),
    "mask in a rotation of unknown width": lambda: Mask(within=Rotation(4)),
    "mask in a rotation, hard": lambda: spread(Mask(within=Rotation(4, WIDTH))).eval(),
    "mask in a boundless rotation": lambda: spread(Mask(within=BoundlessRotation(temperature=2.0))),
    "mask in a pca": lambda: spread(Mask(within=pca())),
    "mask in a mask in a pca, hard": lambda: spread(Mask(within=spread(Mask(within=pca())))).eval(),
    "mask in a coder": lambda: spread(Mask(within=of_modules())),
    "mask in a coder, some features": lambda: spread(Mask(within=some_features())),
}
LINEAR = [name for name in SUBSPACES if name.startswith(("rotation", "pca"))]
WITHOUT_GRADIENT = {  # because it cancels: the rotation of everything is the source, a bias is in both reconstructions
    "rotation of everything": {"x", "reflections"},
    "coder of modules": {"decode.bias"},
    "coder of methods": {"owners.0.down.bias"},
    "coder, some features": {"encode.bias", "decode.bias"},
    "mask in a coder": {"within.decode.bias"},
    "mask in a coder, some features": {"within.encode.bias", "within.decode.bias"},
}
every = pytest.mark.parametrize("name", SUBSPACES)


def frame(subspace) -> torch.Tensor:
    return subspace.components.T if isinstance(subspace, PCA) else subspace.directions


# What each law holds every subspace to, written as functions so that wrong ones can be shown to break them.


def replacing_by_ones_own_coordinates_is_the_identity(subspace, dtype=torch.float32) -> bool:
    x = (10 * draw(1, 5, 7, WIDTH)).to(dtype)
    return torch.equal(subspace.replace(x, subspace.coordinates(x)), x)


def the_complement_stays(subspace) -> bool:
    x, source = 10 * draw(1, 5, WIDTH), 10 * draw(2, 5, WIDTH)
    new = subspace.replace(x, subspace.coordinates(source))
    kept = torch.eye(WIDTH) - frame(subspace) @ frame(subspace).T
    return bool(((new - x) @ kept).abs().max() < 1e-5 * x.square().mean().sqrt())


def the_coordinates_arrive(subspace) -> bool:
    x, new = draw(1, 5, WIDTH), draw(2, 5, subspace.coordinates(draw(1, 1, WIDTH)).shape[-1])
    return torch.allclose(subspace.coordinates(subspace.replace(x, new)), new, atol=1e-5)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_replacing_by_ones_own_coordinates_is_the_identity(name, dtype):
    assert replacing_by_ones_own_coordinates_is_the_identity(SUBSPACES[name](), dtype)


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_not_spanned_stays_and_what_is_arrives(name):
    assert the_complement_stays(SUBSPACES[name]())
    assert the_coordinates_arrive(SUBSPACES[name]())


class Projection(Rotation):
    """Rebuilds the vector from its coordinates alone."""

    def _replaced(self, x, coordinates):
        return coordinates @ self.directions.T


class Reassembly(Rotation):
    """Right on paper, but the rounding of x − (x W) Wᵀ + c Wᵀ shows."""

    def _replaced(self, x, coordinates):
        return x - (x @ self.directions) @ self.directions.T + coordinates @ self.directions.T


class Shift(Rotation):
    """Adds the coordinates to those that are there."""

    def _replaced(self, x, coordinates):
        return x + coordinates @ self.directions.T


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (Projection, the_complement_stays),
        (Projection, replacing_by_ones_own_coordinates_is_the_identity),
        (Reassembly, replacing_by_ones_own_coordinates_is_the_identity),
        (Shift, the_coordinates_arrive),
    ],
)
def test_each_law_can_fail(wrong, law):
    assert law(Rotation(4, WIDTH))
    assert not law(wrong(4, WIDTH))


@every
@pytest.mark.parametrize(("dtype", "autocast"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)])
def test_the_dtype_is_that_of_the_activation_and_the_arithmetic_fp32(name, dtype, autocast):
    subspace = SUBSPACES[name]()
    x, source = draw(1, 3, WIDTH).to(dtype), draw(2, 3, WIDTH).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        coordinates = subspace.coordinates(source)
        new = subspace.replace(x, coordinates)
    assert coordinates.dtype == torch.float32
    assert new.dtype == dtype
    exact = subspace.replace(x.float(), subspace.coordinates(source.float()))
    assert torch.equal(new, exact.to(dtype))


@every
def test_gradients_reach_the_activation_the_coordinates_and_the_parameters(name):
    subspace = SUBSPACES[name]().double()
    x, source = (draw(seed, 2, WIDTH, dtype=torch.float64).requires_grad_() for seed in (1, 2))
    subspace.coordinates(x)  # the width is known from here on
    parameters = dict(subspace.named_parameters())

    def replaced(x, source, *values):
        swapped = dict(zip(parameters, values, strict=True))
        coordinates = torch.func.functional_call(Call(subspace, "coordinates"), under(swapped), (source,))
        return torch.func.functional_call(Call(subspace, "replace"), under(swapped), (x, coordinates))

    assert torch.autograd.gradcheck(replaced, (x, source, *parameters.values()))
    inputs = {"x": x, "source": source, **(parameters if subspace.training else {})}
    loss = replaced(x, source, *parameters.values()).square().sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    zero = {key for key, gradient in zip(inputs, gradients, strict=True) if gradient.abs().sum() < 1e-6}
    assert zero == WITHOUT_GRADIENT.get(name, set())


class Call(nn.Module):
    """`subspace.method` as a forward, for functional_call."""

    def __init__(self, subspace: nn.Module, method: str) -> None:
        super().__init__()
        self.subspace, self.method = subspace, method

    def forward(self, *args):
        return getattr(self.subspace, self.method)(*args)


def under(parameters: dict) -> dict:
    return {f"subspace.{name}": value for name, value in parameters.items()}


@every
def test_no_activation_is_written_into(name):
    subspace, x, source = SUBSPACES[name](), draw(1, 2, WIDTH), draw(2, 2, WIDTH)
    coordinates = subspace.coordinates(source)
    kept = coordinates.clone()
    subspace.replace(x, coordinates)
    assert torch.equal(x, draw(1, 2, WIDTH))
    assert torch.equal(coordinates, kept)


def built_again(subspace):
    if isinstance(subspace, SparseCoder):
        return copy.deepcopy(subspace)
    within = getattr(subspace, "within", None)
    inner = {} if within is None else {"within": built_again(within)}
    return type(subspace)(**json.loads(json.dumps(subspace.settings)), **inner)


@every
def test_a_state_dict_and_the_settings_hold_all_of_it(name):
    subspace = SUBSPACES[name]()
    x, source = draw(1, 3, WIDTH), draw(2, 3, WIDTH)
    subspace.coordinates(x)
    for parameter in subspace.parameters():
        parameter.data += 0.1
    if hasattr(subspace, "temperature"):
        subspace.temperature = 0.7
    same = built_again(subspace)
    same.train(subspace.training).load_state_dict(subspace.state_dict())
    assert torch.equal(same.replace(x, same.coordinates(source)), subspace.replace(x, subspace.coordinates(source)))
    assert same != subspace
    assert len({same, subspace}) == 2


@every
def test_another_width_is_refused(name):
    subspace = SUBSPACES[name]()
    if "coder" in name:
        pytest.skip("its functions decide")
    subspace.coordinates(draw(0, 2, WIDTH))
    with pytest.raises(
        InterventionError, match=r"width 12 and was given a tensor of shape \[2, 9\]; build it with width=9"
    ):
        subspace.coordinates(draw(0, 2, 9))
    with pytest.raises(InterventionError, match="width 12 and was given"):
        subspace.replace(draw(0, 2, 9), draw(0, 2, 9))


@every
def test_other_coordinates_are_refused(name):
    subspace, x = SUBSPACES[name](), draw(0, 2, WIDTH)
    right = subspace.coordinates(x)
    for wrong in (right[..., :-1], right[:1], right[0]):
        with pytest.raises(InterventionError, match=r"coordinates of shape .* and those of x have \[2, \d+\]; give"):
            subspace.replace(x, wrong)


@pytest.mark.parametrize("start", ["random", "axes"])
def test_training_finds_a_given_subspace(start):
    target = Rotation(3, WIDTH, seed=7).directions.detach()
    rotation = Rotation(3, WIDTH) if start == "random" else Rotation.from_directions(torch.eye(WIDTH)[:, :3])
    optimizer = torch.optim.Adam(rotation.parameters(), lr=0.03)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (rotation.directions @ rotation.directions.T - target @ target.T).square().sum()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3


def test_directions_start_uniformly_random_by_seed_alone():
    before = torch.get_rng_state()
    one, same, other = (Rotation(4, 50, seed=seed).directions for seed in (0, 0, 1))
    late = Rotation(4, seed=1)
    late.coordinates(torch.zeros(50))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert torch.equal(late.directions, other)
    assert not torch.allclose(one, other)
    drawn = torch.stack([Rotation(1, 4, seed=seed).directions[:, 0] for seed in range(400)])
    assert torch.allclose(drawn.mean(0), torch.zeros(4), atol=0.1)
    assert torch.allclose(drawn.T @ drawn / 400, torch.eye(4) / 4, atol=0.08)


def test_given_directions_are_orthonormalised_in_their_order():
    given = draw(0, 16, 5)
    directions = Rotation.from_directions(given).directions.detach()
    assert torch.allclose(directions.T @ given, (directions.T @ given).triu(), atol=1e-5)
    assert ((directions.T @ given).diagonal() > 0).all()
    assert torch.allclose(Rotation.from_directions(directions).directions, directions, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: Rotation(4), BoundlessRotation, Mask], ids=["rotation", "boundless", "mask"])
def test_an_unknown_width_is_that_of_the_first_activation(make):
    subspace = make()
    parameters = list(subspace.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for ask in (subspace.state_dict, lambda: getattr(subspace, "size" if make is Mask else "directions")):
        with pytest.raises(InterventionError, match="without a width and has not run yet.*; write width=…, or run it"):
            ask()
    x, source = draw(0, 2, WIDTH), draw(1, 2, WIDTH)
    with torch.inference_mode():
        subspace.coordinates(x)
    assert subspace.width == WIDTH == subspace.settings["width"]
    assert all(old is new for old, new in zip(parameters, subspace.parameters(), strict=True))
    before = subspace.replace(x, subspace.coordinates(source))
    before.square().sum().backward()
    optimizer.step()
    assert not torch.equal(subspace.replace(x, subspace.coordinates(source)), before)
    fresh, deep = make(), copy.deepcopy(make())
    for late in (fresh, deep):
        late.load_state_dict(subspace.state_dict())
        assert torch.equal(late.replace(x, late.coordinates(source)), subspace.replace(x, subspace.coordinates(source)))
    nested = nn.ModuleDict({"a": make()})
    nested.load_state_dict({f"a.{key}": value for key, value in subspace.state_dict().items()})
    assert nested["a"].width == WIDTH


# The others


def test_the_boundary_says_how_many_rotated_dims_are_replaced():
    rotation = BoundlessRotation(10, temperature=0.1).eval()
    x, source = draw(0, 10), draw(1, 10)
    for share, count in [(0.04, 0), (0.06, 1), (0.5, 5), (0.96, 10)]:
        rotation.logit.data = torch.tensor(share).logit()
        assert rotation.boundary.item() == pytest.approx(share)
        assert torch.equal(rotation.size, rotation.boundary)
        assert rotation.chosen.tolist() == [True] * count + [False] * (10 - count)
        change = rotation.coordinates(rotation.replace(x, rotation.coordinates(source))) - rotation.coordinates(x)
        expected = rotation.coordinates(source - x) * (torch.arange(10) < count)
        assert torch.allclose(change, expected, atol=1e-5)


def test_temperature_makes_the_choice_soft_in_train_mode_alone():
    x, source, half = torch.zeros(4), torch.ones(4), torch.full((4,), 0.5)
    mask = Mask(4, temperature=2.0)
    mask.logits.data = torch.tensor([-2.0, 2.0, 6.0, 0.0])
    assert torch.allclose(mask.replace(x, source), torch.tensor([-1.0, 1.0, 3.0, 0.0]).sigmoid())
    assert mask.size.item() == pytest.approx(torch.tensor([-1.0, 1.0, 3.0, 0.0]).sigmoid().mean().item())
    mask.temperature = 200.0
    assert torch.allclose(mask.replace(x, source), half, atol=0.01)
    mask.eval()
    assert mask.replace(x, source).tolist() == [0, 1, 1, 0]
    mask.size.backward()
    assert (mask.logits.grad > 0).all()
    rotation = BoundlessRotation(4, temperature=1e6)
    assert torch.allclose(rotation.replace(x, rotation.coordinates(source)), half, atol=1e-3)


def test_pca_is_that_of_scikit_learn():
    from sklearn.decomposition import PCA as Reference

    vectors = draw(0, 40, WIDTH, dtype=torch.float64) * torch.arange(1, WIDTH + 1) + 5
    reference, pca = Reference(4).fit(vectors.numpy()), PCA.fit(vectors, 4)
    assert torch.allclose(pca.explained_variance_ratio.double(), torch.tensor(reference.explained_variance_ratio_))
    expected = torch.tensor(reference.components_)
    signs = expected.gather(1, expected.abs().argmax(1, keepdim=True)).sign()
    assert torch.allclose(pca.components.double(), expected * signs, atol=1e-5)
    taken = PCA.from_components(torch.tensor(reference.mean_), torch.tensor(reference.components_))
    assert torch.allclose(taken.coordinates(vectors), torch.tensor(reference.transform(vectors.numpy())), atol=1e-9)
    assert not list(pca.parameters())


def test_a_pca_fitted_later_is_the_one_fitted_at_once():
    vectors, others = draw(0, 2, 20, WIDTH), draw(1, 40, WIDTH) * torch.arange(WIDTH)
    pca = PCA(3)
    assert not pca.fitted
    assert pca.width is None
    assert pca.fit_to(vectors) is pca
    for given, expected in [(vectors, PCA.fit(vectors, 3)), (others, PCA.fit(others, dims=3))]:
        pca.fit_to(given)
        assert pca.fitted
        assert pca.settings == expected.settings == {"dims": 3, "width": WIDTH}
        assert pca.state_dict().keys() == expected.state_dict().keys() == {
            "mean", "components", "explained_variance_ratio"}  # fmt: skip
        assert all(torch.equal(value, expected.state_dict()[key]) for key, value in pca.state_dict().items())
    assert not torch.allclose(pca.components, PCA.fit(vectors, 3).components, atol=0.1)
    columns = torch.eye(WIDTH)[:, :3]
    assert PCA.from_components(torch.zeros(WIDTH), columns.T).components.is_contiguous()


def test_a_pca_that_is_not_fitted_says_so_until_it_is():
    pca, x = PCA(4, WIDTH), draw(0, 3, WIDTH)
    message = (
        r"PCA\(dims=4\) is not fitted yet, so .*; write PCA.fit\(vectors, dims=4\) or pca.fit_to\(vectors\), or have "
        "distill.align fit it"
    )
    for ask in (lambda: pca.coordinates(x), lambda: pca.replace(x, draw(0, 3, 4)), pca.state_dict,
                lambda: Mask(within=pca).coordinates(x)):  # fmt: skip
        with pytest.raises(InterventionError, match=message):
            ask()
    for wrong in (draw(0, 50, 9), draw(0, 3, WIDTH)):  # of another width, too few
        with pytest.raises(InterventionError, match=r"width 12 and was given .* \[50, 9\]|3 vectors vary in 2"):
            pca.fit_to(wrong)
        assert not pca.fitted
    pca.fit_to(draw(0, 50, WIDTH))
    assert pca.coordinates(x).shape == (3, 4)


def test_a_pca_is_loaded_bit_for_bit_into_one_that_is_not_fitted():
    exact = PCA.from_components(draw(0, WIDTH, dtype=torch.float64), torch.eye(WIDTH, dtype=torch.float64)[:3])
    for fitted in (pca(3), exact):
        late = PCA(3)
        late.load_state_dict(fitted.state_dict())
        assert late.fitted
        assert late.width == WIDTH
        assert late.state_dict().keys() == fitted.state_dict().keys()
        for key, value in fitted.state_dict().items():
            assert late.state_dict()[key].dtype == value.dtype
            assert torch.equal(late.state_dict()[key], value)
    for other in (PCA(4), PCA(3, 9)):
        with pytest.raises(RuntimeError, match="size mismatch for components"):
            other.load_state_dict(pca(3).state_dict())
        assert not other.fitted


def test_a_pca_fitted_under_inference_mode_lets_gradients_through():
    with torch.inference_mode():
        pca = PCA(3).fit_to(draw(0, 50, WIDTH))
    x = draw(1, 2, WIDTH).requires_grad_()
    pca.replace(x, pca.coordinates(x) * 2).square().sum().backward()
    assert x.grad.abs().sum() > 0


WITHIN = ["rotation", "rotation of unknown width", "boundless, hard", "mask, hard", "pca", "coder of modules",
          "coder of functions", "coder, some features"]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WITHIN)
def test_a_mask_in_a_subspace_replaces_the_coordinates_that_it_chooses(name, dtype):
    within = SUBSPACES[name]()
    x, source = ((10 * draw(seed, 5, WIDTH)).to(dtype) for seed in (1, 2))
    old, new = within.coordinates(x), within.coordinates(source)
    mask = Mask(within=within)
    assert torch.equal(mask.coordinates(source), new)
    assert mask.logits.shape == new.shape[-1:]
    assert mask.width == within.width
    mixed = within.replace(x, old + 0.5 * (new - old)).float()
    assert torch.allclose(
        mask.replace(x, new).float(), mixed, atol=1e-3, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4
    )
    mask.eval()
    within.eval()
    assert torch.equal(mask.replace(x, new), x)
    assert not mask.chosen.any()
    mask.logits.data[0] = 1.0
    first = torch.where(torch.arange(len(mask.logits)) == 0, new, old)
    assert torch.equal(mask.replace(x, new), within.replace(x, first))
    mask.logits.data.fill_(1.0)
    assert mask.chosen.all()
    assert torch.equal(mask.replace(x, new), within.replace(x, new))
    assert not torch.equal(mask.replace(x, new), x)


def test_what_a_hard_mask_does_not_choose_may_be_infinite():
    x, source = draw(1, 5, WIDTH), torch.full((5, WIDTH), torch.inf)
    for mask in (Mask(WIDTH), Mask(within=pca())):
        mask.eval().coordinates(x)
        assert torch.equal(mask.replace(x, source[:, : len(mask.logits)]), x)


def test_a_mask_in_a_subspace_is_trained_with_what_is_learned_of_it():
    x, source, target = (draw(seed, 30, WIDTH) for seed in (1, 2, 3))
    for name in ("rotation of unknown width", "boundless of unknown width", "pca", "coder of modules"):
        mask = Mask(within=SUBSPACES[name]())
        optimizer = torch.optim.SGD(mask.learned(), lr=0.1)
        mask.replace(x, mask.coordinates(source))
        before = {key: value.clone() for key, value in mask.state_dict().items()}
        for _ in range(2):
            loss = (mask.replace(x, mask.coordinates(source)) - target).square().mean() + mask.size
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        changed = {key for key, value in mask.state_dict().items() if not torch.equal(value, before[key])}
        inner = {"rotation": {"within.reflections"}, "boundless": {"within.reflections", "within.logit"}}
        assert changed == {"logits"} | inner.get(name.split()[0], set())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rotation", {"reflections"}),
        ("rotation of unknown width", {"reflections"}),
        ("boundless", {"reflections", "logit"}),
        ("mask", {"logits"}),
        ("pca", set()),
        ("coder of modules", set()),
        ("coder of methods", set()),
        ("mask in a rotation of unknown width", {"logits", "within.reflections"}),
        ("mask in a coder", {"logits"}),
        ("mask in a mask in a pca, hard", {"logits", "within.logits"}),
    ],
)
def test_what_alignment_trains_is_what_is_not_given(name, expected):
    subspace = SUBSPACES[name]()
    learned = subspace.learned()
    names = {key for key, value in subspace.named_parameters() if any(value is each for each in learned)}
    assert names == expected
    assert len(learned) == len(expected)


@pytest.mark.parametrize("name", [name for name in SUBSPACES if name.startswith(("mask", "boundless"))])
def test_the_size_is_what_is_replaced_and_can_be_penalised_in_either_mode(name):
    subspace = SUBSPACES[name]()
    subspace.coordinates(torch.zeros(1, WIDTH))
    subspace.temperature = 0.01
    own = subspace.logit if name.startswith("boundless") else subspace.logits
    for training in (True, False):
        subspace.train(training)
        assert subspace.chosen.dtype == torch.bool
        assert subspace.chosen.shape == subspace.coordinates(torch.zeros(1, WIDTH)).shape[-1:]
        (gradient,) = torch.autograd.grad(subspace.size, own)
        assert (gradient >= 0).all()
    own.data.fill_(-9.0)
    assert subspace.size < 0.01
    assert not subspace.chosen.any()
    own.data.fill_(9.0)
    assert subspace.size > 0.99
    assert subspace.chosen.all()


def test_what_a_coder_does_not_reconstruct_stays():
    coder = SUBSPACES["coder of methods"]()
    x, z = draw(0, 3, WIDTH), draw(1, 3, FEATURES).relu()
    inner = coder.owners[0]
    expected = x + inner.decode(z) - inner.decode(inner.encode(x))
    assert torch.allclose(coder.replace(x, z), expected, atol=1e-6)
    assert not torch.allclose(coder.replace(x, z), inner.decode(z), atol=0.1)


def test_features_name_the_coordinates_of_a_coder():
    coder = SUBSPACES["coder, some features"]()
    x, z = draw(0, 3, WIDTH), draw(1, 3, 2)
    all_of_them = coder.encode(x)
    assert torch.equal(coder.coordinates(x), all_of_them[:, [7, 2]])
    changed = all_of_them.clone()
    changed[:, 7], changed[:, 2] = z[:, 0], z[:, 1]
    assert torch.allclose(coder.replace(x, z), x + coder.decode(changed) - coder.decode(all_of_them), atol=1e-6)


def test_the_modules_of_a_coder_are_part_of_it():
    assert sum(1 for _ in SUBSPACES["coder of modules"]().parameters()) == 4
    assert sum(1 for _ in SUBSPACES["coder of methods"]().parameters()) == 4
    assert not list(SUBSPACES["coder of functions"]().parameters())
    half = SUBSPACES["coder of methods"]().to(torch.bfloat16)
    x = draw(0, 3, WIDTH)
    assert half.replace(x, half.coordinates(x)).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rotation(9, 8), "Rotation cannot have 9 directions in a space of width 8; write dims=1 to dims=8"),
        (lambda: Rotation(0), "Rotation cannot have 0 directions; write dims=1 to"),
        (lambda: Rotation(9).coordinates(torch.zeros(2, 8)), "9 directions in a space of width 8"),
        (lambda: Rotation.from_directions(torch.ones(4, 2)), "was given 2 directions of rank 1; leave out those"),
        (lambda: Rotation.from_directions(torch.ones(2, 4)), "4 directions in a space of width 2"),
        (lambda: BoundlessRotation(8, temperature=0.0), r"BoundlessRotation\(temperature=0.0\) divides by it"),
        (lambda: Mask(8, temperature=-1.0), r"Mask\(temperature=-1.0\) divides by it.*subspace.eval\(\)"),
        (lambda: Mask(8, within=Rotation(4)), r"Mask\(width=8\) was given .*; write Mask\(within=Rotation\(…\)\)\."),
        *(
            (ask, r"Mask\(within=SparseCoder\(…\)\) has not run yet, .*; run it once: mask.coordinates\(activation\)")
            for ask in (
                lambda: Mask(within=of_modules()).size,
                lambda: Mask(within=of_modules()).chosen,
                lambda: Mask(within=of_modules()).state_dict(),
            )
        ),
        (lambda: PCA(9, 8), "PCA cannot have 9 directions in a space of width 8; write dims=1 to dims=8"),
        (lambda: PCA(0), "PCA cannot have 0 directions"),
        (lambda: PCA.fit(draw(0, 3, 8), 4), r"PCA\(dims=4\) has too few directions: 3 vectors vary in 2; .*dims=2"),
        (lambda: PCA.fit(torch.ones(9, 8), 1), "9 vectors vary in 0"),
        (lambda: PCA.fit(draw(0, 9, 8), 9), "PCA cannot have 9 directions in a space of width 8"),
        (
            lambda: PCA.from_components(torch.zeros(2), 2 * torch.eye(2)),
            r"\[2, 2\] that are not orthonormal rows .*; use PCA.fit",
        ),
        (
            lambda: SparseCoder(nn.ReLU(), nn.ReLU(), features=[1, 1]),
            r"features=\[1, 1\]\) does not name features once",
        ),
        (lambda: SparseCoder(nn.ReLU(), nn.ReLU(), features=[]), r"features=\[\]\) does not name"),
        (
            lambda: SparseCoder(nn.ReLU(), nn.ReLU(), features=[4]).coordinates(torch.zeros(4)),
            r"names feature 4 and encode returns 4; write features=range\(0, 4\)",
        ),
        (
            lambda: SparseCoder(nn.ReLU(), lambda z: z[..., :2]).replace(torch.zeros(2, 4), torch.zeros(2, 4)),
            r"decode of SparseCoder returned shape \[2, 2\] for an activation of shape \[2, 4\]; return one",
        ),
    ],
)
def test_wrong_input_is_refused(make, message):
    with pytest.raises(InterventionError, match=message):
        make()


@pytest.mark.parametrize(("temperature", "first", "authors_first"), [(50.0, 0.5175, 0.2600), (0.1, 1.0, 0.5)])
def test_the_boundary_differs_from_that_of_the_authors_as_is_said(temperature, first, authors_first):
    """Their mask, σ(j/τ) · σ((b·width − j)/τ), has an edge at dim 0 too (pyvene 0.1.8); ours counts from ½."""
    rotation = BoundlessRotation(8, temperature=temperature).train()
    x, ones = torch.zeros(8), torch.ones(8)
    mask = rotation.replace(x, ones) @ rotation.directions  # of a difference of one in each rotated dim
    numbers = torch.arange(8.0)
    theirs = (numbers / temperature).sigmoid() * ((4 - numbers) / temperature).sigmoid()
    torch.testing.assert_close(mask, ((4 - numbers - 0.5) / temperature).sigmoid(), rtol=1e-4, atol=1e-5)
    assert mask[0].item() == pytest.approx(first, abs=1e-4)
    assert theirs[0].item() == pytest.approx(authors_first, abs=1e-4)
    assert not torch.allclose(mask, theirs, atol=0.01)
    hard = rotation.eval().replace(x, ones) @ rotation.directions
    torch.testing.assert_close(hard, torch.tensor([1.0] * 4 + [0.0] * 4), rtol=1e-4, atol=1e-5)
