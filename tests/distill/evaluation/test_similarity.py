import pytest
import torch

from distill import DistillError, metrics
from distill.evaluation import similarity
from distill.evaluation.similarity import cka, representational_similarity

MEASURES = [representational_similarity, cka]


def drawn(n=40, dims=7, seed=0, dtype=torch.float64):
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(dims, seed=1):
    return torch.linalg.qr(drawn(dims, dims, seed)).Q


def test_metrics_offers_them():
    assert metrics.cka is cka
    assert metrics.representational_similarity is representational_similarity


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (2, 3), (30, 30)])
def test_a_network_is_like_itself_rotated_and_scaled(measure, shape):
    a, b = drawn(*shape), drawn(*shape, seed=2)
    assert measure(a, a).item() == pytest.approx(1)
    assert measure(a, 3 * a @ rotation(shape[1])).item() == pytest.approx(1)
    assert measure(a, b).item() == pytest.approx(measure(b, a).item())
    if shape[0] > 2:  # of two centred examples, all are alike
        assert measure(a, b).item() < 0.9
        assert measure(2 * a @ rotation(shape[1]), b).item() == pytest.approx(measure(a, b).item())


def test_they_differ_in_what_they_do_not_see():
    a, b = drawn(), drawn(seed=2)
    moved, stretched = a + 5, a * torch.linspace(1, 3, 40)[:, None]
    assert cka(moved, b).item() == pytest.approx(cka(a, b).item())
    assert representational_similarity(a, moved).item() < 0.9
    assert representational_similarity(stretched, b).item() == pytest.approx(representational_similarity(a, b).item())
    assert cka(a, stretched).item() < 0.99


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_representational_similarity_is_that_of_a_slow_loop(monkeypatch, chunk):
    monkeypatch.setattr(similarity, "CHUNK", chunk)
    a, b = drawn(8, 5), drawn(8, 3, seed=2)

    def cosine(x, y):
        return float(x @ y / (x.norm() * y.norm()))

    rows = []
    for i in range(8):
        one, other = (torch.tensor([cosine(v[i], v[j]) for j in range(8)]) for v in (a, b))
        rows.append(cosine(one, other))
    assert representational_similarity(a, b).item() == pytest.approx(sum(rows) / 8, abs=1e-6)


def test_representational_similarity_by_hand():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0], [-3.0]])
    # rows (1, 0) and (0, 1) of the one, (1, −1) and (−1, 1) of the other
    assert representational_similarity(a, b).item() == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("shape", [(50, 4), (4, 50), (20, 20)])
def test_both_forms_of_cka_are_its_definition(shape):
    """Kornblith et al. 2019, equations 3 and 4: HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) with K = AAᵀ, L = BBᵀ."""
    a, b = drawn(*shape), drawn(shape[0], 9, seed=3) + drawn(*shape)[:, :1]
    n = shape[0]
    centre = torch.eye(n, dtype=torch.float64) - 1 / n

    def hsic(k, m):
        return torch.trace(k @ centre @ m @ centre) / (n - 1) ** 2

    k, m = a @ a.T, b @ b.T
    expected = float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())
    a, b = a - a.mean(0), b - b.mean(0)
    assert similarity._cka_by_dims(a, b).item() == pytest.approx(expected)
    assert similarity._cka_by_examples(a, b).item() == pytest.approx(expected)
    assert cka(a, b).item() == pytest.approx(expected)


def test_cka_takes_the_cheaper_form(monkeypatch):
    for name, cheap, dear in (("_cka_by_examples", (4, 50), (50, 4)), ("_cka_by_dims", (50, 4), (4, 50))):
        with monkeypatch.context() as patched:
            patched.setattr(similarity, name, lambda a, b: torch.tensor(-1.0))
            assert cka(drawn(*cheap), drawn(*cheap)).item() == -1
            assert cka(drawn(*dear), drawn(*dear)).item() == pytest.approx(1)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_and_sizes_of_numbers(measure, dtype):
    a, b = drawn(dtype=torch.float64).to(dtype), drawn(dims=5, seed=2).to(dtype)
    found = measure(a, b)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(measure(a.double(), b.double()).item(), abs=1e-5)
    for size in (1e-30, 1e30):
        assert measure(a.float() * size, b.float()).item() == pytest.approx(found.item(), abs=1e-5)


@pytest.mark.parametrize("measure", MEASURES)
def test_what_cannot_be_compared_is_said(measure):
    a = drawn()
    with pytest.raises(DistillError, match="are of 40 and of 39 examples; run both networks on the same"):
        measure(a, drawn(39))
    with pytest.raises(DistillError, match="are of 0 and of 0 examples"):
        measure(a[:0], a[:0])
    broken = a.clone()
    broken[3, 2] = float("nan")
    with pytest.raises(DistillError, match="the second activations of example 3 are not finite"):
        measure(a, broken)


def test_vectors_without_direction_and_without_difference_are_refused():
    a = drawn()
    still = a.clone()
    still[5] = 0
    with pytest.raises(DistillError, match="the first activations of example 5 are all 0 and have no direction"):
        representational_similarity(still, a)
    cka(still, a)
    with pytest.raises(DistillError, match="the second activations are the same for all 40 examples"):
        cka(a, torch.full((40, 3), 0.1))
    assert representational_similarity(a, torch.full((40, 3), 0.1)).isfinite()
